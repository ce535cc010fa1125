"""One training step of a tokenizer with every loss on, in fp32: on the GPU, and on the CPU with plain torch operators.
"""

from __future__ import annotations

import os

import torch
from tokenizer_step import images_of
from torch import Tensor, nn

from acceptance.findings import Findings
from acceptance.section import Setting
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.recipe import TokenizerRecipe
from gigatok_ds.losses.composition import build_discriminator, build_objective
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.dropout import name_dropouts
from gigatok_ds.parallel.topology import single_process
from gigatok_ds.precision import float32_arithmetic
from gigatok_ds.training.tokenizer_step import TokenizerStep

TOLERANCE = 1e-4  # relative; a loss or norm below 0.1 counts as 0.1
STEP = 5
EVERY_LOSS = ["training.precision=fp32", "training.global_batch_size=2", "loss.perceptual.weights=random",
              "loss.semantic.weights=random", "loss.quantizer.entropy=0.01", "loss.adversarial.start_step=1",
              "loss.adversarial.adaptive_weight=true", "loss.auxiliary.end_step=100"]
SMALL = ["model.image_size=64", "model.latent_tokens=16", "model.encoder={width: 64, layers: 2, heads: 2}",
         "model.decoder={width: 64, layers: 2, heads: 2}", "model.semantic_head=null", "loss.semantic=null",
         "model.cnn={base_channels: 32, encoder_multipliers: [1, 1, 1], decoder_multipliers: [1, 1, 1], "
         "residual_blocks: 1}"]


@float32_arithmetic()
def run(setting: Setting, found: Findings) -> None:
    changes = [change for change in EVERY_LOSS if not (setting.quick and change.startswith("loss.semantic"))]
    recipe = load_recipe("VQ_SS256", changes + SMALL * setting.quick)
    ours = passes(recipe, torch.device(setting.device))
    os.environ["GIGATOK_KERNELS"] = "torch"
    expected = passes(recipe, torch.device("cpu"))
    found.check("both have the same losses and gradients", ours.keys() == expected.keys(), ", ".join(sorted(expected)))
    for name in sorted(ours.keys() & expected.keys()):
        error = abs(ours[name] - expected[name]) / max(abs(expected[name]), 0.1)
        found.check(name, error <= TOLERANCE,
                    f"{ours[name]:.7g}, on the CPU {expected[name]:.7g}: {error:.1e} off, bound {TOLERANCE:g}")


def passes(recipe: TokenizerRecipe, device: torch.device) -> dict[str, float]:
    """Losses of a step's forward passes, and the length of each network's gradient."""
    generator = initialise_(Tokenizer(recipe.model), recipe.training.seed).to(device)
    torch.manual_seed(0)
    judge = build_discriminator(recipe.loss.adversarial, image_size=recipe.model.image_size).to(device)
    objective = build_objective(recipe.loss, device=device, grid=recipe.model.grid, precision="fp32")
    networks = {"generator": generator, "discriminator": judge}
    for network in networks.values():
        name_dropouts(network)
    step = TokenizerStep(recipe, single_process(device), Bare(generator), Bare(judge), objective, accumulation=1)
    count = recipe.training.global_batch_size
    logged = step.train(images_of(recipe, device), torch.arange(count), STEP)
    found = {name: float(value.detach())
             for name, value in logged.items() if name.startswith(("loss/", "discriminator/"))}
    return found | {f"gradient of the {name}": gradient_length(network) for name, network in networks.items()}


def gradient_length(network: nn.Module) -> float:
    gradients = [parameter.grad.double().square().sum() for parameter in network.parameters() if parameter.grad is
                 not None]
    return float(torch.stack(gradients).sum().sqrt())


class Bare:
    """A network where a step expects an engine."""

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, *inputs, **options):
        return self.network(*inputs, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
