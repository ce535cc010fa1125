"""Judge a tokenizer by the GPT that it feeds: codes -> GPT-B -> validation loss, probe accuracy, gFID, in one command.

  gigatok-ds ar-probe TOKENIZER --train shards/train --val shards/val --reference VIRTUAL_imagenet256_labeled.npz \\
      --inception FILE --ranks 8 --device cuda --out results/ar-probe

The GPT is trained as the original's AR probing does: 250,000 steps of 256 images at a constant learning rate. The
guidance scale is searched unless --cfg gives it. Every stage that has ended is kept, and training resumes from its last
checkpoint, so the same command goes on where it was. --dry-run prints the commands, for clusters of several hosts: run
them there in this order, then this command for what is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gigatok_ds.cli.orient import add_orient

HELP = "a tokenizer judged by a GPT on its codes: gFID, loss, probe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", type=Path, help="standalone tokenizer checkpoint")
    parser.add_argument("--train", required=True, metavar="SHARDS", help="training images with labels")
    parser.add_argument("--val", required=True, metavar="SHARDS", help="validation images with labels")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="ADM's reference batch")
    parser.add_argument("--inception", required=True, metavar="FILE", help="as of gigatok-ds evaluate")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for stages and results")
    parser.add_argument("--recipe", default="GPT-B", help="of the GPT: a name or a YAML file (default: GPT-B)")
    parser.add_argument("--gpt", action="append", default=[], metavar="key=value",
                        help="setting of that recipe; may be repeated")
    parser.add_argument("--zero", type=int, choices=range(4), default=1, help="ZeRO stage of training (default: 1)")
    parser.add_argument("--crops", default="ten-crop", metavar="KIND",
                        help="views of training images (default: ten-crop)")
    parser.add_argument("--cfg", type=float, metavar="SCALE", help="guidance scale; without it, it is searched")
    parser.add_argument("--count", type=int, default=50_000, metavar="N", help="samples (default: 50000)")
    parser.add_argument("--probe", action="append", default=[], metavar="ARGUMENT",
                        help="further argument of gigatok-ds probe; may be repeated")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--allow", action="append", default=[], choices=("count", "size", "reference"),
                        help="as of gigatok-ds evaluate; may be repeated")
    add_orient(parser)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes of a rank that decode images")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of this host (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.evaluation.results import in_words
    from gigatok_ds.studies.ar_probing import ARProbing
    from gigatok_ds.studies.stages import Launcher

    study = ARProbing(
        tokenizer=args.tokenizer, train=args.train, val=args.val, reference=args.reference, inception=args.inception,
        out=args.out, recipe=args.recipe, gpt=tuple(args.gpt), zero=args.zero, scale=args.cfg, count=args.count,
        crops=args.crops, probe=tuple(args.probe), device=args.device, workers=args.workers, batch_size=args.batch_size,
        allow=tuple(args.allow), orient=bool(args.orient))
    figures = study.run(Launcher(ranks=args.ranks, dry_run=args.dry_run))
    for name, value in figures.items():
        print(f"{name}: {in_words(value)}")
    if not args.dry_run:
        print(f"wrote {args.out / 'results.html'}")
    return 0
