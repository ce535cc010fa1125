"""Turn an original GigaTok checkpoint (.pt, tokenizer or GPT) into a standalone checkpoint.

  gigatok-ds import-gigatok VQ_BL256_e200.pt --recipe VQ_BL256 --out checkpoints/tokenizer-bl
  gigatok-ds import-gigatok 0300000.pt --recipe GPT-B model.positions=rope_2d --out checkpoints/gpt-b-2d

Nothing in the file is executed: a file that holds anything but tensors and plain data is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "original GigaTok .pt -> standalone checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.pt", help="original checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="recipe settings, where the model was another")
    parser.add_argument("--recipe", required=True, metavar="NAME", help="the recipe it was trained with")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="standalone checkpoint to write")
    parser.add_argument("--weights", choices=("ema", "model"),
                        help="which weights to take (default: as the original does: a tokenizer's ema if present, "
                             "else model; a GPT's model)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.checkpoint.original import from_original, read_original
    from gigatok_ds.checkpoint.standalone import check_destination, save_standalone
    from gigatok_ds.config.load import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    check_destination(args.out)
    weights = read_original(args.file, args.weights, kind=recipe.kind)
    config, weights = from_original(recipe.model, weights, str(args.file))
    provenance = {"recipe": recipe.name, "source": args.file.name, "weights": args.weights or "default"}
    print(f"wrote {save_standalone(args.out, config, weights, provenance=provenance)}")
    return 0
