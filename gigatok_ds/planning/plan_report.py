"""A plan as text for people, and as JSON for programs."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from pathlib import Path

from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.planning.phases import longest
from gigatok_ds.planning.planner import Plan, Planner
from gigatok_ds.untrusted import read_json

GB = 1e9


FORMAT = "gigatok-ds-plan/1"


def figures(planner: Planner, plan: Plan, choices: list[Plan]) -> dict:
    """Everything that is known of a plan; bytes, seconds, FLOPs, parameters. `choices` differ in what is computed
    again.
    """
    recipe, cluster, time = planner.recipe, planner.cluster, plan.time
    peak = cluster.device.peak(recipe.training.precision) * cluster.ranks
    hours = recipe.training.steps * time.seconds / 3600
    return {
        "format": FORMAT,
        "recipe": recipe.name,
        "cluster": str(cluster),
        "parameters": planner.parameters(),
        "layout": dataclasses.asdict(plan.layout) | {"data": plan.data_ranks, "accumulation": plan.accumulation},
        "arguments": plan.layout.arguments(recipe),
        "fits": plan.fits,
        "memory": {"parts": plan.memory.parts(), "peak": plan.memory.peak, "usable": plan.usable},
        "recompute": [{"recompute": choice.layout.recompute, "activations": choice.memory.activations,
                       "peak": choice.memory.peak, "fits": choice.fits, "step_seconds": choice.time.seconds}
                      for choice in choices],
        "flops": {"model": planner.model_flops, "hardware": hardware(plan, cluster.ranks)},
        "sent_per_gpu": dataclasses.asdict(plan.traffic),
        "step": {**{name: value for name, value in dataclasses.asdict(time).items() if name != "factor"},
                 "by_group": _by_group(planner, plan), "seconds": time.seconds,
                 "mfu": planner.model_flops / time.seconds / peak,
                 "hfu": hardware(plan, cluster.ranks) / time.seconds / peak,
                 "samples_per_second": recipe.training.global_batch_size / time.seconds},
        "run": {"steps": recipe.training.steps, "days": hours / 24, "gpu_hours": hours * cluster.ranks},
        "assumptions": [f"all {recipe.training.steps:,} steps are like those {_most(planner)}",
                        *planner.assumptions.lines()],
    }


def check_figures(path: Path) -> None:
    """InputError when there is something at `path` that does not hold the figures of a plan."""
    if not os.path.lexists(path):
        return
    with suppress(InputError, OSError):
        if read_json(path).get("format") == FORMAT:
            return
    raise InputError(
        f"{path} is there and holds no plan of ours, so it is left alone; choose another --json or remove it"
    )


def _by_group(planner: Planner, plan: Plan) -> dict[str, float]:
    """Seconds of a step's computing, the longest first."""
    shares = plan.micro.work.shared(lambda operation: operation.group,
                                    planner.assumptions.rates(planner.cluster.device))
    found = {group: plan.accumulation * share.seconds for group, share in shares.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def hardware(plan: Plan, ranks: int) -> float:
    """FLOPs of a step, all ranks together, with frozen networks and what is computed again."""
    return plan.micro.flops * plan.accumulation * ranks


def _most(planner: Planner) -> str:
    return str(longest(planner.phases)).removeprefix("steps ")


def text(found: dict, recipe: Recipe) -> str:
    layout, step, run, memory = (found[name] for name in ("layout", "step", "run", "memory"))
    what = "images" if isinstance(recipe, TokenizerRecipe) else "sequences"
    parameters = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in found["parameters"].items())
    lines = [
        f"{found['recipe']} on {found['cluster']}: {parameters} parameters",
        "",
        "layout" + ("" if found["fits"] else " (does not fit)"),
        f"  tensor ranks {layout['tensor']}{' (sequence parallel)' if layout['sequence'] else ''} x data ranks "
        f"{layout['data']}, ZeRO {layout['stage']}, micro batch {layout['micro']} x {layout['accumulation']} per step, "
        f"recomputed: {layout['recompute']}",
        f"  {' '.join(found['arguments'])}",
        "",
        "memory per GPU, GB (10^9 bytes)",
        *(f"  {name:<34} {value / GB:9.2f}" for name, value in memory["parts"].items() if value),
        f"  {'at most':<34} {memory['peak'] / GB:9.2f} of {memory['usable'] / GB:.2f} that can be filled",
        "",
        "what is computed again                activations  at most, GB  step, s",
        *(f"  {row['recompute']:<34} {row['activations'] / GB:12.2f} {row['peak'] / GB:12.2f} "
          f"{row['step_seconds']:8.3f}{'' if row['fits'] else '  does not fit'}" for row in found["recompute"]),
        "",
        "a step",
        f"  FLOPs: model {found['flops']['model']:.4e}, hardware {found['flops']['hardware']:.4e}",
        "  sent per GPU, GB: " + ", ".join(f"{name.replace('_', ' ')} {value / GB:.3f}"
                                           for name, value in found["sent_per_gpu"].items()),
        f"  {step['seconds']:.3f} s: computing {step['computing']:.3f}, of which kernels wait to be started "
        f"{step['starting']:.3f}, tensor traffic {step['tensor_traffic']:.3f}, update {step['update']:.3f}, data "
        f"traffic that shows {step['exposed_data_traffic']:.3f}",
        "  computing by kind: " + ", ".join(f"{group} {seconds:.3f}" for group, seconds in step["by_group"].items()),
        f"  MFU {step['mfu']:.1%}, HFU {step['hfu']:.1%}, {step['samples_per_second']:,.0f} {what} per second",
        "",
        f"{run['steps']:,} steps: {run['days']:.2f} days, {run['gpu_hours']:,.0f} GPU-hours",
        "",
        "assumed",
        *(f"  {line}" for line in found["assumptions"]),
    ]
    return "\n".join(lines)
