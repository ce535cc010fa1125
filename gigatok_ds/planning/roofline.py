"""A step as a GPU would take it, operation by operation: where its time goes, and how near that is to the least it
could take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gigatok_ds.config.recipe import Recipe
from gigatok_ds.dry_run.by_layers import rehearse
from gigatok_ds.dry_run.dry_run import Rehearsal
from gigatok_ds.dry_run.floor import Floor
from gigatok_ds.dry_run.work import GROUPS, GroupShare, Operation, Rates
from gigatok_ds.planning.cluster import Cluster
from gigatok_ds.planning.phases import Phase
from gigatok_ds.planning.planner import NOTHING, Plan, PlannedLayout, Planner
from gigatok_ds.planning.speed import Assumptions


@dataclass(frozen=True, kw_only=True)
class Offender:
    """Code that costs time beyond its products. lost: seconds of a step, less those of its FLOPs at their stated rate.
    """

    source: str
    names: tuple[str, ...]
    lost: float
    bytes: float
    calls: float


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A step of a layout in one phase. model: FLOPs of the trained networks in a micro batch of a rank; floor: seconds,
    see dry_run.floor; peak: FLOP/s of the GPU in the recipe's precision."""

    recipe: Recipe
    phase: Phase
    plan: Plan
    rates: Rates
    model: float
    floor: float
    peak: float

    @property
    def mfu(self) -> float:
        """Model FLOPs per second, as a fraction of the peak."""
        return self._utilisation(self.plan.time.seconds)

    @property
    def floor_mfu(self) -> float:
        return self._utilisation(self.floor)

    def _utilisation(self, seconds: float) -> float:
        return self.plan.accumulation * self.model / seconds / self.peak

    def groups(self) -> dict[str, GroupShare]:
        """What a step takes, by each of work.GROUPS that takes anything."""
        shares = self.plan.micro.work.shared(lambda operation: operation.group, self.rates)
        times, time = self.plan.accumulation, self.plan.time
        found = {group: GroupShare(calls=times * share.calls, flops=times * share.flops, bytes=times * share.bytes,
                              seconds=times * share.seconds) for group, share in shares.items()}
        found["optimizer"] = GroupShare(bytes=time.update * self.rates.bandwidth, seconds=time.update)
        found["communication"] = GroupShare(bytes=self.plan.traffic.total,
                                       seconds=time.tensor_traffic + time.exposed_data_traffic)
        return {group: found[group] for group in GROUPS if group in found and found[group].seconds}

    def offenders(self, count: int = 5) -> list[Offender]:
        """The lines that lose most."""
        by_line: dict[str, list[tuple[Operation, float]]] = {}
        for operation, calls in self.plan.micro.work.calls.items():
            by_line.setdefault(operation.source, []).append((operation, self.plan.accumulation * calls))
        found = [self._offender(source, operations) for source, operations in by_line.items() if source]
        return sorted(found, key=lambda offender: -offender.lost)[:count]

    def _offender(self, source: str, operations: list[tuple[Operation, float]]) -> Offender:
        lost = {operation: calls * (self.rates.seconds(operation)
                                    - operation.flops / self.rates.products[operation.kind])
                for operation, calls in operations}
        names = dict.fromkeys(operation.name for operation in sorted(lost, key=lambda operation: -lost[operation]))
        return Offender(source=source, names=tuple(names), lost=sum(lost.values()),
                        calls=sum(calls for _, calls in operations),
                        bytes=sum(calls * (operation.read + operation.written) for operation, calls in operations))


def roofline(recipe: Recipe, layout: PlannedLayout, step: int, *, cluster: Cluster,
             assumptions: Assumptions) -> Roofline:
    """Counts a micro batch of this very size, in the phase of the 1-based `step`. Raises InputError for a layout that
    cannot be.
    """
    floor, rates, planner = Floor(), assumptions.rates(cluster.device), Planner(recipe, cluster, assumptions)
    spread = layout.applied_to(recipe)
    found = Rehearsal(spread, compiled=planner.compiled, floor=floor).micro_batch(layout.micro, step)
    plan = planner.plan(layout, found)
    model = found.model
    if layout.recompute != NOTHING:  # which is no part of what counts as the model's
        model = rehearse(replace(layout, recompute=NOTHING).applied_to(recipe), layout.micro, step).model
    time = plan.time
    rest = time.update + time.tensor_traffic + time.exposed_data_traffic
    return Roofline(recipe=spread, phase=next(phase for phase in reversed(planner.phases) if phase.step <= step),
                    plan=plan, rates=rates, model=model, floor=plan.accumulation * floor.seconds(rates) + rest,
                    peak=cluster.device.peak(recipe.training.precision))


def layout_of(recipe: Recipe, cluster: Cluster, assumptions: Assumptions, *, tensor: int | None = None,
              micro: int | None = None, at_least: int = 1) -> PlannedLayout:
    """What `gigatok-ds plan` recommends without a compiler, with this micro batch instead, or with one of `at_least`.
    """
    eager = replace(recipe, training=replace(recipe.training, compile="none"))
    layout = Planner(eager, cluster, assumptions, tensor=tensor).recommended().layout
    return replace(layout, micro=micro or max(layout.micro, at_least))
