"""Floating-point operations of a training step, counted by running its networks without storage.

What is counted are the products and sums of matrix products, convolutions and attention (2 for each pair, as torch's
own FlopCounterMode counts), and the quantizer's distances; nothing element by element. Attention counts as its two
matrix products forward and four backward, whatever a fused kernel computes again. The count is of one process that
holds whole layers: how a step is spread over ranks does not change it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from gigatok_ds.checkpoint.original import build_on_meta
from gigatok_ds.config.recipe import GPTRecipe, TokenizerRecipe
from gigatok_ds.losses.adaptive import kernel_gradient
from gigatok_ds.losses.composition import TokenizerObjective, build_discriminator
from gigatok_ds.models.tuning import tune_
from gigatok_ds.monitoring.meta_cache import called
from gigatok_ds.parallel.recompute import recompute_
from gigatok_ds.streams import SampleDraws, torch_stream


class StepFlops(NamedTuple):
    """Operations of one optimizer step, all ranks together.

    model: of the trained networks (a discriminator's frozen backbone included), forward and backward; hardware: also of
    frozen networks, and of what the backward pass computes again.
    """

    model: int
    hardware: int


def own_formulas(*, again: bool) -> dict[Callable, Callable]:
    """Operations of what torch's counter does not know; `again` also counts distances that the entropy term's backward
    pass computes again."""

    def distances(latents: torch.Size, codebook: torch.Size, *more, out_shape) -> int:
        return 2 * latents[0] * codebook[0] * latents[1]

    def gradients(latents: torch.Size, codebook: torch.Size, *more, out_shape) -> int:
        return (3 if again else 2) * distances(latents, codebook, out_shape=out_shape)

    def accumulated(total: torch.Size, a: torch.Size, b: torch.Size, *more, out_shape) -> int:
        return 2 * a[0] * a[1] * b[1]

    ours = torch.ops.gigatok
    return {torch.ops.aten.addmm_: accumulated,  # torch's counter knows it only out of place
            ours.nearest_code: distances, ours.assignment_statistics: distances, ours.assignment_gradients: gradients}


class Counted(NamedTuple):
    """Operations of a pass: once, and with distances that are computed again, as for `own_formulas`."""

    once: int
    again: int


def counted(run: Callable[[], object]) -> Counted:
    eager = torch.compiler.set_stance("force_eager")
    with eager, sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        run()
    return Counted(*counter.totals)


class _Counter(TorchDispatchMode):
    """As torch's FlopCounterMode counts, in a fraction of its time."""

    def __init__(self):
        super().__init__()
        self.formulas = [flop_registry | {operator: shape_wrapper(formula) for operator, formula in own.items()}
                         for own in (own_formulas(again=False), own_formulas(again=True))]
        self.totals = [0, 0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = called(function, args, kwargs)
        for number, formulas in enumerate(self.formulas):
            if formula := formulas.get(function._overloadpacket):
                self.totals[number] += formula(*args, **kwargs, out_val=result)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and asking would import the compiler


class TokenizerFlops:
    """A tokenizer's steps, with whatever is active in them; counted once for each phase of the recipe."""

    def __init__(self, recipe: TokenizerRecipe, objective: TokenizerObjective, images: int, device: torch.device):
        """images: of one micro batch of one rank, for which the passes are counted."""
        self.recipe, self.objective, self.images, self.device = recipe, objective, images, device
        self._known: dict[tuple, StepFlops] = {}
        self._passes: dict[tuple, Counted] = {}
        self._image_passes: dict[bool, int] = {}

    def of_step(self, step: int) -> StepFlops:
        """The operations of the 1-based step."""
        wants = self.recipe.loss
        phase = (wants.wants_entropy(step), wants.wants_direct_reconstruction(step), wants.discriminator_active(step))
        if phase not in self._known:
            self._known[phase] = self._count(*phase, step)
        return self._known[phase]

    def _count(self, entropy: str | None, direct: bool, discriminated: bool, step: int) -> StepFlops:
        sides, parts = 1 + direct, (entropy, direct)
        if parts not in self._passes:
            self._passes[parts] = self._tokenizer(*parts)
        tokenizer, again = self._passes[parts]
        discriminate = self._discriminate(sides) if discriminated else 0
        if direct not in self._image_passes:
            self._image_passes[direct] = self._image_losses(direct, step)
        frozen = self._image_passes[direct] + self._teacher
        adversarial = self.recipe.loss.adversarial
        if discriminated and adversarial and adversarial.adaptive_weight:
            frozen += 2 * sides * self._last_layer()
        passes = self.recipe.training.global_batch_size / self.images
        return StepFlops(model=round(passes * (tokenizer + discriminate)),
                         hardware=round(passes * (again + discriminate + frozen)))

    def _tokenizer(self, entropy: str | None, direct: bool) -> Counted:
        """Operations of what is computed once, and of all that is computed."""
        found, parallel = counted(lambda: self._generator(entropy, direct)), self.recipe.parallel
        if not (parallel.recompute_every or parallel.recompute_cnn):
            return found
        return found._replace(again=counted(lambda: self._generator(entropy, direct, recompute=True)).again)

    def _generator(self, entropy: str | None, direct: bool, *, recompute: bool = False) -> None:
        network, parallel = build_on_meta(self.recipe.model).train(), self.recipe.parallel
        tune_(network, self.recipe.training)
        if recompute:
            recompute_(network, every_block=parallel.recompute_every, cnn=parallel.recompute_cnn)
        output = network(self._batch(), entropy=entropy, semantic=self.recipe.loss.semantic is not None, direct=direct)
        parts = [output.reconstruction, output.direct_reconstruction, output.semantic_feature, output.decoded_feature]
        total = sum([part.sum() for part in parts if part is not None], sum(output.quantizer_losses))
        assert isinstance(total, Tensor)
        total.backward()

    def _discriminate(self, sides: int) -> int:
        """The discriminator as a judge of reconstructions, and its own pass over these and the images."""
        judging, own = self._discriminator_passes
        return sides * judging + (1 + sides) * own

    @functools.cached_property
    def _discriminator_passes(self) -> tuple[int, int]:
        adversarial = self.recipe.loss.adversarial
        assert adversarial is not None, "there is no discriminator"
        with torch.device("meta"):
            network = build_discriminator(adversarial, image_size=self.recipe.model.image_size).train()
        draws = SampleDraws(torch_stream(0, "flops"), self.images, torch.arange(self.images))
        own = counted(lambda: network(self._batch(), draws).sum().backward()).once
        network.requires_grad_(False)
        return counted(lambda: network(self._batch(gradient=True), draws).sum().backward()).once, own

    def _image_losses(self, direct: bool, step: int) -> int:
        """What the image losses look through: the networks of this run, shown stand-ins for images."""

        def run() -> None:
            with FakeTensorMode(allow_non_fake_inputs=True):
                images, *made = (self._batch(self.device, gradient=number > 0) for number in range(2 + direct))
                terms = self.objective.image_terms(images, made[0], made[1] if direct else None, lambda x: x, step)
                total = sum(terms.values())
                assert isinstance(total, Tensor)  # there is always a reconstruction
                total.backward()

        return counted(run).once

    @functools.cached_property
    def _teacher(self) -> int:
        """This run's, shown stand-ins for images; 0 without one."""
        teacher = self.objective.teacher
        if teacher is None:
            return 0

        def run() -> None:
            with FakeTensorMode(allow_non_fake_inputs=True):
                teacher(self._batch(self.device))

        return counted(run).once

    def _last_layer(self) -> int:
        """The weight gradient of the CNN decoder's last layer, for the adaptive weight."""
        layer = build_on_meta(self.recipe.model).cnn_decoder.conv_out
        gradient = self._batch()
        inputs = gradient.new_empty((self.images, layer.in_channels, *gradient.shape[2:]))
        return counted(lambda: kernel_gradient(layer, [(inputs, gradient)])).once

    def _batch(self, device: torch.device | str = "meta", *, gradient: bool = False) -> Tensor:
        size = self.recipe.model.image_size
        return torch.empty((self.images, 3, size, size), device=device, requires_grad=gradient)


class GPTFlops:
    """A GPT's steps, all of which are alike."""

    def __init__(self, recipe: GPTRecipe):
        self.recipe = recipe
        self._known: StepFlops | None = None

    def of_step(self, step: int) -> StepFlops:
        self._known = self._known or self._count()
        return self._known

    def _count(self) -> StepFlops:
        once, again = (counted(partial(self._pass, recompute)).once for recompute in (False, True))
        sequences, config = self.recipe.training.global_batch_size, self.recipe.model
        # The backward pass computes the logits again in any case: see parallel.cross_entropy.
        logits = 2 * config.sequence_length * config.transformer.width * config.vocab_size
        return StepFlops(model=sequences * (once - logits), hardware=sequences * again)

    def _pass(self, recompute: bool) -> None:
        network, config = build_on_meta(self.recipe.model).train(), self.recipe.model
        with torch.device("meta"):
            tune_(network, self.recipe.training)
        if recompute:
            recompute_(network, every_block=self.recipe.parallel.recompute_every)
        codes = torch.empty((1, config.sequence_length), dtype=torch.int64, device="meta")
        network(codes[:, :-1], codes[:, 0], codes).sum().backward()
