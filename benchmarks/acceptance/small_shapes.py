"""All kernels of ours on a GPU, in CUDA C++ and in Triton, on shapes with tails: what compute-sanitizer watches.

Inputs are made on the CPU, so that little else runs.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from gigatok_ds.kernels import (
    group_norm_ops,  # noqa: F401 (it makes torch.ops.gigatok.group_norm_*)
    native,
)
from gigatok_ds.kernels.addressed_dropout import addressed_dropout
from gigatok_ds.kernels.dropout_mask import rule_of
from gigatok_ds.parallel.cross_entropy import become_gradient_, totals_and_picked

SHAPES = ((1, 1, 8), (65, 130, 4), (100, 257, 8), (70, 300, 16), (33, 129, 32), (40, 70, 64))
TEMPERATURE = 0.01


def main() -> None:
    _quantizer()
    _norm()
    _dropout_and_loss()
    torch.cuda.synchronize()


def _quantizer() -> None:
    for count, size, dim in SHAPES:
        generator = torch.Generator().manual_seed(0)
        latents, codebook = (F.normalize(torch.randn(rows, dim, generator=generator), dim=1).cuda() for rows
                             in (count, size))
        kernels = native.kernels_for(latents, codebook)
        for tensor_cores in ("0", "1"):
            os.environ["GIGATOK_TENSOR_CORES"] = tensor_cores
            codes = kernels.nearest_code(latents, codebook)
        state = torch.ops.gigatok.assignment_statistics(latents, codebook, TEMPERATURE)[4]
        upstream = torch.ones(count).cuda(), torch.ones(size).cuda()
        torch.ops.gigatok.assignment_gradients(latents, codebook, codes, state, *upstream, TEMPERATURE)
        torch.ops.gigatok.code_histogram(codes, size)


def _norm() -> None:
    for shape, groups in (((2, 6, 9, 17), 2), ((1, 150, 7, 5), 3)):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last).cuda()
        weight = torch.ones(shape[1]).cuda()
        mean, rstd = torch.ops.gigatok.group_norm_statistics(x, groups, 1e-6)
        y = torch.ops.gigatok.group_norm_normalized(x, mean, rstd, weight, weight, True)
        sums = torch.ops.gigatok.group_norm_sums(y, x, mean, rstd, weight, weight, True)
        torch.ops.gigatok.group_norm_gradients(y, x, mean, rstd, weight, weight, *sums, True)


def _dropout_and_loss() -> None:
    samples, rule = torch.tensor([3, 2**33 + 1, 70]).cuda(), torch.tensor(rule_of(9, 0.3), dtype=torch.int32).cuda()
    addressed_dropout(torch.randn(5, 3, 1537).cuda(), samples, rule, 9, 11, False)
    logits, targets = torch.randn(5, 5000).cuda(), torch.tensor([0, 4999, 7, -1, 5000]).cuda()
    totals, _ = totals_and_picked(logits, targets)
    become_gradient_(logits, targets, totals, torch.ones(5).cuda())


if __name__ == "__main__":
    main()
