"""How a training step would use a GPU, by counting what the training's own code computes and moves. No GPU is needed or
used.

    python benchmarks/gpu_roofline.py VQ_SS256                       # where the time goes, phase by phase
    python benchmarks/gpu_roofline.py GPT-XXL --micro 64 --gpu B200 --tensor 2 model.residual_dropout=0
    python benchmarks/gpu_roofline.py --all --markdown               # the table of docs/performance.md

Every operation of a micro batch is counted on tensors without storage, with its FLOPs and the bytes that it reads and
writes. It takes the longest of three times: its FLOPs at 70% of the GPU's dense peak for their precision, its bytes at
85% of the memory's bandwidth, 4 us to start it (not with --captured). Compiled blocks count as Inductor's scheduler
fuses them. The layout is what `gigatok-ds plan` recommends for a host of 8 GPUs, with micro batches of at least 16
images or 32 sequences. The floor is the least that the same products leave possible: dry_run/floor.py says what it
counts.

These are predictions; no GPU has confirmed them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import figures
from figures import Figure

from gigatok_ds.config.load import load_recipe, recipe_names
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.planning.cluster import Cluster, parse_cluster
from gigatok_ds.planning.devices import DEVICES, SPEC_HELP, parse_gpu_spec
from gigatok_ds.planning.phases import phases_of
from gigatok_ds.planning.planner import Planner
from gigatok_ds.planning.roofline import Roofline, layout_of, roofline
from gigatok_ds.planning.speed import Assumptions

GPUS = 8  # of a host
LEAST = {"tokenizer": 16, "gpt": 32}  # micro batch
NEAR_FLOOR = 1.25  # is good enough where a target cannot be reached
# Model FLOP utilisation on an H100, by the size of the network.
TARGETS = {"GPT-B": 0.35, "GPT-L": 0.42, "GPT-XL": 0.42, "GPT-XXL": 0.42, "VQ_SS256": 0.27, "VQ_SB256": 0.27,
           "VQ_BL256": 0.33, "VQ_XLXXL256": 0.40}


def recipe_of(name: str, arguments: argparse.Namespace) -> Recipe:
    return load_recipe(name, [*arguments.overrides, f"training.precision={arguments.precision}"])


def rooflines(name: str, arguments: argparse.Namespace, cluster: Cluster) -> Iterator[Roofline]:
    """Of each phase that counts, or of that of --step."""
    assumptions = Assumptions(kernel_seconds=0.0) if arguments.captured else Assumptions()
    recipe = recipe_of(name, arguments)
    # In half precision layouts are those of the recipe as it is packaged, which has been rehearsed already.
    packaged = recipe if arguments.precision == "fp32" else load_recipe(name, arguments.overrides)
    layout = layout_of(packaged, cluster, assumptions, tensor=arguments.tensor, micro=arguments.micro,
                       at_least=LEAST[recipe.kind])
    share = recipe.training.global_batch_size * layout.tensor // cluster.ranks
    if share % layout.micro:  # larger than any that this global batch allows
        batch = layout.micro * cluster.ranks // layout.tensor
        recipe = replace(recipe, training=replace(recipe.training, global_batch_size=batch))
    for step in [arguments.step] if arguments.step else Planner(recipe, cluster, assumptions).steps:
        yield roofline(recipe, layout, step, cluster=cluster, assumptions=assumptions)


def told(found: Roofline) -> str:
    """For people."""
    plan, time = found.plan, found.plan.time
    lines = [
        f"{found.recipe.name}, {described(found)}: micro batch {plan.layout.micro} x {plan.accumulation}, tensor ranks "
        f"{plan.layout.tensor}, ZeRO {plan.layout.stage}, {found.recipe.training.precision}, recomputed: "
        f"{plan.layout.recompute}, compile {found.recipe.training.compile}",
        f"  a step takes {1e3 * time.seconds:.1f} ms: MFU {found.mfu:.3f}; at least {1e3 * found.floor:.1f} ms: MFU "
        f"{found.floor_mfu:.3f}; {time.seconds / found.floor:.2f} times the floor",
        f"  {'':16}{'ms':>9}{'GB':>9}{'TFLOP':>9}{'kernels':>9}",
    ]
    lines += [
        f"  {group:16}{1e3 * share.seconds:9.2f}{share.bytes / 1e9:9.2f}{share.flops / 1e12:9.2f}{share.calls:9.0f}"
        for group, share in found.groups().items()
    ]
    lines += ["  worst offenders: time beyond that of their products",
              *(f"    gigatok_ds/{offender.source:34}{1e3 * offender.lost:8.2f} ms {offender.bytes / 1e9:7.2f} GB "
                f"{offender.calls:6.0f} kernels: {', '.join(offender.names)[:70]}" for offender in found.offenders()),
                ""]
    return "\n".join(lines)


def described(found: Roofline) -> str:
    what = ", ".join(sorted(found.phase.active)) if isinstance(found.recipe, TokenizerRecipe) else "every step"
    return f"{what or 'without any of these'} (step {found.phase.step:,})" if found.phase.step > 1 else what


def markdown(rows: list[Roofline]) -> str:
    lines = ["| recipe | with | micro batch | ms | MFU | floor, ms | floor's MFU | times the floor | products, ms | "
             "other bytes, GB |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for found in rows:
        groups, seconds = found.groups(), found.plan.time.seconds
        products = sum(groups[group].seconds for group in ("matrix", "convolution", "attention") if group in groups)
        lines.append(f"| {found.recipe.name} | {described(found)} | {found.plan.layout.micro} | {1e3 * seconds:.1f} | "
                     f"**{found.mfu:.3f}** | {1e3 * found.floor:.1f} | {found.floor_mfu:.3f} | "
                     f"{seconds / found.floor:.2f} | {1e3 * products:.1f} | {other_bytes(found) / 1e9:.1f} |")
    return "\n".join(lines)


def other_bytes(found: Roofline) -> float:
    """Bytes of a step that are neither matrix products', convolutions' nor attention's."""
    return sum(share.bytes for group, share in found.groups().items()
               if group not in ("matrix", "convolution", "attention", "communication"))


def rows(found: list[Roofline]) -> Iterator[Figure]:
    for one in found:
        target, ratio = TARGETS.get(one.recipe.name), one.plan.time.seconds / one.floor
        aim = {} if target is None else {"target": f"at least {target:g}, or {NEAR_FLOOR:g} times the floor",
                                         "met": one.mfu >= target or ratio <= NEAR_FLOOR}
        yield Figure(case=f"{one.recipe.name}, {described(one)}, micro batch {one.plan.layout.micro}",
                     unit="MFU (predicted)", ours=one.mfu, reference=one.floor_mfu, reference_name="floor", ratio=ratio,
                     direction="x the floor's time", notes=f"{1e3 * one.plan.time.seconds:.1f} ms a step", **aim)


def published() -> list[str]:
    return [name for name in recipe_names() if not name.startswith("demo")]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="name or path of a recipe; without one: --all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings, such as "
                                                                          "training.compile=default")
    parser.add_argument("--all", action="store_true", help="every published recipe")
    parser.add_argument("--markdown", action="store_true", help="one table instead of a report for each phase")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=f"one of {', '.join(DEVICES)} (default: "
                                                                      "%(default)s)")
    parser.add_argument("--gpu-spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--tensor", type=int, metavar="N", help="tensor ranks (default: as planned)")
    parser.add_argument("--micro", type=int, metavar="N",
                        help="samples of a micro batch (default: as planned, see above)")
    parser.add_argument("--step", type=int, metavar="N", help="the phase of this step only")
    parser.add_argument("--captured", action="store_true", help="starting kernels takes no time, as from a CUDA graph")
    figures.add_option(parser)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.all and arguments.recipe and "=" in arguments.recipe:
        arguments.overrides, arguments.recipe = [arguments.recipe, *arguments.overrides], None
    if arguments.all == (arguments.recipe is not None):
        raise InputError("name a recipe, or give --all")
    for option, least in (("micro", 1), ("step", 1), ("tensor", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise InputError(f"--{option} is {value}; it must be at least {least}")
    return arguments


def measure(arguments: argparse.Namespace) -> list[Roofline]:
    described_gpu = None if arguments.gpu_spec is None else parse_gpu_spec(arguments.gpu_spec)
    name = described_gpu.name if described_gpu else arguments.gpu
    cluster = parse_cluster(f"1x{GPUS}x{name}", described=described_gpu)
    found = []
    for recipe in published() if arguments.all else [arguments.recipe]:
        last = recipe_of(recipe, arguments)
        if arguments.step and arguments.step > sum(phase.count for phase in phases_of(last)):
            raise InputError(f"--step is {arguments.step:,}, but {recipe} ends at {last.training.steps:,}")
        for one in rooflines(recipe, arguments, cluster):
            found.append(one)
            print(f"{one.recipe.name}: {described(one)}" if arguments.markdown else told(one),
                  file=sys.stderr if arguments.markdown else sys.stdout, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parse_arguments(argv)
        found = measure(arguments)
    except InputError as error:
        print(f"gpu_roofline: error: {error}", file=sys.stderr)
        return 2
    if arguments.markdown:
        print(markdown(found))
    figures.write(arguments.json, list(rows(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
