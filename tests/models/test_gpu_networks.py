"""What networks ask of a GPU, on tensors of a GPU's that have no storage: layouts, operations, types."""

import pytest
import torch
from dispatch_modes import Counter, Layouts
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gigatok_ds.compat import timm_library
from gigatok_ds.config.model import CNNConfig
from gigatok_ds.kernels import group_norm_ops
from gigatok_ds.losses.feature_distance import ResNetLogits, resnet_file
from gigatok_ds.losses.perceptual import load_lpips
from gigatok_ds.models.cnn import CNNDecoder, CNNEncoder
from gigatok_ds.models.discriminators.dino import DinoDiscriminator
from gigatok_ds.models.discriminators.patchgan import PatchGAN
from gigatok_ds.models.discriminators.stylegan import StyleGANDiscriminator
from gigatok_ds.models.frozen.pretrained_files import RANDOM
from gigatok_ds.models.gpt import RMSNorm
from gigatok_ds.models.rotary import rotary_table, rotate

CNN = CNNConfig(base_channels=32, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2), residual_blocks=1,
                attention=True)


class Lpips(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = load_lpips(RANDOM)

    def forward(self, images):
        return self.network(images, images.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("build, side", [
    (lambda: torch.nn.Sequential(CNNEncoder(CNN, 16), CNNDecoder(CNN, 16)), 16),
    (lambda: PatchGAN(base_channels=8), 64),
    (lambda: PatchGAN(base_channels=8, blur=True), 64),
    (lambda: StyleGANDiscriminator(32, base_channels=8), 32),
    (Lpips, 32),
    (lambda: ResNetLogits(resnet_file(RANDOM)), 32),
], ids=["CNN", "PatchGAN", "blurring PatchGAN", "StyleGAN", "LPIPS", "ResNet"])
def test_no_convolution_on_a_gpu_turns_a_map_around(build, side):
    network = build()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        parameters = {name: torch.empty(value.shape, dtype=value.dtype)
                      for name, value in [*network.named_parameters(), *network.named_buffers()]}
        with Layouts() as layouts, Counter() as counter:
            torch.func.functional_call(network, parameters, torch.empty(5, 3, side, side))
    assert layouts.convolutions > 0
    assert "native_group_norm" not in counter.names or not group_norm_ops.HAS_TRITON


def test_rms_norm_is_one_kernel_on_a_gpu():
    with FakeTensorMode(), torch.device("cuda"):
        norm, x = RMSNorm(768, 1e-5), torch.empty(257, 4, 768)
        with Counter() as counter:
            y = norm(x)
    assert [name for name in counter.names if name != "device"] == ["_fused_rms_norm"] and y.dtype == x.dtype


def test_rotary_positions_are_four_operations():
    x = torch.empty(2, 4, 17, 64, dtype=torch.bfloat16, device="meta")
    with Counter() as counter:
        y = rotate(x, torch.empty(17, 2, 64, device="meta"))
    assert counter.names == ["flip", "mul", "addcmul", "_to_copy"] and y.dtype == x.dtype


def test_rotary_positions_turn_pairs():
    table = rotary_table(3, 8, torch.device("cpu"))
    x = torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.atan2(table[:, 1, 1::2], table[:, 0, ::2])
    length = table[:, 0, ::2].square() + table[:, 1, 1::2].square()  # 0 for the class, else 1
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(length.round(), angles)
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-6)


class Products(TorchDispatchMode):
    """Types of matrix products and convolutions, and what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.types, self.waits = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        if name in ("addmm", "mm", "bmm", "convolution"):
            self.types.add(next(arg.dtype for arg in args if isinstance(arg, torch.Tensor)))
        if name in ("_local_scalar_dense", "lift_fresh", "nonzero"):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dino_computes_in_the_type_of_its_heads_and_never_waits(dtype):
    torch.manual_seed(0)
    backbone = timm_library().models.VisionTransformer(patch_size=16, embed_dim=12, depth=12, num_heads=2,
                                                       num_classes=0)
    network = DinoDiscriminator(backbone).eval()
    exact = network.activations(images := torch.rand(2, 3, 224, 224) * 2 - 1)
    network.heads.to(dtype)
    with Products() as products, torch.no_grad():
        network(images)
    assert products.types == {dtype} and products.waits == []
    assert backbone.cls_token.dtype == torch.float32
    ours = network.activations(images, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    for own, other in zip(ours, exact, strict=True):
        assert (own - other).abs().max() <= (0 if dtype == torch.float32 else 5e-2) * other.abs().max()
