"""Attention of every recipe is what a flash kernel takes: recorded while a step is rehearsed without storage.

torch asks for a GPU before it says which kernel it would choose, so the conditions are its own
(aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, use_flash_attention), written out.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from gigatok_ds.config.load import load_recipe, recipe_names
from gigatok_ds.config.model import CNNConfig
from gigatok_ds.dry_run.dry_run import Rehearsal
from gigatok_ds.models.cnn import CNNEncoder

LAYERS = 3  # are like all the others
RECIPES = [name for name in recipe_names() if not name.startswith("demo")]
ALIKE = ("GPT-L", "GPT-XL", "GPT-XXL", "VQ_SB256", "VQ_SB256_2d", "VQ_BL256", "VQ_BL256_2d", "VQ_BL256_train_new")


@dataclasses.dataclass
class Call:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def obstacles(self) -> list[str]:
        """Why a flash kernel would not take it as it is; empty if it would."""
        tensors = (self.query, self.key, self.value)
        width = self.query.shape[-1]
        found = {
            "a mask": self.attn_mask is not None,
            "not four axes": any(tensor.dim() != 4 for tensor in tensors),
            "not half precision": any(tensor.dtype not in (torch.float16, torch.bfloat16) for tensor in tensors),
            "several types": len({tensor.dtype for tensor in tensors}) > 1,
            "heads of several widths": len({tensor.shape[-1] for tensor in tensors}) > 1,
            f"heads of {width}, which would be padded": width % 8 != 0,
            f"heads of {width}, above 256": width > 256,
            "strided features": any(tensor.stride(-1) != 1 for tensor in tensors),
            "no tokens": any(tensor.shape[-2] == 0 for tensor in tensors),
            "causal, not square": self.is_causal and self.query.shape[-2] != self.key.shape[-2],
        }
        return [obstacle for obstacle, there in found.items() if there]


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen: list[Call] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.seen.append(Call(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def shallow(recipe):
    """The recipe with few layers of its transformers, which says nothing else of them."""
    model = recipe.model
    parts = {"size": model.transformer} if recipe.kind == "gpt" else {"encoder": model.encoder_size,
                                                                     "decoder": model.decoder_size}
    sizes = {name: dataclasses.replace(size, layers=min(size.layers, LAYERS)) for name, size in parts.items()}
    return dataclasses.replace(recipe, model=dataclasses.replace(model, **sizes))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in RECIPES])
def test_a_flash_kernel_takes_all_attention_of_a_recipe(name):
    recipe = shallow(load_recipe(name))
    rehearsal = Rehearsal(recipe)
    with Calls() as calls:
        rehearsal.micro_batch(8, recipe.training.steps)
    if recipe.kind == "gpt":
        networks = LAYERS
    else:
        attentions = 2 if recipe.model.layout == "1d" or recipe.model.layer_2d != "self" else 1
        teacher = 12 if recipe.loss.semantic else 0
        # DINO's ViT-S looks at what is made, then at that and at the images for the discriminator's own step.
        judged = 3 * 12 if recipe.loss.adversarial.discriminator == "dino" else 0
        networks = 2 * LAYERS * attentions + teacher + judged
    assert len(calls.seen) == networks
    assert [call.obstacles() for call in calls.seen] == [[]] * networks
    # And no product of matrices is of a size that tensor cores would pad: all are multiples of 64.
    sizes = {size for network in rehearsal.trained.values() for module in network.modules()
             if isinstance(module, torch.nn.Linear) for size in module.weight.shape}
    assert sizes and not any(size % 64 for size in sizes)


def test_the_conditions_are_noticed():
    q = torch.empty(2, 4, 8, 64, dtype=torch.bfloat16, device="meta")
    assert Call(q, q, q).obstacles() == [] and Call(q, q, q, is_causal=True).obstacles() == []
    for call in (Call(q, q, q, attn_mask=q), Call(q[0], q[0], q[0]), Call(q.float(), q.float(), q.float()),
                 Call(q[..., :60], q[..., :60], q[..., :60]), Call(q.mT, q.mT, q.mT), Call(q, q[:, :, :4], q[:, :, :4],
                                                                                           is_causal=True)):
        assert len(call.obstacles()) == 1


def test_the_cnns_attention_has_the_axes_of_a_fused_kernel():
    """It is no recipe's. With the default channels its one head is 512 wide: more than flash attention takes, so that
    torch's memory-efficient kernel does, which has no such limit."""
    with Calls() as calls, FakeTensorMode(), torch.device("cuda"):
        CNNEncoder(CNNConfig(attention=True), 256)(torch.empty(2, 3, 32, 32))
    assert len(calls.seen) == 3
    assert {tuple(call.obstacles()) for call in calls.seen} == {("not half precision", "heads of 512, above 256")}
