"""Train a small tokenizer and GPT on real images, sample from them, export both, and write a report.

Without --data it uses the 1,797 handwritten digits that scikit-learn ships and states figures against targets. With
--data DIR it does the same for your own images, one sub-directory per class. The same trainer, losses and DeepSpeed
engine run here as for the published sizes. Running the command again continues where it stopped.

  gigatok-ds demo --out runs/demo
  gigatok-ds demo --out runs/photos --data ~/photos --tokenizer model.image_size=64 --tokenizer data.flip=true
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "the whole system on real images in minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run directory; continued if it exists")
    parser.add_argument("--data", type=Path, metavar="DIR", help="your own images, a sub-directory for each class")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes to train with (default: 1)")
    parser.add_argument("--tp", type=int, default=1, metavar="N",
                        help="of these, N share each layer (tensor parallel; default: 1)")
    parser.add_argument("--zero", type=int, choices=range(4), default=1, help="ZeRO stage (default: 1)")
    parser.add_argument("--tokenizer", action="append", default=[], metavar="key=value",
                        help="setting of the tokenizer's recipe; may be repeated")
    parser.add_argument("--gpt", action="append", default=[], metavar="key=value",
                        help="setting of the GPT's recipe; may be repeated")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.config.load import load_recipe
    from gigatok_ds.config.recipe import TokenizerRecipe
    from gigatok_ds.demo.demo_report import format_number
    from gigatok_ds.demo.pipeline import Demo
    from gigatok_ds.demo.source import digits_source, folder_source
    from gigatok_ds.demo.workspace import DemoOptions
    from gigatok_ds.errors import InputError

    if args.ranks < 1:
        raise InputError(f"--ranks is {args.ranks}; it must be at least 1")
    recipe = load_recipe("demo_tokenizer", args.tokenizer)
    assert isinstance(recipe, TokenizerRecipe)
    source = folder_source(args.data) if args.data else digits_source(recipe.model.image_size)
    if args.tp < 1 or args.ranks % args.tp:
        raise InputError(f"--tp is {args.tp}; it must divide the {args.ranks} ranks of --ranks")
    options = DemoOptions(ranks=args.ranks, tensor=args.tp, stage=args.zero, tokenizer=tuple(args.tokenizer),
                          gpt=tuple(args.gpt))
    figures = Demo(source, args.out, options).run()
    for figure in figures:
        verdict = {None: "", True: "pass", False: "FAIL"}[figure.passed]
        print(f"{figure.name:36s} {format_number(figure.value):>8s} {figure.unit:14s} {figure.target or '':26s} "
              f"{verdict}")
    print(f"report: {args.out / 'report.html'}")
    return 1 if any(figure.passed is False for figure in figures) else 0
