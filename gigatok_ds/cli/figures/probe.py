"""Train a linear classifier on frozen features and test it: the published probe accuracies.

  gigatok-ds probe TOKENIZER --gpt GPT --train shards/train --val shards/val --out results/probe
  gigatok-ds probe TOKENIZER --features encoder --train shards/train --val shards/val --out results/probe-tokenizer

With --gpt the features are the GPT's residual stream after its middle block, averaged over positions, of images whose
class it is not told; without, the tokenizer's own. 90 epochs with random crops and flips, LARS, batch normalisation
without weights. Interrupted, the same command goes on. Several processes share the images:
torchrun --nproc-per-node 8 -m gigatok_ds probe ... --device cuda.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from gigatok_ds.cli.orient import add_orient

HELP = "linear-probe accuracy of a GPT's or a tokenizer's features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", type=Path, help="standalone tokenizer checkpoint")
    parser.add_argument("--gpt", type=Path, metavar="DIR", help="standalone GPT; without, the tokenizer is probed")
    parser.add_argument("--train", required=True, metavar="SHARDS", help="training images with labels")
    parser.add_argument("--val", required=True, metavar="DATA", help="test images: shards or a directory")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="directory for the probe and the results")
    parser.add_argument("--features", choices=("encoder", "cnn", "decoder"),
                        help="without --gpt: which of the tokenizer's features (default: encoder)")
    parser.add_argument("--depth", type=int, metavar="N",
                        help="with --gpt: after which block (default: the middle one)")
    parser.add_argument("--no-dropout", action="store_true",
                        help="with --gpt: features without dropout in training, too (the original leaves it active)")
    parser.add_argument("--epochs", type=int, default=90, metavar="N", help="default: 90")
    parser.add_argument("--warmup-epochs", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--base-lr", type=float, default=0.1, metavar="LR", help="for a batch of 256 (default: 0.1)")
    parser.add_argument("--batch-size", type=int, default=1024, metavar="N",
                        help="of all ranks (default: 1024, 128 for each of 8 GPUs)")
    parser.add_argument("--no-flip", action="store_true", help="do not mirror images, for classes that it would change")
    add_orient(parser)
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes of a rank that decode images")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.checkpoint.standalone import check_same_codes
    from gigatok_ds.errors import InputError
    from gigatok_ds.evaluation.probing.linear_probe import ProbeSettings
    from gigatok_ds.evaluation.results import in_words
    from gigatok_ds.measurements.into_directory import measure_into
    from gigatok_ds.measurements.measure_probe import ProbedFeatures, measure_probe

    if args.gpt is None and (args.depth is not None or args.no_dropout):
        raise InputError("--depth and --no-dropout belong to --gpt; a tokenizer's features are named by --features")
    if args.gpt is not None and args.features is not None:
        raise InputError("--features are the tokenizer's; with --gpt leave them out")
    if args.gpt is not None:
        check_same_codes(args.gpt, args.tokenizer, "give that one")
    of = ProbedFeatures(tokenizer=args.tokenizer, of_tokenizer=args.features or "encoder", gpt=args.gpt,
                        depth=args.depth, dropout=not args.no_dropout)
    settings = ProbeSettings(epochs=args.epochs, warmup_epochs=args.warmup_epochs, base_lr=args.base_lr,
                             batch_size=args.batch_size, flip=not args.no_flip, orient=bool(args.orient),
                             seed=args.seed)
    results = measure_into(args.out, args.device, partial(
        measure_probe, of, args.train, args.val, args.out, settings=settings, workers=args.workers))
    if results:
        for name, value in results.figures.items():
            print(f"{name}: {in_words(value)}")
        print(f"wrote {args.out / 'results.html'}")
    return 0
