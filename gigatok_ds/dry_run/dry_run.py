"""One micro batch of a recipe on tensors without storage: what it keeps alive, sends to its tensor group and launches.

It is the training's own code that runs, with the shapes of one tensor rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from gigatok_ds.config.losses import TokenizerLossConfig
from gigatok_ds.config.recipe import GPTRecipe, Recipe, TokenizerRecipe
from gigatok_ds.dry_run.compiled import CompiledBlock, block_of, passes_of, signature_of
from gigatok_ds.dry_run.dry_run_result import MicroBatch, Shapes
from gigatok_ds.dry_run.floor import Floor
from gigatok_ds.dry_run.meta_layers import MetaTPLayers, TensorTraffic
from gigatok_ds.dry_run.meter import BlockPass, Meter
from gigatok_ds.dry_run.work import Operation, Work
from gigatok_ds.engine.compilation import parts_of
from gigatok_ds.losses.composition import TokenizerObjective, build_discriminator, build_objective
from gigatok_ds.models.frozen.pretrained_files import RANDOM
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.models.tuning import tune_
from gigatok_ds.parallel.dropout import dropout_at, name_dropouts
from gigatok_ds.parallel.layers import PLAIN, Layers
from gigatok_ds.parallel.partial import is_partial
from gigatok_ds.parallel.recompute import recompute_
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.precision import PRECISIONS
from gigatok_ds.training.tokenizer_step import TokenizerStep

META = torch.device("meta")


def layers_of(recipe: Recipe) -> Layers:
    tensor = recipe.parallel.tensor
    return MetaTPLayers(tensor, sequence_parallel=recipe.parallel.sequence) if tensor > 1 else PLAIN


def without_files(loss: TokenizerLossConfig) -> TokenizerLossConfig:
    """The same terms with random weights in frozen networks: a plan needs their shapes only."""
    perceptual = loss.perceptual and dataclasses.replace(loss.perceptual, weights=RANDOM)
    semantic = loss.semantic and dataclasses.replace(loss.semantic, weights=RANDOM)
    adversarial = loss.adversarial
    if adversarial and adversarial.discriminator == "dino":
        adversarial = dataclasses.replace(adversarial, backbone_weights=RANDOM)
    return dataclasses.replace(loss, perceptual=perceptual, semantic=semantic, adversarial=adversarial)


def build_trained(recipe: Recipe, layers: Layers) -> dict[str, nn.Module]:
    """The networks that are trained, on the current device: of a tokenizer's recipe, `generator` and `discriminator`.
    """
    model = GPT(recipe.model, layers) if isinstance(recipe, GPTRecipe) else Tokenizer(recipe.model, layers)
    tune_(model, recipe.training, layers)
    if isinstance(recipe, GPTRecipe):
        return {"gpt": model}
    adversarial = without_files(recipe.loss).adversarial
    if not adversarial:
        return {"generator": model}
    discriminate = build_discriminator(adversarial, layers, image_size=recipe.model.image_size)
    return {"generator": model, "discriminator": discriminate}


def objective_of(recipe: Recipe) -> TokenizerObjective | None:
    """The objective of a tokenizer's recipe, its frozen networks without storage."""
    if isinstance(recipe, GPTRecipe):
        return None
    return _objective(without_files(recipe.loss), recipe.model.grid, recipe.training.precision)


@functools.cache
def _objective(loss: TokenizerLossConfig, grid: int, precision: str) -> TokenizerObjective:
    """Built once: it takes longer than to run it, and nothing changes it."""
    with META:
        return build_objective(loss, device=META, grid=grid, precision=precision)


def shapes_of(recipe: Recipe) -> Shapes:
    with META:
        networks = build_trained(recipe, layers_of(recipe))
    objective = objective_of(recipe)
    trained = {name: [parameter.numel() for parameter in network.parameters() if parameter.requires_grad]
               for name, network in networks.items()}
    frozen = {}
    for name in ("teacher", "perceptual"):
        part = getattr(objective, name, None)
        if part is not None:
            frozen[name] = _bytes_of(part)
    still = {name: [parameter.numel() for parameter in network.parameters() if not parameter.requires_grad]
             for name, network in networks.items()}
    if backbone := sum(still.pop("discriminator", ())):
        frozen["the discriminator's backbone"] = 4 * backbone
    buffers = sum(buffer.nbytes for network in networks.values() for buffer in network.buffers())
    return Shapes(trained=trained, buffers=buffers, frozen=frozen,
                  frozen_parts={name: sizes for name, sizes in still.items() if sizes})


def _bytes_of(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])


class Rehearsal:
    """The networks of a recipe's training, as one tensor rank has them, without storage.

    compiled: what `training.compile` compiles on a GPU counts as it is compiled (dry_run.compiled). floor: is fed with
    what runs.
    """

    def __init__(self, recipe: Recipe, *, compiled: bool = False, floor: Floor | None = None):
        self.recipe, self.compiled = recipe, compiled
        self.layers = layers_of(recipe)
        self.traffic = getattr(self.layers, "traffic", TensorTraffic(1))
        self.meter = Meter(floor)
        with META:
            trained = build_trained(recipe, self.layers)
        self.objective = objective_of(recipe)
        self.blocks: dict[Hashable, CompiledBlock] = {}
        for name, network in trained.items():
            if compiled and name != "discriminator":
                self._compile(network)
            if name != "discriminator":
                recompute_(network, every_block=recipe.parallel.recompute_every,
                           cnn=getattr(recipe.parallel, "recompute_cnn", False))
        self.trained = {name: _trained(network, PRECISIONS[recipe.training.precision])
                        for name, network in trained.items()}
        if recipe.parallel.tensor > 1:
            self._count_partial_gradients()
        self.engines = {name: _BareEngine(network, self.meter) for name, network in self.trained.items()}

    def _compile(self, network: nn.Module) -> None:
        """Where training.compile compiles: inside of what recomputes."""
        for block in parts_of(network):
            block.forward = functools.partial(self._run_block, block, block.forward)

    @contextlib.contextmanager
    def _compiled_objective(self) -> Iterator[None]:
        """Within, the parts of frozen networks that are compiled: they are shared with other rehearsals."""
        parts = parts_of(self.objective) if self.compiled and self.objective else []
        for part in parts:
            part.forward = functools.partial(self._run_block, part, part.forward)
        try:
            yield
        finally:
            for part in parts:
                del part.forward

    def _run_block(self, block: nn.Module, forward, *arguments, **options):
        described = block_of(block, forward, arguments, options)
        signature = signature_of(described)
        self.blocks.setdefault(signature, described)
        with self.meter.inside(signature):
            return forward(*arguments, **options)

    def _count_partial_gradients(self) -> None:
        """What is sent to sum what tensor ranks know of a parameter's gradient by their part of the data only."""
        for network in self.trained.values():
            for parameter in network.parameters():
                if is_partial(parameter) and parameter.requires_grad:
                    parameter.register_hook(self.traffic.all_reduce)

    def micro_batch(self, samples: int, step: int) -> MicroBatch:
        """A micro batch of so many samples of a data rank, in the 1-based `step`. Once only."""
        return self.as_compiled(self.run(samples, step), samples)

    def run(self, samples: int, step: int) -> MicroBatch:
        """As `micro_batch`, with compiled blocks still to be counted by `as_compiled`."""
        # What says which values dropouts keep is made once, some bytes for each, and is there before.
        with dropout_at(self.recipe.training.seed, torch.zeros(1, dtype=torch.int64, device=META)):
            pass
        with self.meter, self._compiled_objective():
            for network in [*self.trained.values(), *filter(None, [self.objective])]:
                self.meter.ignore([*network.parameters(), *network.buffers()])
            if isinstance(self.recipe, TokenizerRecipe):
                self._tokenizer(self.recipe, samples, step)
            else:
                self._gpt(self.recipe, samples)
        return self.so_far()._replace(kept=self.meter.peak)

    def so_far(self) -> MicroBatch:
        """What has been counted until now; kept is what is alive now."""
        meter = self.meter
        return MicroBatch(kept=meter.alive, flops=meter.flops, model=meter.model, sent=self.traffic.total,
                          work=Work(cast("Counter[Operation]", meter.calls)))  # blocks among them: see `as_compiled`

    def as_compiled(self, found: MicroBatch, samples: int) -> MicroBatch:
        """The micro batch with the kernels that compiled blocks run."""
        total, sent = Work(), self.traffic.sent.copy()
        for call, count in cast("dict[Operation | BlockPass, float]", found.work.calls).items():
            if isinstance(call, BlockPass):
                numbers = torch.zeros(samples, dtype=torch.int64, device=META)
                with dropout_at(0, numbers, numbers[:samples // self.recipe.parallel.tensor]):
                    block = self.blocks[call.signature]
                    work = passes_of(call.signature, block)[call.backward]
                    frozen = not any(parameter.requires_grad for parameter in block.module.parameters())
                    total += count * (work.of_group("frozen networks") if frozen else work)
            else:
                total += Work({call: count})
        self.traffic.sent = sent  # of what was traced again
        return found._replace(work=total)

    def _tokenizer(self, recipe: TokenizerRecipe, samples: int, step: int) -> None:
        assert self.objective is not None
        tensor, size = recipe.parallel.tensor, recipe.model.image_size
        topology = _LocalTopology(rank=0, world_size=tensor, device=META, data_rank=0, data_size=1,
                                  tensor_size=tensor, layers=self.layers)
        passes = TokenizerStep(recipe, topology, self.engines["generator"], self.engines.get("discriminator"),
                               self.objective, accumulation=1)
        own = samples // tensor
        passes.train(torch.empty(own, 3, size, size, device=META), torch.zeros(own, dtype=torch.int64), step)

    def _gpt(self, recipe: GPTRecipe, samples: int) -> None:
        config, engine = recipe.model, self.engines["gpt"]
        codes = torch.zeros((samples, config.sequence_length), dtype=torch.int64, device=META)
        with dropout_at(recipe.training.seed, codes[:, 0]):
            engine.backward(engine(codes[:, :-1], codes[:, 0], codes).mean())
        # Logits, which are computed again in any case: see parallel.cross_entropy.
        self.meter.model -= (
            2 * codes.numel() * config.transformer.width * config.vocab_size // recipe.parallel.tensor
        )


def _trained(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in the training's type; gradients are gone when they are complete: they are counted elsewhere."""
    network.to(dtype).train()
    name_dropouts(network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget)
    return network


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None


class _BareEngine:
    """A network where an engine is expected. What it computes counts as the model's: its own passes, and passes through
    it to gradients of its input, as a discriminator has them."""

    def __init__(self, network: nn.Module, meter: Meter):
        self.network, self.meter = network, meter
        network.register_forward_pre_hook(self._looked_through)
        network.register_forward_hook(self._was_looked_through)

    def __call__(self, *inputs, **options):
        self.meter.of_model = True
        output = self.network(*inputs, **options)
        self.meter.of_model = False
        return output

    def backward(self, loss: Tensor) -> None:
        self.meter.of_model = True
        loss.backward()
        self.meter.of_model = False

    def _is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.network.parameters())

    def _looked_through(self, network: nn.Module, inputs: tuple) -> None:
        if self._is_frozen():
            self.meter.of_model = True
            inputs[0].register_hook(lambda gradient: self._note(False))

    def _was_looked_through(self, network: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._is_frozen():
            self.meter.of_model = False
            output.register_hook(lambda gradient: self._note(True))

    def _note(self, of_model: bool) -> None:
        self.meter.of_model = of_model


class _LocalTopology(Topology):
    """A tensor rank that makes up what others would send."""

    def gather_data(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_images(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * self.tensor_size) if self.tensor_size > 1 else tensor

    def mean_over_ranks(self, tensor: Tensor) -> Tensor:
        return tensor
