"""Verify image shards against their index and say what they hold: counts, classes, sizes, formats.

  gigatok-ds check-shards shards/train

Of the members of the tars it is told how many are samples, their labels, and left out for which reason. The hash of
every tar, its samples and labels are compared with the index, and every image is decoded as in training. Of a URL
(docs/data.md, "Remote shards") the copies in the cache are checked, fetched first where there are none yet. Exit code
1: something is damaged or has changed; each problem is one line.
"""

from __future__ import annotations

import argparse

HELP = "verify image shards against their index, and summarise them"
SHOWN = 20  # problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="directory or URL of image shards")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="leave images undecoded: much faster")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the number of cores)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.packing.checking import check_shards
    from gigatok_ds.packing.workers import worker_count

    report = check_shards(args.shards, decode=args.decode, workers=worker_count(args.workers))
    for line in report.lines():
        print(line)
    for problem in report.problems[:SHOWN]:
        print(f"problem: {problem}")
    if len(report.problems) > SHOWN:
        print(f"and {len(report.problems) - SHOWN} problems more")
    print(f"{len(report.problems)} problems" if report.problems else "no problems")
    return 1 if report.problems else 0
