"""`--dtype`: torch's names of types and their short forms are both taken."""

from __future__ import annotations

import argparse

_LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SHORT = {long: short for short, long in _LONG.items()}


def add_dtype(parser: argparse.ArgumentParser, of: str, *, short: bool = False) -> None:
    """Add --dtype, float32 by default; the value is one of torch's names or, with `short`, of the short ones."""
    names = _SHORT if short else _LONG
    parser.add_argument("--dtype", type=lambda text: names.get(text, text), metavar="TYPE",
                        default="fp32" if short else "float32",
                        choices=tuple(names.values()), help=f"{of}: float32, bfloat16 or float16; or fp32, bf16, fp16 "
                                                            "(default: float32)")
