"""What a rehearsal tells of a rank, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from gigatok_ds.dry_run.work import Work, from_rows


class MicroBatch(NamedTuple):
    """What one micro batch takes of a rank.

    kept: bytes alive at most beyond weights, gradients and frozen networks; flops: see dry_run.meter; model: those
    flops that are the trained networks' (of one tensor rank that computes nothing again, what monitoring.flops counts
    the model's); sent: bytes to the tensor group; work: what the GPU runs.
    """

    kept: float
    flops: float
    model: float
    sent: float
    work: Work

    def plus(self, more: MicroBatch, times: int = 1) -> MicroBatch:
        """This micro batch with so many times what the other one takes."""
        return MicroBatch(self.kept + times * more.kept, self.flops + times * more.flops,
                          self.model + times * more.model, self.sent + times * more.sent,
                          self.work + times * more.work)

    def of_samples(self, factor: float) -> MicroBatch:
        """This micro batch with `factor` times as many samples, in as many kernels."""
        return MicroBatch(self.kept * factor, self.flops * factor, self.model * factor, self.sent * factor,
                          self.work.of_samples(factor))

    def as_list(self) -> list:
        """A list for a file, without the names of operations."""
        return [*self[:-1], self.work.rows()]


def from_list(values: list) -> MicroBatch:
    """What `MicroBatch.as_list` gave."""
    kept, flops, model, sent, rows = values
    return MicroBatch(kept, flops, model, sent, from_rows(rows))


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The networks of one tensor rank in numbers: elements of each trained parameter, bytes of buffers and frozen
    networks, and elements of each parameter that `training.freeze` takes out of a trained one.
    """

    trained: dict[str, list[int]]
    buffers: int
    frozen: dict[str, int]
    frozen_parts: dict[str, list[int]] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return sum(map(sum, self.trained.values()))


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """A weight of `elements` on each tensor rank: `packed` matrices (rows, columns), which are whole there."""

    elements: int
    rows: int
    columns: int
    packed: int

    @property
    def flops(self) -> int:
        """Of orthogonalizing them: in each of five steps X X^T, A A and (b A + c A^2) X (engine/muon.py)."""
        short, long = sorted((self.rows, self.columns))
        return self.packed * 5 * (4 * short * short * long + 2 * short**3)


@dataclass(frozen=True, kw_only=True)
class MuonWork:
    """All of Muon's matrices in a network, the largest first, and what an update takes of them."""

    matrices: tuple[PackedMatrix, ...] = ()

    @property
    def elements(self) -> int:
        """On each tensor rank, as many as have one moment instead of two."""
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def largest(self) -> int:
        """Elements of the largest weight that a rank puts together."""
        return max((matrix.packed * matrix.rows * matrix.columns for matrix in self.matrices), default=0)

    def flops(self, ranks: int) -> int:
        """Of an update, on the rank that has the most of them: one matrix of each round."""
        return sum(matrix.flops for matrix in self.matrices[::ranks])

    def sent(self, *, stage: int, data_ranks: int, half: bool) -> float:
        """Bytes that each rank sends in an update: parts, and matrices; with one data rank, what tensor ranks share.
        At stage 0 every data rank takes all."""
        shares = 2 / data_ranks if stage else 1 + 1 / data_ranks
        return shares * self.elements * (2 if half else 4)


NO_MATRICES = MuonWork()  # of another optimizer, and of a discriminator
