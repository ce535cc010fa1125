"""Encode and decode a directory of images with a standalone tokenizer.

Each image is center-cropped to the tokenizer's size; its reconstruction is written as PNG under the same name, and
the mean PSNR is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "images -> codes -> images, with PSNR"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", type=Path, help="standalone tokenizer checkpoint")
    parser.add_argument("images", type=Path, help="directory of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the reconstructions")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.checkpoint.standalone import load_tokenizer
    from gigatok_ds.precision import float32_arithmetic
    from gigatok_ds.sampling.reconstruct_images import reconstruct_folder

    tokenizer = load_tokenizer(args.tokenizer, device=args.device)
    with float32_arithmetic():
        count, mean = reconstruct_folder(tokenizer, args.images, args.out)
    print(f"wrote {count} reconstructions to {args.out}; mean PSNR {mean:.2f} dB")
    return 0
