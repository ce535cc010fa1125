"""Counted operations against closed forms for small networks, exactly."""

import pytest
import torch
from layout_runs import stand_in_objective
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_runs import GPT, TOKENIZER

from gigatok_ds.compat import timm_library
from gigatok_ds.config.load import load_recipe
from gigatok_ds.losses import composition
from gigatok_ds.models.quantizer import VectorQuantizer
from gigatok_ds.monitoring.flops import GPTFlops, TokenizerFlops, counted, own_formulas

BATCH, IMAGES, CODES, TOKENS, DIM = 8, 4, 64, 8, 4


def recipe(tmp_path, text, *overrides):
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml", overrides)


def tokenizer_flops(tmp_path, *overrides):
    made = recipe(tmp_path, TOKENIZER, *overrides)
    return TokenizerFlops(made, stand_in_objective_of(made.loss), IMAGES, torch.device("cpu"))


def stand_in_objective_of(loss):
    """Without the frozen networks that a recipe does not have."""
    if loss.perceptual and loss.semantic:
        return stand_in_objective(loss, device="cpu", grid=8, precision="fp32")
    return composition.TokenizerObjective(loss, perceptual=None, teacher=None)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpt_is_its_closed_form(tmp_path, recompute):
    made = recipe(tmp_path, GPT, f"parallel.recompute_every={int(recompute)}")
    width, hidden, layers, vocabulary = 32, made.model.ffn_width, 2, CODES
    attention = 2 * 2 * TOKENS**2 * width
    block = 2 * TOKENS * (4 * width**2 + 3 * width * hidden) + attention
    head = 2 * TOKENS * width * vocabulary
    forward = layers * block + head
    again = head + (layers * block if recompute else 0)  # even a block's last product: dropout follows
    flops = GPTFlops(made).of_step(1)
    assert flops.model == BATCH * 3 * forward
    assert flops.hardware == BATCH * (3 * forward + again)


def test_the_entropy_term_adds_its_backward_pass(tmp_path):
    flops = tokenizer_flops(tmp_path, "loss.auxiliary=null", "loss.adversarial=null")
    with_entropy, without = flops.of_step(6), flops.of_step(7)
    pairs = BATCH * TOKENS * CODES * DIM
    # Gradients of latents and codes; in hardware, their distances once more.
    assert with_entropy.model - without.model == 4 * pairs
    assert with_entropy.hardware - without.hardware == 6 * pairs


def test_the_quantizer_counts_its_distances(tmp_path):
    quantizer = VectorQuantizer(recipe(tmp_path, TOKENIZER).model.quantizer).train()
    latent = torch.randn(2, DIM, 1, TOKENS)
    assert counted(lambda: quantizer(latent)).once == 2 * 2 * TOKENS * CODES * DIM


@pytest.mark.parametrize("direct", [False, True])
def test_the_count_is_that_of_torchs_counter(tmp_path, direct):
    flops = tokenizer_flops(tmp_path)
    with FlopCounterMode(display=False,
                         custom_mapping=own_formulas(again=False)) as theirs, sdpa_kernel(SDPBackend.MATH):
        flops._generator("global", direct)
    for _ in range(2):  # the second time calls are remembered
        assert counted(lambda: flops._generator("global", direct)).once == theirs.get_total_flops() > 0


def convolutions(network, size):
    """Operations of each convolution of `network` for IMAGES images, in its order."""
    found = []

    def note(layer, inputs, output):
        per_value = 2 * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        found.append(output.numel() * per_value)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(IMAGES, 3, size, size))
    return found


def test_a_discriminator_judges_and_learns(tmp_path):
    flops = tokenizer_flops(tmp_path, "loss.auxiliary=null")
    before, after = flops.of_step(3), flops.of_step(4)
    of = convolutions(composition.build_discriminator(flops.recipe.loss.adversarial, image_size=16), 16)
    judging = 2 * sum(of)  # forward, and the gradient of every input
    learning = 2 * (3 * sum(of) - of[0])  # of image and reconstruction, whose own gradients nobody wants
    assert after.model - before.model == (judging + learning) * BATCH // IMAGES
    assert after.hardware - before.hardware == after.model - before.model


def test_frozen_networks_are_hardware_only(tmp_path):
    options = ["loss.adversarial=null", "loss.quantizer.entropy=0.0", "loss.perceptual={weight: 0.5}",
               "loss.semantic={teacher: stand-in}", "model.semantic_head={depth: 1, teacher_width: 24}"]
    flops = tokenizer_flops(tmp_path, *options)
    perceptual = 2 * IMAGES * 14**2 * 8 * 3 * 9  # a 3 x 3 convolution of 16 x 16 pixels without padding
    teacher = 2 * IMAGES * 8**2 * 24 * 3 * 4
    for step, sides in ((1, 2), (6, 1)):
        model, hardware = flops.of_step(step)
        assert hardware - model == ((1 + 2 * sides) * perceptual + teacher) * BATCH // IMAGES


def test_the_adaptive_weight_needs_the_last_layers_gradient_twice(tmp_path):
    plain = tokenizer_flops(tmp_path).of_step(4)
    adaptive = tokenizer_flops(tmp_path, "loss.adversarial.adaptive_weight=true").of_step(4)
    last = 2 * BATCH * 16**2 * 3 * 32 * 9
    assert adaptive.model == plain.model and adaptive.hardware - plain.hardware == 2 * 2 * last


def test_counting_touches_nothing_and_happens_once_a_phase(tmp_path, monkeypatch):
    flops = tokenizer_flops(tmp_path)
    state = torch.get_rng_state()
    first = [flops.of_step(step) for step in range(1, 9)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [step for step in range(2, 9) if first[step - 1] != first[step - 2]] == [4, 6, 7]
    monkeypatch.setattr(flops, "_count", None)
    assert [flops.of_step(step) for step in range(1, 9)] == first


@pytest.mark.parametrize("name, size", [("patchgan", 32), ("stylegan", 32), ("dino", 32), ("dino", 256)])
def test_each_discriminator_can_be_counted(tmp_path, monkeypatch, name, size):
    """That of DINO also crops, by draws of its own."""
    monkeypatch.setattr(composition, "dino_backbone", lambda weights: timm_library().models.VisionTransformer(
        patch_size=16, embed_dim=12, depth=12, num_heads=2, num_classes=0))
    flops = tokenizer_flops(tmp_path, f"model.image_size={size}", "loss.adversarial=null",
                            f"loss.adversarial={{start_step: 1, discriminator: {name}}}")
    assert flops.of_step(4).model > flops._discriminate(1) > 0
