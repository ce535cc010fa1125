"""gigatok_ds: training, converting and running GigaTok image tokenizers and generators.

The names below load what they need on first use, so importing the package is cheap and needs neither DeepSpeed nor
Megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gigatok_ds.errors import InputError

if TYPE_CHECKING:
    from gigatok_ds.checkpoint.standalone import load_gpt, load_tokenizer
    from gigatok_ds.hub import HubGPT, HubTokenizer
    from gigatok_ds.sampling.generate import generate

__version__ = "0.1.0"
__all__ = ["HubGPT", "HubTokenizer", "InputError", "generate", "load_gpt", "load_tokenizer"]

_HOME = {
    "HubGPT": "gigatok_ds.hub",
    "HubTokenizer": "gigatok_ds.hub",
    "generate": "gigatok_ds.sampling.generate",
    "load_gpt": "gigatok_ds.checkpoint.standalone",
    "load_tokenizer": "gigatok_ds.checkpoint.standalone",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
