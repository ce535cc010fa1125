"""Low-pass filtering before pixels are dropped, so that a discriminator is not blind to shifts (Zhang 2019)."""

from __future__ import annotations

from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.models.layout import laid_out


class BinomialBlur(nn.Module):
    """Each channel of (B, C, H, W) convolved with a `taps` x `taps` binomial kernel of sum 1.

    Gives (B, C, H/stride, W/stride), rounded up. Borders are reflected, so H and W must exceed taps // 2.
    """

    kernel: Tensor

    def __init__(self, taps: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        before, after = (taps - 1) // 2, taps // 2
        self.padding = (before, after, before, after)
        row = torch.tensor([comb(taps - 1, index) for index in range(taps)]) / 2 ** (taps - 1)
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        # Reflecting may give the default layout.
        padded = laid_out(F.pad(x, self.padding, mode="reflect"))
        return F.conv2d(padded, kernel, stride=self.stride, groups=channels)
