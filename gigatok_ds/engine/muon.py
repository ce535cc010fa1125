"""Muon for hidden matrices, beside AdamW for everything else, in one optimizer that DeepSpeed calls.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), in the scale of Liu et al. 2025 (arXiv:2502.16982, section 2.2):
an update of a matrix has the root mean square that AdamW's usually has, so learning rate and decay are AdamW's.
DeepSpeed's own Muon is not used: it takes the part of a matrix that a tensor rank has for the matrix, and a packed
projection of queries, keys and values for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gigatok_ds.engine.spread_matrices import SpreadMatrix, exchange
from gigatok_ds.parallel.topology import Topology

HIDDEN = "hidden"  # of a group: whether it holds the matrices
_STEPS, _COEFFICIENTS, _SMALLEST = 5, (3.4445, -4.7750, 2.0315), 1e-7
_RMS = 0.2  # of AdamW's updates, about


def orthogonalized(matrix: Tensor) -> Tensor:
    """Nearly U V^T of the matrix (rows, columns) = U S V^T: its singular values are brought to about 1 (0.7 to 1.2).

    Five Newton-Schulz steps X <- a X + (b A + c A^2) X with A = X X^T, in the matrix's type. Zero stays zero.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_SMALLEST)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.AdamW):
    """W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonalized((1 - momentum) g + momentum M), with
    M <- momentum M + (1 - momentum) g, for groups that say `hidden`; AdamW, fused, for the others.

    M is kept as `exp_avg`. `found_inf` and `grad_scale`, scalars on the device, are those of torch's fused Adam.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, dtype: torch.dtype, **adamw: Any):
        """dtype: in which matrices are sent and orthogonalized."""
        super().__init__(groups, fused=True, **adamw)
        self.momentum, self.dtype = momentum, dtype
        self._rounds: Mapping[int, list[list[SpreadMatrix]]] = {}
        self._topology: Topology | None = None

    def spread(self, rounds: Mapping[int, list[list[SpreadMatrix]]], topology: Topology) -> None:
        """Tell where the matrices are, from `spread_matrices.rounds_of`; before the first step."""
        self._rounds, self._topology = rounds, topology

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all groups with what DeepSpeed has put into them. Collective where there are matrices."""
        groups = self.param_groups
        hidden = {parameter: group for group in groups if group[HIDDEN] for parameter in group["params"]}
        self.param_groups = [group for group in groups if not group[HIDDEN] and group["params"]]
        if self.param_groups:
            super().step()
        self.param_groups = groups
        if hidden and self._topology is not None:  # at stage 0 in bf16 DeepSpeed takes a step while it is built
            self._update(hidden, self._topology)

    def _update(self, hidden: Mapping[Tensor, dict[str, Any]], topology: Topology) -> None:
        counts = None if self.found_inf is None else 1 - self.found_inf
        for holder, group in hidden.items():
            self._take_in(holder, group, counts)
        for matrices in self._rounds[id(next(iter(hidden)))]:
            parts = [self._direction(matrix) for matrix in matrices]
            for matrix, part in zip(matrices, exchange(matrices, parts, orthogonalized, topology), strict=True):
                rate = hidden[matrix.takes.holder]["lr"] * _RMS * math.sqrt(max(matrix.full_shape))
                weights = matrix.takes.view(matrix.takes.holder)
                if counts is None:
                    weights.add_(part, alpha=-rate)
                else:
                    weights.addcmul_(part, counts, value=-rate)

    def _take_in(self, holder: Tensor, group: Mapping[str, Any], counts: Tensor | None) -> None:
        """Momentum and decay, element by element. counts: 1 for an update, 0 for one that is left out."""
        state = self.state[holder]
        if not state:
            state |= {"step": torch.zeros((), device=holder.device), "exp_avg": torch.zeros_like(holder)}
        if holder.grad is None:  # at stage 0, of what no output depends on
            holder.grad = torch.zeros_like(holder)
        if self.grad_scale is not None:
            holder.grad.div_(self.grad_scale)
        decay = group["lr"] * group["weight_decay"]
        if counts is None:
            state["step"] += 1
            state["exp_avg"].lerp_(holder.grad, 1 - self.momentum)
            holder.mul_(1 - decay)
            return
        state["step"] += counts
        holder.grad.masked_fill_(counts == 0, 0.0)  # whatever they are
        state["exp_avg"].lerp_(holder.grad, counts * (1 - self.momentum))
        holder.mul_(1 - counts * decay)

    def _direction(self, matrix: SpreadMatrix) -> Tensor:
        """Nesterov's, flat: what this rank gives of it."""
        holder = matrix.gives.holder
        assert holder.grad is not None, "see _take_in"
        momentum = matrix.gives.view(self.state[holder]["exp_avg"])
        return matrix.gives.view(holder.grad).lerp(momentum, self.momentum).to(self.dtype)
