"""Encode image shards with a standalone tokenizer into code shards, the training data of a GPT.

  gigatok-ds extract-codes runs/export/tokenizer shards/train --out codes/train --crops ten-crop
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "image shards + tokenizer -> code shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", type=Path, help="standalone tokenizer checkpoint")
    parser.add_argument("shards", type=Path, help="directory of image shards")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of code shards to write")
    parser.add_argument("--crops", default="ten-crop", metavar="KIND",
                        help="center, flip, ten-crop (default, as GigaTok) or random-N")
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.checkpoint.standalone import load_tokenizer
    from gigatok_ds.sampling.extract import extract_codes, views_of

    tokenizer = load_tokenizer(args.tokenizer, device=args.device)
    views = views_of(args.crops, tokenizer.config.image_size)
    provenance = {"tokenizer": args.tokenizer.name, "crops": args.crops}
    extract_codes(tokenizer, args.shards, args.out, views=views, provenance=provenance, batch_size=args.batch_size)
    print(f"wrote {args.out}")
    return 0
