"""All kernels of ours on a GPU, on shapes with tails: what compute-sanitizer watches.

Inputs are made on the CPU, so that little else runs.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from gigatok_ds.kernels import native

SHAPES = ((1, 1, 8), (65, 130, 4), (100, 257, 8), (70, 300, 16), (33, 129, 32), (40, 70, 64))
TEMPERATURE = 0.01


def main() -> None:
    for count, size, dim in SHAPES:
        generator = torch.Generator().manual_seed(0)
        latents, codebook = (F.normalize(torch.randn(rows, dim, generator=generator), dim=1).cuda() for rows in (count, size))
        kernels = native.kernels_for(latents, codebook)
        for tensor_cores in ("0", "1"):
            os.environ["GIGATOK_TENSOR_CORES"] = tensor_cores
            codes = kernels.nearest_code(latents, codebook)
        state = torch.ops.gigatok.assignment_statistics(latents, codebook, TEMPERATURE)[4]
        upstream = torch.ones(count).cuda(), torch.ones(size).cuda()
        torch.ops.gigatok.assignment_gradients(latents, codebook, codes, state, *upstream, TEMPERATURE)
        torch.ops.gigatok.code_histogram(codes, size)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
