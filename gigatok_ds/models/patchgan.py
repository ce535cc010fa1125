"""The PatchGAN discriminator: it judges overlapping patches instead of whole images (Isola et al. 2017)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of every leaky ReLU
MAX_MULTIPLIER = 8  # channels stop growing at this many times the first layer's


class Float32BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that computes in float32 and returns its input's dtype.

    DeepSpeed casts parameters and leaves buffers in float32; torch's own refuses that mixture.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.float(), self.bias.float()
        normalized = F.batch_norm(x.float(), self.running_mean, self.running_var, weight, bias,
                                  self.training, self.momentum, self.eps)
        return normalized.to(x.dtype)


class PatchGAN(nn.Module):
    """Convolutions that halve the side `layers` times, then two at stride 1; batch norm in between.

    Convolution and norm weights start from N(0, 0.02) and N(1, 0.02), drawn from torch's own generator like
    the biases' defaults: whoever builds a discriminator seeds it. Batch statistics are those of one call on
    one rank.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, layers: int = 3, kernel_size: int = 4):
        super().__init__()
        widths = [base_channels * min(2**level, MAX_MULTIPLIER) for level in range(layers + 1)]
        modules = [nn.Conv2d(in_channels, widths[0], kernel_size, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for level, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if level < layers else 1
            modules += [
                nn.Conv2d(before, after, kernel_size, stride=stride, padding=1, bias=False),
                Float32BatchNorm2d(after),
                nn.LeakyReLU(SLOPE),
            ]
        modules.append(nn.Conv2d(widths[-1], 1, kernel_size, padding=1))
        self.main = nn.Sequential(*modules)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (B, 1, h, w) of images (B, 3, H, W) in [-1, 1]; high means real.

        `generator` is there because discriminators that augment share this signature; nothing is drawn here.
        """
        # The image losses stay in float32 while DeepSpeed may have cast the network.
        return self.main(images.to(self.main[0].weight.dtype))
