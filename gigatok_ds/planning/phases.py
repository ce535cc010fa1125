"""Which kinds of steps a recipe has: losses begin and end with the step."""

from __future__ import annotations

from dataclasses import dataclass

from gigatok_ds.config.recipe import GPTRecipe, Recipe


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps that are alike: `step` is the first of them (1-based), `count` how many there are, `active` what is on in
    them.
    """

    step: int
    count: int
    active: frozenset[str]

    def __str__(self) -> str:
        what = " with " + ", ".join(sorted(self.active)) if self.active else ""
        return f"steps from {self.step:,} on{what}"


def phases_of(recipe: Recipe) -> list[Phase]:
    """The phases, in their order."""
    steps = recipe.training.steps
    if isinstance(recipe, GPTRecipe):
        return [Phase(step=1, count=steps, active=frozenset())]
    loss = recipe.loss
    ends = [loss.auxiliary.end_step if loss.auxiliary else None, loss.quantizer.entropy_end_step,
            loss.adversarial.start_step if loss.adversarial else None]
    starts = sorted({1, *(max(step, 1) for step in ends if step is not None and step <= steps)})
    found = []
    for start, end in zip(starts, [*starts[1:], steps + 1], strict=True):
        flags = {"the entropy term": loss.wants_entropy(start),
                 "direct reconstruction": loss.wants_direct_reconstruction(start),
                 "the discriminator": loss.discriminator_active(start)}
        found.append(Phase(step=start, count=end - start, active=frozenset(name for name, on in flags.items() if on)))
    return found


def fullest(phases: list[Phase]) -> list[Phase]:
    """The phases but for those that do nothing that another does not do as well: memory must be enough for these."""
    return [phase for index, phase in enumerate(phases)
            if not any(phase.active < other.active or (phase.active == other.active and later > index)
                       for later, other in enumerate(phases))]


def longest(phases: list[Phase]) -> Phase:
    return max(phases, key=lambda phase: phase.count)
