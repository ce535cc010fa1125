"""Say what a recipe takes on a cluster before anything is spent: memory, step time, days, and the best layout.

  gigatok-ds plan VQ_XLXXL256 --cluster 8x8xH100
  gigatok-ds plan GPT-XXL --cluster 1x8xA100-40GB training.global_batch_size=256 --json plan.json

Nothing is allocated: the training's own code runs on tensors without storage, in the shapes of one rank. Bytes and
FLOPs are counted; times rest on assumptions, which are printed, and which --calibrate replaces by what a run of yours
took.

`gigatok-ds train RECIPE --auto` trains in the layout that this recommends for the GPUs that it finds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = "what a recipe takes on a cluster: memory, time, the best layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gigatok_ds.planning.devices import DEVICES, SPEC_HELP

    parser.add_argument("recipe", help="name of a recipe (see: gigatok-ds recipes) or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings, e.g. "
                                                                          "training.global_batch_size=512")
    parser.add_argument("--cluster", required=True, metavar="HOSTSxGPUSxDEVICE",
                        help=f"such as 8x8xH100; devices: {', '.join(DEVICES)}, and that of --gpu-spec")
    parser.add_argument("--gpu-spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument("--memory-gb", type=float, metavar="N",
                        help="memory of a GPU, 10^9 bytes (default: its data sheet's)")
    parser.add_argument("--network-gbps", type=float, metavar="N",
                        help="bits per second between hosts, 10^9 for each GPU (default: its reference system's)")
    parser.add_argument("--calibrate", type=Path, action="append", default=[], metavar="RUN",
                        help="scale step times by those of this run directory, from the same kind of GPU (several: "
                             "their mean)")
    parser.add_argument("--zero", type=int, choices=range(4), help="plan this ZeRO stage instead of the best one")
    parser.add_argument("--tp", type=int, metavar="N", help="plan so many tensor ranks instead of the best number")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write the figures there, too; - prints them instead of the table")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.config.load import load_recipe
    from gigatok_ds.files import write_atomically
    from gigatok_ds.planning.cluster import parse_cluster
    from gigatok_ds.planning.devices import parse_gpu_spec
    from gigatok_ds.planning.plan_report import check_figures, figures, text
    from gigatok_ds.planning.planner import Planner
    from gigatok_ds.planning.speed import Assumptions

    if args.json and args.json != Path("-"):
        check_figures(args.json)
    recipe = load_recipe(args.recipe, args.overrides)
    described = None if args.gpu_spec is None else parse_gpu_spec(args.gpu_spec)
    cluster = parse_cluster(args.cluster, memory_gb=args.memory_gb, network_gbps=args.network_gbps, described=described)
    assumptions = Assumptions()
    if args.calibrate:
        from gigatok_ds.planning.calibration import calibrated

        assumptions = calibrated(assumptions, args.calibrate, cluster)
    planner = Planner(recipe, cluster, assumptions, tensor=args.tp, stage=args.zero)
    plan = planner.recommended()
    found = figures(planner, plan, planner.choices(plan))
    encoded = json.dumps(found, indent=2) + "\n"
    if args.json == Path("-"):
        sys.stdout.write(encoded)
        return 0
    if args.json:
        write_atomically(args.json, encoded.encode())
    print(text(found, recipe))
    return 0
