"""A GPT with its projections packed for decoding on a CPU.

The plain product is not made for the few rows of a decoding step. The packed ones are faster, and add up each row's
products in the same order for any number of rows (from two on) and any number of threads
(tests/sampling/test_sampling.py). So the codes of an image do not depend on its company. They are our native kernel or,
without it, oneDNN's.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from gigatok_ds.cpu.few_row_product import few_row_product, has_few_row_product, in_panels
from gigatok_ds.cpu.hugepages import large_empty
from gigatok_ds.models.gpt import GPT

# The oneDNN of torch 2.11 adds up in another order for other numbers of rows; that of 2.14 does not.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and TorchVersion(torch.__version__) >= "2.14"
FEWEST_ROWS = 2  # oneDNN's product with one row runs another kernel, which adds up in another order
_ROWS = 16  # what oneDNN packs weights for; any number works


class PanelLinear(nn.Module):
    """(..., in) to (..., out), of a layer without bias, by the native kernel."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        panels = in_panels(layer.weight.detach())
        self.panels, self.columns = large_empty(panels.shape, panels).copy_(panels), layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return few_row_product(x, self.panels, self.columns)


class OneDNNLinear(nn.Module):
    """The same by oneDNN."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def with_steady_rows(gpt: GPT) -> tuple[GPT, int | None]:
    """What to decode with, and how many rows it needs at least for a row's logits not to depend on its company.

    Here that is a packed copy; where none is possible, the model itself and None: they do depend on it.
    """
    return (packed(gpt), FEWEST_ROWS) if can_pack(gpt) else (gpt, None)


def can_pack(gpt: GPT) -> bool:
    """Whether a GPT is on a CPU, in float32, of full layers without a bias, and something multiplies packed ones."""
    weight = gpt.output.get_parameter("weight")
    return (gpt.config.conditioning == "prefix" and isinstance(gpt.output, nn.Linear) and weight.device.type == "cpu"
            and weight.dtype == torch.float32 and (HAS_ONEDNN or has_few_row_product(weight)))


def packed(gpt: GPT) -> GPT:
    """A copy of `gpt` in evaluation mode with packed projections; it shares all other parameters."""
    shared = {id(tensor): tensor for tensor in [*gpt.parameters(), *gpt.buffers()]}
    kind = PanelLinear if has_few_row_product(gpt.output.get_parameter("weight")) else OneDNNLinear
    result = copy.deepcopy(gpt, shared).eval()
    for module in list(result.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and layer.bias is None:
                setattr(module, name, kind(layer))
    return result
