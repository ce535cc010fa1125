"""What a run should be warned about, told from what it logs: terms that stopped pulling, codebooks that collapsed.

Both are plain state machines over logged lines, so that a resumed run comes back to their state by reading its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.models.quantizer import USAGE_WINDOW
from gigatok_ds.monitoring.loss_term_gradients import PREFIX

DEAD = 1e-6  # of the largest other term's gradient norm
ENOUGH_CODES = 32  # codes seen for each of the codebook: used evenly, all but e^-32 of them would have occurred


class DeadTerms:
    """Terms whose gradient norm is below a millionth of the largest other's for `patience` steps in a row.

    A logged norm stands for the steps since the line before. A term is warned about once, for good.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self._alive_at: dict[str, int] = {}  # the last step that is not known to be one of a dead term
        self._warned: set[str] = set()
        self._last_step = 0

    def update(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Warnings that the line logged at `step` gives rise to."""
        terms = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
        if not terms:
            return []  # a line about something else, as of a validation
        warnings = []
        for name, norm in terms.items():
            others = [(value, key) for key, value in terms.items() if key != name and isfinite(value)]
            largest, other = max(others, default=(0.0, ""))
            if not norm < DEAD * largest:
                self._alive_at[name] = step
                continue
            steps = step - self._alive_at.setdefault(name, self._last_step)
            if steps >= self.patience and name not in self._warned:
                self._warned.add(name)
                warnings.append(f"the term {name} is dead: for {steps} steps its gradient norm has been below {DEAD:g} "
                                f"of the largest other's (now {norm:.3g}, of {other} {largest:.3g}); raise its weight, "
                                "or leave it out")
        for name in self._alive_at.keys() - terms.keys():
            del self._alive_at[name]  # inactive: its steps would not be in a row
        self._last_step = step
        return warnings


class Collapse:
    """A codebook of which less than `threshold` is in use, by the fraction of codes or by perplexity over codes.

    Judged once the usage window is full or, for a codebook so small that less is enough, after 32 codes seen for each
    of it. Warned about again only after both have recovered. With a threshold of 0, never.
    """

    def __init__(self, threshold: float, codebook_size: int, codes_per_step: int):
        self.threshold, self.codebook_size, self.codes_per_step = threshold, codebook_size, codes_per_step
        self._collapsed = False

    def update(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Warnings that the line logged at `step` gives rise to."""
        enough = min(USAGE_WINDOW, ENOUGH_CODES * self.codebook_size)
        if "codebook_usage" not in values or step * self.codes_per_step < enough:
            return []
        usage, perplexity = values["codebook_usage"], values["codebook_perplexity"]
        before, self._collapsed = self._collapsed, min(usage, perplexity / self.codebook_size) < self.threshold
        if before or not self._collapsed:
            return []
        return [f"the codebook has collapsed: {usage:.2%} of its {self.codebook_size} codes are in use, with a "
                f"perplexity of {perplexity:.4g} (warned below {self.threshold:.0%}); raise loss.quantizer.entropy, or "
                "lower optimizer.lr"]


def alerts_of(recipe: Recipe) -> list[DeadTerms | Collapse]:
    """What watches a run of this recipe."""
    if not isinstance(recipe, TokenizerRecipe):
        return []
    monitor, codes = recipe.monitor, recipe.training.global_batch_size * recipe.model.latent_tokens
    return [DeadTerms(monitor.dead_term_steps),
            Collapse(monitor.collapse_usage, recipe.model.quantizer.codebook_size, codes)]
