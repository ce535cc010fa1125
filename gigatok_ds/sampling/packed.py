"""A GPT with its projections packed for oneDNN: what decoding on a CPU runs.

oneDNN's packed product is faster than the plain one for the few rows of a decoding step, and it adds up each row's
products in the same order for any number of rows from two on and any number of threads (tests/test_sampling.py). So
the codes of an image do not depend on its company.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gigatok_ds.models.gpt import GPT

FEWEST_ROWS = 2  # a product with one row runs another kernel, which adds up in another order
_ROWS = 16  # what weights are packed for; any number works


class PackedLinear(nn.Module):
    """(..., in) to (..., out), of a layer without bias."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        assert layer.bias is None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def can_pack(gpt: GPT) -> bool:
    """On a CPU, in float32, with whole layers none of which has a bias, in a torch that has oneDNN."""
    weight = gpt.output.weight
    return (gpt.config.conditioning == "prefix" and isinstance(gpt.output, nn.Linear) and weight.device.type == "cpu"
            and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available())


def packed(gpt: GPT) -> GPT:
    """A copy of `gpt` in evaluation mode with packed projections; it shares all other parameters."""
    shared = {id(tensor): tensor for tensor in [*gpt.parameters(), *gpt.buffers()]}
    result = copy.deepcopy(gpt, shared).eval()
    for module in list(result.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and layer.bias is None:
                setattr(module, name, PackedLinear(layer))
    return result
