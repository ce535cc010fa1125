"""The residual discriminator of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958): one logit for a whole image.

As in the original GigaTok it has neither a minibatch standard deviation nor equalized learning rates. Parameter names
and shapes are the original's.
"""

from __future__ import annotations

from torch import Tensor, nn

from gigatok_ds.models.discriminators.blur import BinomialBlur
from gigatok_ds.models.layout import laid_out
from gigatok_ds.streams import SampleDraws

SLOPE = 0.2  # of every leaky ReLU
WIDTH_SIZE = 256  # the resolution at which there are `base_channels` channels
MAX_MULTIPLIER = 8  # channels stop growing at this many times `base_channels`
LAST_SIZE = 4  # the side at which features are flattened


class StyleGANDiscriminator(nn.Module):
    """Residual blocks that halve the side down to 4, a convolution and two linear layers.

    Channels double with every halving: `base_channels` at 256 pixels, at most 8 times as many. Weights start as torch's
    layers do, from torch's own generator: whoever builds a discriminator seeds it.
    """

    lecam: nn.Module | None  # given by losses.composition.build_discriminator

    def __init__(self, image_size: int, in_channels: int = 3, base_channels: int = 64):
        """image_size: the side of the images, a power of two from 8 on."""
        super().__init__()
        width = channels_at(image_size, base_channels)
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), _activation()]
        while image_size > LAST_SIZE:
            image_size //= 2
            before, width = width, channels_at(image_size, base_channels)
            blocks.append(_HalvingBlock(before, width))
        self.blocks = nn.Sequential(*blocks)
        self.final_conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), _activation())
        self.final_linear = nn.Sequential(
            nn.Linear(width * LAST_SIZE**2, width), _activation(), nn.Linear(width, 1)
        )

    def forward(self, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """Logits (B, 1) of images (B, 3, H, W) in [-1, 1]; high means real.

        `draws` is there because discriminators that augment share this signature; nothing is drawn here.
        """
        # The image losses stay in float32 while DeepSpeed may have cast the network.
        images = laid_out(images.to(next(self.blocks[0].parameters()).dtype))
        features = self.final_conv(self.blocks(images))
        return self.final_linear(features.flatten(1))


def channels_at(size: int, base_channels: int) -> int:
    """Channels of feature maps with this side: 64 at 256, 128 at 128, ... 512 from 32 down, for 64 base channels."""
    return max(1, min(MAX_MULTIPLIER * base_channels, base_channels * WIDTH_SIZE // size))


class _HalvingBlock(nn.Module):
    """(f(x) + shortcut(x)) / sqrt(2), both at half the side: the variance of x is kept."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1), _activation(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1), _activation(),
        )
        self.downsample = nn.Sequential(
            BinomialBlur(3), nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.downsample(self.net(x)) + self.conv_res(x)) * 0.5**0.5


def _activation() -> nn.LeakyReLU:
    # In place, because nothing needs what comes before it, and feature maps at full resolution are large.
    return nn.LeakyReLU(SLOPE, inplace=True)
