"""Networks filled with the golden weights, through the same reader that imports original checkpoints."""

import json

import numpy as np
import torch
from golden_weights import tensor
from places import GOLDEN

from gigatok_ds.checkpoint.original import build_on_meta, from_original, to_original
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer


def manifest(name):
    return json.loads((GOLDEN / f"manifest_{name}.json").read_text())


def arrays(name):
    return dict(np.load(GOLDEN / f"{name}.npz", allow_pickle=False))


def original_weights(config):
    """The golden weights under the original's names."""
    shapes = {name: value.shape for name, value in to_original(config, build_on_meta(config).state_dict()).items()}
    return {
        name: torch.zeros(shape) if name.endswith("codebook_used") else torch.from_numpy(tensor(name, shape))
        for name, shape in shapes.items()
    }


def golden_model(config):
    build = GPT if hasattr(config, "vocab_size") else Tokenizer
    with torch.device("meta"):
        model = build(config)
    _, weights = from_original(config, original_weights(config), "the golden weights")
    model.load_state_dict(weights, assign=True)
    return model.eval()
