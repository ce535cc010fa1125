"""The layout that a recipe should be trained in on a cluster, and what it will take."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings
from gigatok_ds.config.recipe import GPTRecipe, ParallelConfig, Recipe, TokenizerParallelConfig, TokenizerRecipe
from gigatok_ds.dry_run.dry_run_result import MicroBatch, MuonWork, Shapes
from gigatok_ds.errors import InputError
from gigatok_ds.planning.cluster import Cluster
from gigatok_ds.planning.phases import fullest, longest, phases_of
from gigatok_ds.planning.plan_cache import matrices, micro_batch, shapes
from gigatok_ds.planning.rank_memory import Memory, memory_of
from gigatok_ds.planning.speed import Assumptions, StepTime, Traffic, Update, step_time, traffic_of

NOTHING, BLOCKS, EVERYTHING = "nothing", "transformer blocks", "transformer blocks and CNN"
REHEARSED = 8  # samples of the micro batch that all others are scaled from: what does not grow with them is small


@dataclass(frozen=True, kw_only=True)
class PlannedLayout:
    """How a recipe is spread: tensor ranks (with sequence parallelism or not), ZeRO stage, micro batch of a data rank,
    and whose activations are computed again."""

    tensor: int
    sequence: bool
    stage: int
    micro: int
    recompute: str

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Raises InputError where it does not fit."""
        recipe = replace(recipe, training=replace(recipe.training, micro_batch_size=self.micro))
        spread: dict[str, Any] = {"tensor": self.tensor, "sequence": self.sequence,
                                  "recompute_every": int(self.recompute != NOTHING)}
        if isinstance(recipe, GPTRecipe):
            return replace(recipe, parallel=replace(recipe.parallel, **spread))
        spread["recompute_cnn"] = self.recompute == EVERYTHING
        return replace(recipe, parallel=replace(recipe.parallel, **spread))

    def arguments(self, recipe: Recipe) -> list[str]:
        """The arguments of gigatok-ds train that ask for this layout."""
        found = [f"--zero={self.stage}", f"parallel.tensor={self.tensor}",
                 f"parallel.sequence={str(self.sequence).lower()}",
                 f"parallel.recompute_every={int(self.recompute != NOTHING)}",
                 f"training.micro_batch_size={self.micro}"]
        if isinstance(recipe, TokenizerRecipe):
            found.append(f"parallel.recompute_cnn={str(self.recompute == EVERYTHING).lower()}")
        return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a layout takes of each rank."""

    layout: PlannedLayout
    accumulation: int
    data_ranks: int
    memory: Memory
    usable: float
    traffic: Traffic
    time: StepTime
    micro: MicroBatch

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable


class Planner:
    """Plans for one recipe on one cluster. What is rehearsed is rehearsed once.

    tensor and stage are what `recommended` may choose from; None: anything.
    """

    def __init__(self, recipe: Recipe, cluster: Cluster, assumptions: Assumptions, *, tensor: int | None = None,
                 stage: int | None = None):
        self.recipe, self.cluster, self.assumptions = recipe, cluster, assumptions
        self.tensor, self.stage = tensor, stage
        self.phases = phases_of(recipe)
        self._shapes: dict[tuple, Shapes] = {}
        self._muon: dict[int, MuonWork] = {}
        self._rehearsed: dict[tuple, dict[int, MicroBatch]] = {}

    @functools.cached_property
    def model_flops(self) -> int:
        """FLOPs of the trained networks in one step, all ranks together, as monitoring.flops counts them."""
        one = PlannedLayout(tensor=1, sequence=False, stage=1, micro=REHEARSED, recompute=NOTHING)
        per_sample = self._micro_batches(one)[longest(self.phases).step].model / REHEARSED
        return round(per_sample * self.recipe.training.global_batch_size)

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled; on CPUs they are counted as if they were not."""
        return self.recipe.training.compile != "none" and self.cluster.device.is_gpu

    @property
    def usable(self) -> float:
        """Bytes of a GPU that training can fill."""
        return self.cluster.device.memory * self.assumptions.memory - self.assumptions.reserved

    def plan(self, layout: PlannedLayout, found: MicroBatch | None = None) -> Plan:
        """What `layout` takes, or would if all its micro batches took what was `found` of one. Raises InputError for a
        layout that the recipe or the cluster cannot have."""
        recipe, data = layout.applied_to(self.recipe), self._data_ranks(layout.tensor)
        settings, _ = resolve_deepspeed(zero_settings(layout.stage), recipe, data_parallel_size=data)
        zero, accumulation = settings["zero_optimization"], settings["gradient_accumulation_steps"]
        last = longest(self.phases).step
        by_step = {last: found} if found else self._micro_batches(layout)
        networks = self._shapes_of(recipe, layout.tensor, layout.sequence)
        elements = networks.elements
        micro = by_step[last]
        traffic = traffic_of(micro, cluster=self.cluster, tensor=layout.tensor, accumulation=accumulation, zero=zero,
                             half=recipe.training.precision != "fp32", elements=elements)
        muon = self._muon_of(recipe, layout.tensor)
        if self.cluster.ranks > 1:
            traffic = replace(traffic, matrices=muon.sent(stage=layout.stage, data_ranks=data,
                                                          half=recipe.training.precision != "fp32"))
        update = Update(precision=recipe.training.precision, stage=layout.stage, elements=elements,
                        own_elements=elements / (data if layout.stage else 1),
                        average=recipe.training.ema_decay is not None, muon=muon)
        time = step_time(micro, traffic, update, cluster=self.cluster, accumulation=accumulation,
                         assumptions=self.assumptions)
        memory = memory_of(recipe, networks, max(each.kept for each in by_step.values()), zero=zero, data_ranks=data,
                           muon=muon)
        return Plan(layout=layout, accumulation=accumulation, data_ranks=data, memory=memory, usable=self.usable,
                    traffic=traffic, time=time, micro=micro)

    def recommended(self) -> Plan:
        """The fastest layout that fits. Of those within 3 % of it, the plainest.

        Raises InputError when nothing fits, with the least that was needed.
        """
        fitting, least = [], None
        for tensor in self._tensor_sizes():
            for recompute in self.recompute_choices:
                plans = list(self._of(tensor, recompute))
                least = min([*plans, *([least] if least else [])], key=lambda plan: plan.memory.peak)
                fitting += [plan for plan in plans if plan.fits]
                if any(plan.fits and (plan.accumulation == 1 or not plan.time.launch_bound) for plan in plans):
                    break  # computing more again could only take longer
            if fitting:
                break  # more tensor ranks would only send more
        if least is None:
            raise InputError(f"no layout of {self.recipe.name} fits {self.cluster.ranks} ranks: its global batch of "
                             f"{self.recipe.training.global_batch_size} cannot be spread over them; change "
                             "training.global_batch_size or the cluster")
        if not fitting:
            raise InputError(
                f"{self.recipe.name} does not fit {self.cluster}: at least {least.memory.peak / 1e9:.1f} GB are "
                f"needed, and {self.usable / 1e9:.1f} GB can be used; take more or larger GPUs"
            )
        fastest = min(plan.time.seconds for plan in fitting)
        near = [plan for plan in fitting if plan.time.seconds <= 1.03 * fastest]
        again = self.recompute_choices.index
        return min(near, key=lambda plan: (plan.layout.tensor, again(plan.layout.recompute), plan.layout.stage,
                                           plan.accumulation))

    def choices(self, plan: Plan) -> list[Plan]:
        """The same layout with each choice of what is computed again."""
        return [self.plan(replace(plan.layout, recompute=recompute)) for recompute in self.recompute_choices]

    def parameters(self) -> dict[str, int]:
        """How many parameters each trained network has, on all tensor ranks together."""
        plain: Recipe
        if isinstance(self.recipe, GPTRecipe):
            plain = replace(self.recipe, parallel=ParallelConfig())
        else:
            plain = replace(self.recipe, parallel=TokenizerParallelConfig())
        return {name: sum(sizes) for name, sizes in self._shapes_of(plain, 1, False).trained.items()}

    def _of(self, tensor: int, recompute: str) -> Iterator[Plan]:
        """Every ZeRO stage with the largest micro batch that fits (the smallest if none does)."""
        # In half precision stage 0 is less precise, and only larger.
        stages = range(self.recipe.training.precision != "fp32", 4) if self.stage is None else [self.stage]
        for stage in stages:
            plan = None
            for micro in self._micro_sizes(tensor):
                layout = PlannedLayout(tensor=tensor, sequence=self._sequence(tensor), stage=stage, micro=micro,
                                       recompute=recompute)
                plan = self.plan(layout)
                if plan.fits:
                    break
            if plan is not None:
                yield plan

    @property
    def recompute_choices(self) -> tuple[str, ...]:
        return (NOTHING, BLOCKS, EVERYTHING) if isinstance(self.recipe, TokenizerRecipe) else (NOTHING, BLOCKS)

    def _data_ranks(self, tensor: int) -> int:
        if self.cluster.per_host % tensor:
            raise InputError(f"{tensor} tensor ranks do not divide the {self.cluster.per_host} GPUs of a host")
        return self.cluster.ranks // tensor

    def _tensor_sizes(self) -> list[int]:
        if self.tensor is not None:
            self._data_ranks(self.tensor)
            PlannedLayout(tensor=self.tensor, sequence=False, stage=1, micro=1,
                          recompute=NOTHING).applied_to(self.recipe)
            return [self.tensor] if self._micro_sizes(self.tensor) else []
        return [size for size in (1, 2, 4, 8) if self.cluster.per_host % size == 0
                and self._possible(size, sequence=False)
                and self._micro_sizes(size)]

    def _possible(self, tensor: int, *, sequence: bool) -> bool:
        try:
            PlannedLayout(tensor=tensor, sequence=sequence, stage=1, micro=1, recompute=NOTHING).applied_to(self.recipe)
        except InputError:
            return False
        return True

    def _sequence(self, tensor: int) -> bool:
        return tensor > 1 and self._possible(tensor, sequence=True)

    def _micro_sizes(self, tensor: int) -> list[int]:
        """Micro batches of a data rank that can be, the largest first."""
        batch, data = self.recipe.training.global_batch_size, self.cluster.ranks // tensor
        unit = self._unit(tensor)
        if batch % data:
            return []
        share = batch // data
        return [micro for micro in range(share, 0, -1) if share % micro == 0 and micro % unit == 0]

    def _unit(self, tensor: int) -> int:
        """What a micro batch must be a multiple of, as config.deepspeed sees to: the DINO discriminator norms over 8
        images.
        """
        if not isinstance(self.recipe, TokenizerRecipe):
            return 1
        adversarial = self.recipe.loss.adversarial
        return tensor * (8 if adversarial and adversarial.discriminator == "dino" and tensor > 1 else 1)

    def _shapes_of(self, recipe: Recipe, *split) -> Shapes:
        """split: tensor ranks, and whether they are sequence parallel."""
        if split not in self._shapes:
            self._shapes[split] = shapes(recipe)
        return self._shapes[split]

    def _muon_of(self, recipe: Recipe, tensor: int) -> MuonWork:
        if tensor not in self._muon:
            self._muon[tensor] = matrices(recipe)
        return self._muon[tensor]

    def _micro_batches(self, layout: PlannedLayout) -> dict[int, MicroBatch]:
        """A micro batch of each phase that counts, by its step."""
        samples = max(REHEARSED, self._unit(layout.tensor))
        key = (layout.tensor, layout.sequence, layout.recompute)
        if key not in self._rehearsed:
            recipe = replace(layout, micro=samples).applied_to(self.recipe)
            self._rehearsed[key] = {step: micro_batch(recipe, samples, step, compiled=self.compiled) for step
                                    in self.steps}
        return {step: found.of_samples(layout.micro / samples) for step, found in self._rehearsed[key].items()}

    @property
    def steps(self) -> list[int]:
        """The first of each phase that counts: for memory, or as most steps are."""
        return sorted({phase.step for phase in [*fullest(self.phases), longest(self.phases)]})
