"""Measure a row of GigaTok's published tables again, from standalone checkpoints, and print ours beside it.

  gigatok-ds reproduce                                       the rows there are, and what is published
  gigatok-ds reproduce B-L --tokenizer DIR --val shards/val --inception FILE --vgg FILE --out results/B-L
  gigatok-ds reproduce GPT-B/XL-XXL --tokenizer DIR --gpt DIR --reference VIRTUAL_imagenet256_labeled.npz \\
      --inception FILE --train shards/train --val shards/val --ranks 8 --device cuda --out results/b-xlxxl

Reconstruction for a tokenizer; samples (with a search for the guidance scale where the published one is not documented)
and a linear probe for a GPT. Every stage that has ended is kept, so the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "a published row measured again: ours, published, tolerance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("row", nargs="?", help="name of a row; without it, all are listed")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="standalone tokenizer checkpoint")
    parser.add_argument("--gpt", type=Path, metavar="DIR", help="standalone GPT checkpoint")
    parser.add_argument("--val", metavar="DATA", help="ImageNet's validation images, as shards or a directory")
    parser.add_argument("--train", metavar="SHARDS", help="its training images, for the probe; without, no probe")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="ADM's reference batch")
    parser.add_argument("--inception", metavar="FILE", help="as of gigatok-ds evaluate")
    parser.add_argument("--vgg", metavar="FILE", help="VGG16's weights, for LPIPS")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory for stages and results")
    parser.add_argument("--count", type=int, default=50_000, metavar="N", help="samples (default: 50000)")
    parser.add_argument("--probe", action="append", default=[], metavar="ARGUMENT",
                        help="further argument of gigatok-ds probe, e.g. --probe=--epochs --probe=10; may be repeated")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--allow", action="append", default=[], choices=("count", "size", "reference", "model"),
                        help="accept what is not the published setting; may be repeated")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes of a rank that decode images")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of this host (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.errors import InputError
    from gigatok_ds.studies.published_results import ROWS
    from gigatok_ds.studies.reproduction import Materials, reproduce, row_named
    from gigatok_ds.studies.stages import Launcher

    if args.row is None:
        for name, row in ROWS.items():
            figures = ", ".join(f"{figure} {value:g}" for figure, value in row.published.items())
            print(f"{name:16s} {' + '.join(filter(None, (row.gpt, row.tokenizer))):28s} {figures}")
        return 0
    row_named(args.row)
    for name in ("tokenizer", "inception", "out"):
        if getattr(args, name) is None:
            raise InputError(f"reproduce needs --{name}")
    materials = Materials(
        out=args.out, tokenizer=args.tokenizer, gpt=args.gpt, val=args.val, train=args.train, reference=args.reference,
        inception=args.inception, vgg=args.vgg, count=args.count, probe=tuple(args.probe), device=args.device,
        workers=args.workers, batch_size=args.batch_size, allow=tuple(args.allow))
    comparisons = reproduce(args.row, materials, Launcher(ranks=args.ranks, dry_run=args.dry_run))
    if args.dry_run:
        return 0
    print(f"{'figure':22s} {'ours':>10s} {'published':>10s} {'tolerance':>10s}")
    for found in comparisons:
        ours = "-" if found.ours is None else f"{found.ours:.4f}"
        print(f"{found.name:22s} {ours:>10s} {found.published:10.4f} {found.tolerance:10g}  {found.verdict}")
    print(f"wrote {args.out / 'results.html'}")
    return 0 if all(found.verdict == "reproduced" for found in comparisons) else 1
