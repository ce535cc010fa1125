"""torch.ops.gigatok: the quantizer's heavy operations as custom operators, and functions around them.

Latents are (N, D), the codebook (K, D), of any floating dtype and memory layout. Arithmetic is float32, or float64 when
an input is; autocast has no say. Each call runs the native kernel for its device if there is one and else
`kernels.reference`; GIGATOK_KERNELS=native or torch forces one of the two. No operator holds an N x K matrix.

`strict` refuses latents and codes that are not finite, naming the first, for which the host waits for the device.
Without it nothing waits: such a latent gets the index -1 and its statistics are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gigatok_ds.errors import InputError
from gigatok_ds.kernels import native, reference


class Assignment(NamedTuple):
    """The soft assignment p_n = softmax(-|z_n - e_k|^2 / temperature) of each latent, in nats.

    entropy (N,): H(p_n); average_probability (K,): the mean of p_n over n; log_sum_exp (N,): of
    -|z_n - e_k|^2 / temperature over k, without gradient; codes (N,) int64: the nearest code.
    """

    entropy: Tensor
    average_probability: Tensor
    log_sum_exp: Tensor
    codes: Tensor


def nearest_code(latents: Tensor, codebook: Tensor, *, strict: bool = True) -> Tensor:
    """Index (N,) int64 of the nearest of K codes for each of N latents; the lowest index wins a tie.

    A code that is not finite is never nearest. With `strict`, InputError when an input is not finite.
    """
    return torch.ops.gigatok.nearest_code(latents, codebook, strict)


def assignment_statistics(latents: Tensor, codebook: Tensor, temperature: float = 0.01, *,
                          strict: bool = True) -> Assignment:
    """Nearest codes and the statistics of the soft assignment, differentiable once in latents and codebook.

    The backward pass computes distances again instead of keeping them. With `strict`, InputError when an input is not
    finite.
    """
    return Assignment(*torch.ops.gigatok.assignment_statistics(latents, codebook, temperature, strict)[:4])


def entropy_penalty(assignment: Assignment, average: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Mean entropy of each latent's soft assignment minus the entropy of the mean assignment (a scalar).

    With q the mean assignment this is mean_n H(p_n) + sum_k q_k log(q_k + 1e-5): small when assignments are confident
    and the codebook is used evenly (LFQ's entropy penalty, Yu et al. 2023, arXiv:2310.05737, applied to a learned
    codebook). `average` takes q (K,) to its mean over ranks that hold further latents.
    """
    q = assignment.average_probability
    if average is not None:
        q = average(q)
    return assignment.entropy.mean() + (q * (q + 1e-5).log()).sum()


def assignment_entropy(latents: Tensor, codebook: Tensor, temperature: float = 0.01, *,
                       average: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The entropy penalty of latents under a codebook (see `entropy_penalty`)."""
    return entropy_penalty(assignment_statistics(latents, codebook, temperature), average)


def code_histogram(codes: Tensor, size: int) -> Tensor:
    """How often each code 0 to size - 1 occurs in `codes` (integers, any shape), (size,) int64; others are left out."""
    return torch.ops.gigatok.code_histogram(codes, size)


@torch.library.custom_op("gigatok::nearest_code", mutates_args=())
def _nearest_code(latents: Tensor, codebook: Tensor, strict: bool = True) -> Tensor:
    z, e = _prepared(latents, codebook, strict)
    kernels = native.kernels_for(z, e)
    return kernels.nearest_code(z, e) if kernels else reference.nearest_code(z, e)


@_nearest_code.register_fake
def _(latents: Tensor, codebook: Tensor, strict: bool = True) -> Tensor:
    _check(latents, codebook)
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


@torch.library.custom_op("gigatok::assignment_statistics", mutates_args=())
def _assignment_statistics(latents: Tensor, codebook: Tensor, temperature: float,
                           strict: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Entropy, average probability, log-sum-exp, indices, and the state that the backward pass needs."""
    z, e = _prepared(latents, codebook, strict)
    kernels = native.kernels_for(z, e)
    forward = kernels.entropy_forward if kernels else reference.entropy_forward
    indices, entropy, average, state = forward(z, e, temperature)
    return entropy, average, state[:, 1] * math.log(2) - state[:, 0] / temperature, indices, state


@_assignment_statistics.register_fake
def _(latents: Tensor, codebook: Tensor, temperature: float, strict: bool = True):
    _check(latents, codebook)
    count, dtype = latents.shape[0], _dtype(latents, codebook)
    return (
        latents.new_empty(count, dtype=dtype),
        latents.new_empty(codebook.shape[0], dtype=dtype),
        latents.new_empty(count, dtype=dtype),
        latents.new_empty(count, dtype=torch.int64),
        latents.new_empty(count, reference.STATE_COLUMNS, dtype=dtype),
    )


@torch.library.custom_op("gigatok::assignment_gradients", mutates_args=())
def _assignment_gradients(latents: Tensor, codebook: Tensor, indices: Tensor, state: Tensor, grad_entropy: Tensor,
                          grad_average: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    z, e = _prepared(latents, codebook, strict=False)
    kernels = native.kernels_for(z, e)
    if kernels:
        gradients = kernels.entropy_backward(z, e, indices, state, grad_entropy.contiguous(),
                                             grad_average.contiguous(), temperature)
    else:
        gradients = reference.entropy_backward(z, e, grad_entropy, grad_average, temperature)
    return gradients[0].to(latents.dtype), gradients[1].to(codebook.dtype)


@_assignment_gradients.register_fake
def _(latents: Tensor, codebook: Tensor, indices: Tensor, state: Tensor, grad_entropy: Tensor, grad_average: Tensor,
      temperature: float):
    return latents.new_empty(latents.shape), codebook.new_empty(codebook.shape)


def _save(ctx, inputs, output) -> None:
    latents, codebook, ctx.temperature, _ = inputs
    _, _, log_sum_exp, indices, state = output
    ctx.save_for_backward(latents, codebook, indices, state)
    ctx.mark_non_differentiable(indices, log_sum_exp, state)


def _gradients(ctx, grad_entropy, grad_average, *unused):
    gradients = torch.ops.gigatok.assignment_gradients(*ctx.saved_tensors, grad_entropy, grad_average, ctx.temperature)
    return *gradients, None, None


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError("gigatok::assignment_statistics can be differentiated once only; its gradient has no derivative")


_assignment_statistics.register_autograd(_gradients, setup_context=_save)
_assignment_gradients.register_autograd(_no_second_derivative)


@torch.library.custom_op("gigatok::code_histogram", mutates_args=())
def _code_histogram(codes: Tensor, size: int) -> Tensor:
    codes = codes.flatten().long()
    kernels = native.kernels_for(codes)
    return kernels.code_histogram(codes, size) if kernels else reference.code_histogram(codes, size)


@_code_histogram.register_fake
def _(codes: Tensor, size: int) -> Tensor:
    return codes.new_empty(size, dtype=torch.int64)


def _dtype(latents: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (latents.dtype, codebook.dtype) else torch.float32


def _prepared(latents: Tensor, codebook: Tensor, strict: bool) -> tuple[Tensor, Tensor]:
    """Both inputs contiguous and in the dtype of the arithmetic."""
    _check(latents, codebook)
    if strict:
        _refuse_non_finite("latent", latents, "check the images and the network's weights")
        _refuse_non_finite("code", codebook, "the codebook's weights are damaged")
    dtype = _dtype(latents, codebook)
    return latents.to(dtype).contiguous(), codebook.to(dtype).contiguous()


def _check(latents: Tensor, codebook: Tensor) -> None:
    if latents.ndim != 2 or codebook.ndim != 2 or latents.shape[1] != codebook.shape[1] or codebook.shape[0] < 1:
        raise InputError(
            f"latents {tuple(latents.shape)} and codebook {tuple(codebook.shape)} must be (N, D) and (K, D) "
            "with K at least 1"
        )
    if latents.device != codebook.device:
        raise InputError(
            f"latents are on {latents.device}, the codebook is on {codebook.device}; move one to the other"
        )


def _refuse_non_finite(what: str, rows: Tensor, advice: str) -> None:
    bad = ~rows.isfinite().all(1)
    if bad.any():
        raise InputError(f"{what} {int(bad.nonzero()[0])} of {len(rows)} holds nan or inf; {advice}")
