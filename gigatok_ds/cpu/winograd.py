"""3x3 convolutions with padding 1 by Winograd's transform, in float32 on a CPU: F(4x4, 3x3) of Lavin and Gray 2016
(arXiv:1509.09308), a quarter of the multiplications.

The native kernels (csrc/winograd.h) bring maps to 36 points for each tile of 4 x 4 positions, and back; between these a
convolution is a matrix product for each point, and so is the gradient at its weight. It goes by strips, some rows of
tiles that stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gigatok_ds.kernels.native import kernels_on

_STEP, _POINTS = 4, 36
_TILES = 512  # of a strip
# G of F(4, 3): 6 points from 3 taps.
_OF_TAPS = torch.tensor([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
                         [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]], dtype=torch.float64)
_OF_SQUARES = torch.kron(_OF_TAPS, _OF_TAPS).float()  # (36, 9)


def has_winograd(like: Tensor) -> bool:
    """Whether there are native kernels for maps of this type on this device."""
    return like.device.type == "cpu" and like.dtype == torch.float32 and kernels_on("cpu") is not None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W) with weight (C', C, 3, 3) to (B, C', H, W), without gradient."""
    return _convolved(x, _points(_OF_SQUARES, weight), bias)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient at the input (B, C, H, W), from that (B, C', H, W) at the output."""
    # A convolution, too, with the weight turned by 180 degrees.
    return _convolved(gradient, _points(_OF_SQUARES.flip(1), weight).transpose(1, 2), None)


def _points(of_squares: Tensor, weight: Tensor) -> Tensor:
    return (of_squares @ weight.reshape(-1, 9).T).view(_POINTS, *weight.shape[:2])


def _convolved(x: Tensor, points: Tensor, bias: Tensor | None) -> Tensor:
    kernels = torch.ops.gigatok_native
    y = x.new_empty(len(x), points.shape[1], *x.shape[2:])
    before, after = _room(x), _room(y)
    for image, result in zip(x.contiguous(), y, strict=True):
        for first, count in _strips(image):
            kernels.winograd_tiles(before(count), image, first, False)
            torch.bmm(points, before(count), out=after(count))
            kernels.winograd_maps(result, after(count), first, bias)
    return y


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at the weight (C', C, 3, 3), from x (B, C, H, W) and that (B, C', H, W) at the output."""
    kernels = torch.ops.gigatok_native
    result = x.new_empty(gradient.shape[1], x.shape[1], 3, 3)
    points = x.new_zeros(_POINTS, *result.shape[:2])
    of_inputs, of_gradients = _room(x), _room(gradient)
    for inputs, outputs in zip(x.contiguous(), gradient.contiguous(), strict=True):
        for first, count in _strips(inputs):
            kernels.winograd_tiles(of_inputs(count), inputs, first, False)
            kernels.winograd_tiles(of_gradients(count), outputs, first, True)
            points.baddbmm_(of_gradients(count), of_inputs(count).transpose(1, 2))
    taps = _OF_SQUARES.T @ points.flatten(1)
    return result.copy_(taps.view(3, 3, *result.shape[:2]).permute(2, 3, 0, 1))


def _room(maps: Tensor) -> Callable[[int], Tensor]:
    """Room for the tiles (36, C, count) of any strip of maps (B, C, H, W): the same memory, which fragments it less."""
    channels = maps.shape[1]
    memory = maps.new_empty(_POINTS * channels * max(count for _, count in _strips(maps[0])))
    return lambda count: memory[: _POINTS * channels * count].view(_POINTS, channels, count)


def _strips(maps: Tensor) -> Iterator[tuple[int, int]]:
    """The first row of tiles and how many tiles, for all of maps (C, H, W) in turn."""
    down, across = (-(-side // _STEP) for side in maps.shape[1:])
    rows = max(1, _TILES // across)
    for first in range(0, down, rows):
        yield first, across * min(rows, down - first)
