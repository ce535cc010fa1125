"""Cases of the group norm kernels; as a program it runs them by Triton's interpreter, which must be switched on before
Triton is imported: `TRITON_INTERPRET=1 python group_norm_cases.py quick RESULTS`.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
# Of the largest value: rounding to the result's type, and in float32 what the mean's own rounding makes of a map far
# from zero.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    shape: tuple[int, int, int, int]
    groups: int
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    spread: float = 3.0
    silu: bool = True
    per_sample: bool = False
    chunks: int = 256  # about as many as a sample is cut into

    def inputs(self) -> list[Tensor]:
        """x, weight, bias and the gradient from above, as they are given to the kernels."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        batch, channels = self.shape[:2]
        parameter = (batch, channels) if self.per_sample else (channels,)
        maps = [self.spread * draw(*self.shape) + self.mean, draw(*self.shape)]
        x, upstream = (map.to(self.dtype).contiguous(memory_format=torch.channels_last) for map in maps)
        return [x, draw(*parameter).to(self.dtype), draw(*parameter).to(self.dtype), upstream]

    def expected(self) -> list[Tensor]:
        """y and the gradients at x, weight and bias in float64, by autograd."""
        *given, upstream = (tensor.double() for tensor in self.inputs())
        x, weight, bias = (tensor.requires_grad_() for tensor in given)
        shape = (-1, self.shape[1], 1, 1)
        y = F.group_norm(x, self.groups, eps=EPS) * weight.view(shape) + bias.view(shape)
        y = F.silu(y) if self.silu else y
        return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), upstream)]

    def interpreted(self) -> list[Tensor]:
        """The same by the kernels."""
        from gigatok_ds.kernels import group_norm_ops, group_norm_triton

        group_norm_triton._CHUNKS = self.chunks
        *given, upstream = self.inputs()
        given = [tensor.requires_grad_() for tensor in given]
        y = group_norm_ops.group_norm(*given, self.groups, EPS, silu=self.silu)
        return [y.detach(), *torch.autograd.grad(y, given, upstream)]


HALF = torch.bfloat16
# Positions that fill no tile, several tiles in a chunk, several chunks and blocks of channels, groups of odd size.
CASES = {
    "quick": {
        "far from zero": Case(shape=(1, 8, 31, 35), groups=2, mean=2000.0, chunks=2),
        "bfloat16, a weight for each sample": Case(shape=(2, 6, 9, 17), groups=2, dtype=HALF, silu=False,
                                                   per_sample=True),
    },
    "slow": {
        "plain": Case(shape=(2, 8, 5, 6), groups=2),
        "bfloat16": Case(shape=(2, 6, 9, 17), groups=2, dtype=HALF),
        "many groups": Case(shape=(1, 32, 16, 16), groups=32),
        # Of two values alone the gradient would vanish, and rounding with it be all that is left to compare.
        "one position": Case(shape=(3, 16, 1, 1), groups=2),
        "one sample, odd sides, three members": Case(shape=(1, 96, 17, 13), groups=32),
        "wide": Case(shape=(1, 1024, 16, 16), groups=8, dtype=HALF),
        "two blocks of channels": Case(shape=(2, 256, 7, 5), groups=8),
        "more than a block, not a multiple": Case(shape=(1, 150, 7, 5), groups=3),
        "half precision": Case(shape=(2, 64, 16, 16), groups=4, dtype=torch.float16),
        "half precision without SiLU": Case(shape=(2, 64, 16, 16), groups=4, dtype=torch.float16, silu=False),
        "bfloat16 far from zero": Case(shape=(1, 32, 16, 16), groups=4, dtype=HALF, mean=300.0, spread=30.0),
        "a weight for each sample and SiLU": Case(shape=(3, 64, 9, 9), groups=4, per_sample=True),
        "very far from zero": Case(shape=(1, 8, 64, 64), groups=2, mean=1e5, chunks=3),
        "many chunks": Case(shape=(1, 8, 128, 130), groups=2, mean=-50.0),
        "large": Case(shape=(1, 32, 128, 128), groups=4, chunks=4),
        "seventeen samples": Case(shape=(17, 8, 4, 4), groups=2),
    },
}


def main(cases: str, results: str) -> None:
    # Twice, because what repeats to the bit is to do so.
    torch.save({name: [case.interpreted(), case.interpreted()] for name, case in CASES[cases].items()}, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
