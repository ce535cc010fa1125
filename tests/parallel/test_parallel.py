"""What two tensor ranks do together: shares of the convolutions, exact gradients, and checks before training."""

import pytest
import torch
from rank_runs import run_ranks
from small_models import small_tokenizer_config
from torch import nn

from gigatok_ds.config.losses import AdversarialConfig
from gigatok_ds.errors import InputError
from gigatok_ds.losses.composition import build_discriminator
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.topology import check_layout, start_process_group

IMAGES = 8


def images():
    return torch.rand(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def count_images(network, counts):
    """Add up the batch sizes that go through each convolution of more than one pixel."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) and name.startswith(("cnn", "main")):
            def hook(module, inputs, name=name):
                counts[name] = counts.get(name, 0) + len(inputs[0])
            module.register_forward_pre_hook(hook)


def gradients_of_convolutions(tensor_size):
    """(gradients of a step of tokenizer and discriminator, images that went through each convolution)."""
    from gigatok_ds.parallel.partial import sum_partial_gradients

    topology = start_process_group(tensor_size=tensor_size)
    network = initialise_(Tokenizer(small_tokenizer_config(), topology.layers), seed=0,
                          tensor_rank=topology.tensor_rank, tensor_size=tensor_size)
    torch.manual_seed(0)
    judge = build_discriminator(AdversarialConfig(start_step=1, base_channels=8, layers=2), topology.layers,
                                image_size=16)
    counts = {}
    # In float64 throughout, also what networks compute in float32 whatever they are cast to: only the order of
    # summation differs, and hardly.
    single = torch.Tensor.float
    torch.Tensor.float = lambda x, *more: x if x.dtype == torch.float64 else single(x, *more)
    network.double()
    judge.double()
    for part in (network, judge):
        count_images(part, counts)
        if tensor_size > 1:
            sum_partial_gradients(part, topology.tensor_group)
    own = topology.own_images(images().double())
    output = network(own, semantic=True, direct=True)
    loss = ((output.reconstruction - own).square().mean() + output.direct_reconstruction.abs().mean()
            + judge(output.reconstruction).tanh().mean()) / tensor_size
    (loss + output.semantic_feature.square().mean() + sum(output.quantizer_losses)).backward()
    parameters = [*network.named_parameters(), *judge.named_parameters()]
    return {name: p.grad for name, p in parameters if not hasattr(p, "tensor_model_parallel")}, counts


def test_shared_convolutions_have_exact_gradients_and_half_the_images():
    (full, alone), = run_ranks(gradients_of_convolutions, 1, 1)
    assert alone["cnn_encoder.conv_in"] == IMAGES and alone["cnn_decoder.conv_out"] == 2 * IMAGES
    for gradients, counts in run_ranks(gradients_of_convolutions, 2, 2):
        assert counts == {name: number // 2 for name, number in alone.items()}
        for name, gradient in gradients.items():
            scale = full[name].norm().clamp(min=1e-3)  # some are zero but for rounding
            assert ((gradient - full[name]).norm() / scale).item() < 1e-6, name


def images_of_a_whole_run(recipe, out, settings):
    """Images that frozen networks and discriminator of this rank have seen in a run."""
    from layout_runs import StandInTeacher, shown, train_on_a_rank

    from gigatok_ds.models.discriminators.patchgan import PatchGAN

    judged = []
    forward = PatchGAN.forward
    PatchGAN.forward = lambda self, images, draws=None: judged.append(shown(images)) or forward(self, images, draws)
    train_on_a_rank(recipe, out, settings)
    return StandInTeacher.seen, sum(judged)


def test_teacher_and_discriminator_share_the_images(tmp_path):
    from layout_runs import Layout, LayoutRuns

    from gigatok_ds.config.deepspeed import zero_settings

    runs = LayoutRuns(tmp_path)
    seen = {}
    for tensor in (1, 2):
        recipe = runs.recipe("tokenizer", Layout(tensor=tensor), "training.steps=4")
        seen[tensor] = run_ranks(images_of_a_whole_run, tensor, recipe, tmp_path / str(tensor), zero_settings(1))
    # Four steps of eight; the discriminator starts at the fourth, where it judges two images of a kind for the
    # generator, and three for itself.
    assert seen == {1: [(32, 40)], 2: [(16, 20), (16, 20)]}


def spread(sabotage):
    """Build a network at ZeRO-3 over two tensor ranks with one thing wrong; the error, or None."""
    import deepspeed
    from small_models import small_gpt_config

    from gigatok_ds.engine import engine
    from gigatok_ds.models.gpt import GPT
    from gigatok_ds.parallel.consistency import LayoutError, check_spread

    topology = start_process_group(tensor_size=2)
    engine._prepare()
    settings = {"train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    group = None if sabotage == "group" else topology.data_group
    with deepspeed.zero.Init(config_dict_or_path=settings, mpu=topology.mpu, data_parallel_group=group):
        network = GPT(small_gpt_config(), topology.layers)
    initialise_(network, 0, full=lambda p: deepspeed.zero.GatheredParameters(p, modifier_rank=0),
                tensor_rank=topology.tensor_rank, tensor_size=2)
    if sabotage == "mark":
        del network.layers[1].feed_forward.w2.weight.tensor_model_parallel
    if sabotage == "replica":
        with deepspeed.zero.GatheredParameters(network.norm.weight, modifier_rank=0):
            network.norm.weight.data[3] += 1e-3 * topology.tensor_rank
    try:
        check_spread(network, topology, deepspeed.zero.GatheredParameters)
    except LayoutError as error:
        return str(error)
    return None


@pytest.mark.parametrize("sabotage, words", [
    (None, None),
    ("mark", "layers.1.feed_forward.w2.weight is cut over tensor ranks but has lost its mark"),
    ("replica", "norm.weight (and 0 more) should be alike on all tensor ranks"),
    ("group", "is partitioned over ranks [0, 1], not over its data ranks"),
])
def test_what_would_train_wrongly_is_caught(sabotage, words):
    for message in run_ranks(spread, 2, sabotage):
        assert message is None if words is None else words in message


def test_layouts_that_cannot_be_are_refused():
    check_layout(8, 4, 2)
    with pytest.raises(InputError, match=r"parallel.tensor is 3, which does not divide the 8 ranks"):
        check_layout(8, 8, 3)
    with pytest.raises(InputError, match="each host runs 2 ranks: a tensor group must lie within one host"):
        check_layout(8, 2, 4)
