"""Encode and decode a directory of images with a standalone tokenizer.

Each image is center-cropped to the tokenizer's size; its reconstruction is written as PNG under the same name, and
the mean PSNR is printed. --size 384x256 (height x width) takes images of another size or shape: the network takes any
that its cells divide, positions are interpolated, and what it was not trained on comes out worse.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

HELP = "images -> codes -> images, with PSNR"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", type=Path, help="standalone tokenizer checkpoint")
    parser.add_argument("images", type=Path, help="directory of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the reconstructions")
    parser.add_argument("--size", type=height_and_width, metavar="HxW", help="height x width in pixels of another "
                        "size (default: the tokenizer's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def height_and_width(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a height and a width in pixels, such as 384x256")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.checkpoint.standalone import load_tokenizer
    from gigatok_ds.precision import float32_arithmetic
    from gigatok_ds.sampling.reconstruct_images import reconstruct_folder

    tokenizer = load_tokenizer(args.tokenizer, device=args.device)
    if args.size:
        tokenizer.set_image_shape(*args.size)
    with float32_arithmetic():
        count, mean = reconstruct_folder(tokenizer, args.images, args.out)
    print(f"wrote {count} reconstructions to {args.out}; mean PSNR {mean:.2f} dB")
    return 0
