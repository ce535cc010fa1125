"""What a run has written down against a replay of it: logged figures, and every tensor of checkpoints.

Two layouts add up in other orders, so figures agree to a tolerance; on the layout of the run they are usually equal to
the last bit. Adam divides by the size of gradients, so where a gradient is rounding noise the noise of two layouts
moves a weight by up to the learning rate in each step, over many steps as in a random walk: weights may differ by that
much, too. And where an activation is so near to a kink that it falls on its other side, elements of a gradient differ
by percents: moments may.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gigatok_ds.checkpoint.fragments import EMA, MOMENTS, WEIGHTS, SavedEngine
from gigatok_ds.checkpoint.run_directory import checkpoint_path, complete_checkpoints, damaged_file, read_state
from gigatok_ds.config.recipe import Recipe
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.history import read_history, saved_step
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.replay.again import Steps
from gigatok_ds.training.schedules import lr_of_iteration

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
_LOGGED = ("loss", "discriminator", "grad_norm")
# Of the largest value of its kind, what a tensor's differences are relative to at least.
_FLOORS = {WEIGHTS: 1e-3, EMA: 1e-3, MOMENTS[0]: 1e-2, MOMENTS[1]: 1e-4}
_KINKS, _MOST_OF_MOMENTS = 500, 0.5  # times the tolerance, for moments, but not more than this
_REMEMBERED = 10  # steps whose noise Adam's first moment adds up in one direction (beta 0.9)
_MOST_CODES = 0.01  # of a window of codes, that may be others: nearly as near


class Differing(NamedTuple):
    """Figures of a step, or part of a tensor, beyond what is allowed."""

    step: int
    what: str
    times: float  # as large as the largest difference allowed


class Compared(NamedTuple):
    """How many figures or tensors were compared, how many of them are not equal to the last bit, the largest
    difference, as a part of what is allowed, and what is beyond, the first or worst of it first."""

    figures: int
    inexact: int
    largest: float
    differing: list[Differing]


def compare(run_dir: Path, replay_dir: Path, steps: Steps, recipe: Recipe,
            tolerance: float) -> Iterator[tuple[str, Compared]]:
    """What a run has written of these steps against a replay: the log, then each checkpoint, with a name for each."""
    yield "losses and gradient norms", compare_logs(run_dir, replay_dir, steps, tolerance)
    for step, compared in compare_checkpoints(run_dir, replay_dir, steps, recipe, tolerance):
        yield f"tensors of step {step}", compared


def compare_logs(run_dir: Path, replay_dir: Path, steps: Steps, tolerance: float) -> Compared:
    """Losses and gradient norms of steps that both have logged. They are means since the line before, or since the run
    was started again, so only those count that begin at the same step."""
    (ran, begins), (again, begun) = _logged(run_dir, []), _logged(replay_dir, [steps.first])
    count, inexact, largest, differing = 0, 0, 0.0, []
    for step in sorted(step for step in ran.keys() & again.keys() if steps.first < step <= steps.last):
        if begins[step] != begun[step]:
            continue
        for name in sorted(name for name in ran[step].keys() & again[step].keys() if name.startswith(_LOGGED)):
            one, other = ran[step][name], again[step][name]
            allowed = tolerance * max(abs(other), 0.1)
            times = _times(abs(one - other), allowed)
            count, inexact, largest = count + 1, inexact + (one != other), max(largest, times)
            if times > 1:
                differing.append(Differing(step, f"{name} is {one:.6g} in the run and {other:.6g} here", times))
    return Compared(count, inexact, largest, sorted(differing, key=lambda found: (found.step, -found.times)))


def _logged(run_dir: Path, starts: Sequence[int]) -> tuple[dict[int, dict[str, float]], dict[int, int]]:
    """Lines with losses by step (of a step that was computed more than once, the last), and the step after which each
    one's means begin. The run was started after `starts` and wherever its history says so."""
    found = {line["step"]: line for line in read_metrics(run_dir) if "loss" in line}
    known, newest = {0, *starts, *found}, 0
    for line in read_history(run_dir):
        if line["event"] == "started":
            known.add(newest)
        newest = newest if (step := saved_step(line)) is None else step
    return found, {step: max(before for before in known if before < step) for step in found}


def _times(difference: float, allowed: float) -> float:
    if math.isnan(difference):
        return math.inf
    return difference / allowed if allowed else (math.inf if difference else 0.0)


def compare_checkpoints(run_dir: Path, replay_dir: Path, steps: Steps, recipe: Recipe,
                        tolerance: float) -> Iterator[tuple[int, Compared]]:
    """For each step after the first that both have a checkpoint of: what of its tensors differs, the worst first."""
    again = dict(complete_checkpoints(replay_dir))
    for step, folder in complete_checkpoints(run_dir):
        if not steps.first < step <= steps.last or step not in again:
            continue
        moved = _moved(recipe, steps.first, step)
        state = read_state(folder)
        if problem := damaged_file(folder, state):
            raise InputError(problem)
        found = [part for name in state.parts
                 for part in _of_engine(name, SavedEngine(folder / name),
                                        SavedEngine(checkpoint_path(replay_dir, step) / name), moved, tolerance)]
        differing = [part for part in found if part.times > 1]
        kinds = [*_FLOORS]
        differing.sort(key=lambda part: (kinds.index(part.kind) if part.kind in kinds else len(kinds), -part.times))
        yield step, Compared(len({part.tensor for part in found}), len({part.tensor for part in found if part.times}),
                             max((part.times for part in found), default=0.0),
                             [Differing(step, part.text, part.times) for part in differing])


def _moved(recipe: Recipe, first: int, last: int) -> float:
    """How far the noise of two layouts may take a weight apart in the steps after `first` to `last`."""
    fastest = recipe.optimizer.lr * max([1.0, *recipe.optimizer.part_lr.values()])
    rates = [lr_of_iteration(recipe.schedule, fastest, recipe.training.steps, number) for number in range(first, last)]
    # Two walks: every step one way, or four standard deviations of steps that are alike for a while.
    return min(2 * sum(rates), 4 * math.sqrt(2 * _REMEMBERED * sum(rate**2 for rate in rates)))


class _Part(NamedTuple):
    tensor: str
    kind: str
    times: float
    text: str


def _of_engine(engine: str, ran: SavedEngine, again: SavedEngine, moved: float, tolerance: float) -> Iterator[_Part]:
    """Each rank's part of each tensor of the run, against the replay's; weights may differ by `moved`."""
    tensor_size = ran.layout.tensor_size
    for kind in ran.layout.kinds:
        if not again.has(kind):
            continue
        sizes: dict[str, float] = {}  # of the largest value of each tensor
        found: list[tuple[str, float, str]] = []
        for name in (name for name in ran.layout.parameters if ran.holds(kind, name) and again.holds(kind, name)):
            full, cut = again.read(kind, name), ran.layout.cuts.get(name)
            sizes[name] = float(full.abs().max())
            parts = [cut.shard(full, rank, tensor_size).flatten() if cut else full.flatten()
                     for rank in range(tensor_size)]
            for tensor_rank, data_rank, (start, values) in ran.pieces(kind, name):
                ours = parts[tensor_rank][start:start + len(values)]
                differences = (values - ours).abs()
                if not len(differences):
                    continue
                # A NaN would not be the largest of anything.
                at = int(differences.nan_to_num(math.inf, math.inf).argmax())
                rank = data_rank * tensor_size + tensor_rank
                found.append((name, float(differences[at]),
                              f"{kind} of {name} ({engine}), element {start + at:,} on rank {rank}, is "
                              f"{float(values[at]):.6g} in the run and {float(ours[at]):.6g} here"))
        floor = _FLOORS[kind] * max(sizes.values(), default=0.0)
        for name, difference, text in found:
            scale = max(sizes[name], floor)
            allowed = (scale * min(tolerance * _KINKS, _MOST_OF_MOMENTS) if kind in MOMENTS else
                       tolerance * scale + moved)
            yield _Part(f"{engine}/{kind}/{name}", kind, _times(difference, allowed), text)
    for name in ran.full_names():
        yield _full(engine, name, ran.read_full(name), again.read_full(name), tolerance)


def _full(engine: str, name: str, ran: Tensor, again: Tensor, tolerance: float) -> _Part:
    """A buffer or frozen parameter; of integers, which are codes, a few may be others."""
    if ran.is_floating_point():
        difference = float((ran.double() - again.double()).abs().max()) if ran.numel() else 0.0
        times = _times(difference, tolerance * max(float(again.abs().max()) if again.numel() else 0.0, 1e-3))
        text = f"{name} ({engine}) differs by {difference:.3g}"
    else:
        share = float((ran != again).float().mean()) if ran.numel() else 0.0
        times, text = share / _MOST_CODES, f"{share:.1%} of {name} ({engine}) are others"
    return _Part(f"{engine}/{name}", "full", times, text)
