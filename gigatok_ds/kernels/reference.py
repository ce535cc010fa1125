"""The quantizer's heavy operations in plain torch, a chunk of latents at a time: fallback and oracle of the native
ones.

Latents are (N, D), the codebook (K, D). Arithmetic is float64 whatever the inputs are: neither TF32 nor autocast
touches it, indices are those of exact arithmetic, and at D = 8 memory traffic, not arithmetic, sets the speed. With
x_nk = -|z_n - e_k|^2 / temperature the soft assignment of latent n is p_n = softmax(x_n) over the codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the (rows, K) matrices of one chunk: they should stay in a CPU's cache, and fill a GPU.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 23}
# state[:, 0] is the smallest squared distance, state[:, 1] the binary logarithm of sum_k exp(x_nk - max_k x_nk); the
# others are the native kernels' own.
STATE_COLUMNS = 4


@torch.no_grad()
def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) int64 of the nearest code; the lowest wins a tie.

    A code that is not finite is never nearest; a latent that is not, or that has no finite code, gets -1.
    """
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    for rows, z, distances in _chunks(latents, codebook):
        _, indices[rows] = _nearest(z, distances)
    return indices


@torch.no_grad()
def entropy_forward(latents: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices (N,), entropy of each latent's soft assignment (N,) in nats, mean assignment (K,), state (N, columns).

    A latent that is not finite has no entropy (NaN), and then the mean is NaN as well; of no latents it is zero.
    """
    count, dtype = len(latents), latents.dtype
    indices = torch.empty(count, dtype=torch.int64, device=latents.device)
    entropy = latents.new_empty(count)
    state = latents.new_zeros(count, STATE_COLUMNS)
    total = latents.new_zeros(len(codebook), dtype=_working_dtype(latents))
    for rows, z, distances in _chunks(latents, codebook):
        best, indices[rows] = _nearest(z, distances)
        x = (best[:, None] - distances) / temperature
        weight = x.exp()
        partition = weight.sum(1)
        state[rows, 0], state[rows, 1] = best.to(dtype), partition.log2().to(dtype)
        entropy[rows] = (partition.log() - (weight * x).sum(1) / partition).to(dtype)
        total += partition.reciprocal() @ weight
    return indices, entropy, (total / max(count, 1)).to(dtype), state


@torch.no_grad()
def entropy_backward(latents: Tensor, codebook: Tensor, grad_entropy: Tensor, grad_average: Tensor,
                     temperature: float) -> tuple[Tensor, Tensor]:
    """Gradients (N, D) and (K, D) from those at the entropies (N,) and the mean assignment (K,).

    With h and g for these two, w_nk = p_nk [(g_k - sum_j p_nj g_j) / N - h_n (log p_nk + H_n)] is the gradient at x_nk;
    it sums to zero over k, so that the one at z_n is 2 / temperature * sum_k w_nk e_k.
    """
    dtype = _working_dtype(latents)
    share = grad_average.to(dtype) / max(len(latents), 1)
    grad_latents, grad_codebook = torch.empty_like(latents), codebook.new_zeros(codebook.shape, dtype=dtype)
    codes = codebook.to(dtype)
    code_weight = share.new_zeros(len(codebook))
    for rows, z, distances in _chunks(latents, codebook):
        log_p = (distances / -temperature).log_softmax(1)
        p = log_p.exp()
        surprise = log_p - (p * log_p).sum(1, keepdim=True)
        w = p * (share - (p @ share)[:, None] - grad_entropy[rows].to(dtype)[:, None] * surprise)
        grad_latents[rows] = (w @ codes * (2 / temperature)).to(latents.dtype)
        grad_codebook += w.t() @ z
        code_weight += w.sum(0)
    grad_codebook -= codes * code_weight[:, None]
    return grad_latents, (grad_codebook * (2 / temperature)).to(codebook.dtype)


@torch.no_grad()
def code_histogram(indices: Tensor, size: int) -> Tensor:
    """How often each of the codes 0 to size - 1 occurs, (size,) int64; other values are left out."""
    known = (indices >= 0) & (indices < size)
    slots = torch.where(known, indices, size).flatten().long()
    counts = torch.zeros(size + 1, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[:size].clone()


def _chunks(latents: Tensor, codebook: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, z, distances): a slice of the latents, these in working precision, and |z - e|^2 (rows, K).

    Distances to codes that are not finite are infinite.
    """
    dtype = _working_dtype(latents)
    codes = codebook.to(dtype)
    finite = codes.isfinite().all(1)
    squares = torch.where(finite, codes.square().sum(1), torch.inf)
    codes = torch.where(finite[:, None], codes, 0).t()
    size = max(_CHUNK.get(latents.device.type, 1 << 20) // len(codebook), 1)
    for start in range(0, len(latents), size):
        rows = slice(start, start + size)
        z = latents[rows].to(dtype)
        distances = torch.addmm(squares, z, codes, alpha=-2).add_(z.square().sum(1, keepdim=True))
        yield rows, z, distances


def _nearest(z: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest distance (rows,) and the lowest index that has it, or -1.

    Matrix products round a column by its place, so that equal codes may differ in the last digits: these are ties.
    """
    best = distances.amin(1)
    slack = 16 * torch.finfo(z.dtype).eps * (z.square().sum(1) + best)
    nearest = (distances <= (best + slack)[:, None]).max(1).indices
    return best, torch.where(best.isfinite(), nearest, -1)


def _working_dtype(latents: Tensor) -> torch.dtype:
    return torch.float32 if latents.device.type == "mps" else torch.float64  # which has no float64
