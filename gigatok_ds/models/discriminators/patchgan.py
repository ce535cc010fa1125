"""The PatchGAN discriminator: it judges overlapping patches instead of whole images (Isola et al. 2017)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.models.discriminators.blur import BinomialBlur
from gigatok_ds.models.layout import laid_out
from gigatok_ds.parallel.reduce import RankMean
from gigatok_ds.streams import SampleDraws

SLOPE = 0.2  # of every leaky ReLU
MAX_MULTIPLIER = 8  # channels stop growing at this many times the first layer's


class Float32BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that computes in float32 and returns its input's dtype.

    DeepSpeed casts parameters and leaves buffers in float32; torch's own refuses that mixture. With `average`, batch
    statistics are those of the batches of all its ranks together.
    """

    # Of what torch's may lack this one has all.
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, average: RankMean | None = None):
        super().__init__(channels)
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        if self.training and self.average:
            return self._normalized_over(self.average, x.float()).to(x.dtype)
        weight, bias = self.weight.float(), self.bias.float()
        normalized = F.batch_norm(x.float(), self.running_mean, self.running_var, weight, bias,
                                  self.training, self.momentum, self.eps)
        return normalized.to(x.dtype)

    def _normalized_over(self, average: RankMean, x: Tensor) -> Tensor:
        mean = average(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = average(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = average.size * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight.float()
        return centred * scale[:, None, None] + self.bias.float()[:, None, None]


class PatchGAN(nn.Module):
    """Convolutions that halve the side `layers` times, then two at stride 1; batch norm in between.

    Convolution and norm weights start from N(0, 0.02) and N(1, 0.02), drawn from torch's own generator like
    the biases' defaults: whoever builds a discriminator seeds it. Batch statistics are those of one call, on this
    rank or, with `average`, on all its ranks. With `blur`, what halves the side is not the convolution but a blur
    behind the activation.
    """

    lecam: nn.Module | None  # given by losses.composition.build_discriminator

    def __init__(self, in_channels: int = 3, base_channels: int = 64, layers: int = 3, kernel_size: int = 4,
                 average: RankMean | None = None, blur: bool = False):
        super().__init__()
        widths = [base_channels * min(2**level, MAX_MULTIPLIER) for level in range(layers + 1)]
        halving = 1 if blur else 2
        modules = [nn.Conv2d(in_channels, widths[0], kernel_size, stride=halving, padding=1), nn.LeakyReLU(SLOPE)]
        for level, (before, after) in enumerate(pairwise(widths), start=1):
            if blur:
                modules.append(BinomialBlur(4, stride=2))
            stride = halving if level < layers else 1
            modules += [
                nn.Conv2d(before, after, kernel_size, stride=stride, padding=1, bias=False),
                Float32BatchNorm2d(after, average),
                nn.LeakyReLU(SLOPE),
            ]
        modules.append(nn.Conv2d(widths[-1], 1, kernel_size, padding=1))
        self.main = nn.Sequential(*modules)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """Logits (B, 1, h, w) of images (B, 3, H, W) in [-1, 1]; high means real.

        `draws` is there because discriminators that augment share this signature; nothing is drawn here.
        """
        # The image losses stay in float32 while DeepSpeed may have cast the network.
        return self.main(laid_out(images.to(next(self.main[0].parameters()).dtype)))
