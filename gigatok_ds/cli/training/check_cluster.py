"""Ask every host of a hostfile whether a training job could run on it, before NCCL can hang.

  gigatok-ds check-cluster --hostfile hostfile --out /shared/runs/xl --recipe VQ_XLXXL256

Reports for each host: whether ssh reaches it, its slots and GPUs, versions, whether its code and its reading of the
recipe are those of this machine, whether it shares and can write the directory of the run; and then sums over all
ranks, by NCCL on GPUs and gloo on CPUs. A line for each problem says what to do. Nothing is left behind on the hosts.

Exit code: 0 all is well, 1 there is a problem, 2 the question itself is wrong. The variables of launch/train.sh (GPUS,
MASTER_ADDR, MASTER_PORT) and .deepspeed_env count here too. Without --hostfile, this machine is checked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "ask all hosts whether a training job could run on them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts and their slots (default: this machine)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory that you mean to use; must be shared")
    parser.add_argument("--recipe", metavar="NAME", help="recipe that you mean to train, by name or YAML file")
    parser.add_argument("--timeout", type=int, default=120, metavar="SECONDS",
                        help="longest wait for the answers, and again for the sum (default: 120)")
    parser.add_argument("--no-allreduce", action="store_true", help="leave out the sum over all ranks")


def run(args: argparse.Namespace) -> int:
    import os

    from gigatok_ds.cluster.check import Request, check_cluster

    verdict = check_cluster(Request(hostfile=args.hostfile, out=args.out, recipe=args.recipe, seconds=args.timeout,
                                    with_allreduce=not args.no_allreduce), os.environ)
    print(verdict.table)
    for problem in verdict.problems:
        print(f"problem: {problem}")
    if not verdict.problems:
        print("no problem found")
    return 1 if verdict.problems else 0
