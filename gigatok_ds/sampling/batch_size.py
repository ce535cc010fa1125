"""How many images to draw at a time: on a GPU reading the weights once a step should serve as many as memory holds."""

from __future__ import annotations

import torch

from gigatok_ds.models.gpt import GPT

ON_CPU = 32
MOST = 512  # beyond that, reading keys and values takes most of a step, and that grows with the batch
SHARE = 0.5  # of a GPU's memory: the rest is for the tokenizer, work space and what else runs there
_CHOOSING = 128  # bytes for each code of the vocabulary: logits, their order and distribution in float64


def default_batch_size(gpt: GPT) -> int:
    """Images at a time for this model where it lies; the same on every GPU of a kind, whatever else runs there."""
    device = gpt.norm.weight.device
    if device.type != "cuda":
        return ON_CPU
    return fitting_batch_size(gpt, torch.cuda.get_device_properties(device).total_memory)


def fitting_batch_size(gpt: GPT, memory: int) -> int:
    """The largest power of two, up to MOST, of guided images that SHARE of `memory` bytes holds; at least 1."""
    config, size = gpt.config, gpt.norm.weight.element_size()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in gpt.parameters())
    past = 2 * config.transformer.layers * config.transformer.width * config.sequence_length * size
    image = 2 * past + _CHOOSING * config.vocab_size  # both halves of a guided pair
    fitting = int((SHARE * memory - weights) // image)
    return min(MOST, 1 << max(fitting, 1).bit_length() - 1)
