"""The option of commands that read images, which `data.orient` is in training."""

from __future__ import annotations

import argparse


def add_orient(parser: argparse.ArgumentParser, which: str = "") -> None:
    """`which` says what of a command it is for."""
    parser.add_argument("--orient", action="store_true", default=None,
                        help=f"{which}take images as a viewer shows them: turned as their EXIF data say, transparency "
                             "over white (as training with data.orient=true; default: their stored pixels, as the "
                             "original)")
