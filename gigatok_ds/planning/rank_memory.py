"""Memory of a rank: what is there all the time, and the most that comes on top of it in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gigatok_ds.config.recipe import Recipe
from gigatok_ds.dry_run.dry_run_result import NO_MATRICES, MuonWork, Shapes
from gigatok_ds.planning.state import EngineState, state_of


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank. `states` by network; `activations` is the most that a micro batch keeps alive."""

    states: dict[str, EngineState]
    frozen: dict[str, int]
    buffers: int
    activations: float

    @property
    def always(self) -> float:
        """What is there all the time."""
        # Buffers of a network are there twice: a step that is left out puts them back.
        return sum(state.kept for state in self.states.values()) + sum(self.frozen.values()) + 2 * self.buffers

    @property
    def peak(self) -> float:
        """The most at any moment: in a backward pass, or in an update, when activations are gone."""
        passes = self.activations + sum(state.buckets + state.gathered for state in self.states.values())
        return self.always + max(passes, max(state.update for state in self.states.values()))

    def parts(self) -> dict[str, float]:
        """The bytes of all networks together, by kind: what `peak` is made of when the backward pass decides it."""
        total = [sum(values) for values in zip(*self.states.values(), strict=True)]
        of_states = dict(zip(EngineState._fields, total, strict=True))
        update = of_states.pop("update")
        return {**of_states, "buffers": 2 * self.buffers, **self.frozen, "activations": self.activations,
                "update (instead of the last three)": update}


def memory_of(recipe: Recipe, shapes: Shapes, activations: float, *, zero: Mapping, data_ranks: int,
              muon: MuonWork = NO_MATRICES) -> Memory:
    """zero: DeepSpeed's zero_optimization. muon: the model's matrices."""
    training = recipe.training
    states = {name: state_of(sizes, shapes.frozen_parts.get(name, ()), zero=zero, data_ranks=data_ranks,
                             precision=training.precision,
                             average=training.ema_decay is not None and name != "discriminator",
                             muon=NO_MATRICES if name == "discriminator" else muon)
              for name, sizes in shapes.trained.items()}
    return Memory(states=states, frozen=shapes.frozen, buffers=shapes.buffers, activations=activations)
