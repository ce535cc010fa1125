"""What a GPU has to do, operation by operation, and how long it takes at stated efficiencies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# What operations are told apart by, in the order of reports.
GROUPS = ("matrix", "convolution", "attention", "norm", "pointwise", "optimizer", "frozen networks", "quantizer",
          "copies", "communication")
PRODUCTS = ("matrix", "convolution", "attention")


class Operation(NamedTuple):
    """One kernel, or a library's call that counts as one.

    group: one of GROUPS. name: the operator's. source: file and line of our code that asked for it, forward. kind: of
    its products, "half", "tf32" or "fp32". read and written: bytes that it moves from and to memory. flops: of its
    products.
    """

    group: str
    name: str
    source: str
    kind: str
    read: float
    written: float
    flops: float


class Rates(NamedTuple):
    """What a GPU reaches: FLOP/s by kind of product, bytes per second, and the seconds that starting a kernel takes."""

    products: Mapping[str, float]
    bandwidth: float
    launch: float

    def seconds(self, operation: Operation, scale: float = 1.0) -> float:
        """The longest of three: to compute it, to move its bytes, to start it. scale: of both FLOPs and bytes."""
        return max(self.crossing(operation, scale), self.launch)

    def crossing(self, operation: Operation, scale: float = 1.0) -> float:
        """The longer of two: to compute it, to move its bytes."""
        return scale * max(operation.flops / self.products[operation.kind],
                           (operation.read + operation.written) / self.bandwidth)


@dataclass(kw_only=True)
class GroupShare:
    """A part of some work: how often operations are started, and what they take together."""

    calls: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


class Work:
    """Operations and how often each is called; `scale` multiplies what each computes and moves.

    Sums, differences and multiples are of calls, exactly, so that what a layer adds can be told.
    """

    def __init__(self, calls: Mapping[Operation, float] | None = None, scale: float = 1.0):
        self.calls = {operation: count for operation, count in (calls or {}).items() if count}
        self.scale = scale

    def __add__(self, other: Work) -> Work:
        assert self.scale == other.scale
        return Work({key: self.calls.get(key, 0) + other.calls.get(key, 0) for key in self.calls | other.calls},
                    self.scale)

    def __mul__(self, times: float) -> Work:
        return Work({operation: times * count for operation, count in self.calls.items()}, self.scale)

    __rmul__ = __mul__

    def __sub__(self, other: Work) -> Work:
        return self + -1 * other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Work) and (self.calls, self.scale) == (other.calls, other.scale)

    def __repr__(self) -> str:
        total = self.shared(lambda operation: "")[""]
        return f"Work(calls={total.calls:g}, flops={total.flops:g}, bytes={total.bytes:g})"

    def of_samples(self, factor: float) -> Work:
        """The work of `factor` times as many samples, in as many calls."""
        return Work(self.calls, self.scale * factor)

    def of_group(self, group: str) -> Work:
        """The same operations, told as `group`."""
        total = Work(scale=self.scale)
        for operation, count in self.calls.items():
            total += Work({operation._replace(group=group): count}, self.scale)
        return total

    def seconds(self, rates: Rates) -> float:
        """Seconds of all operations, one after the other."""
        return sum(count * rates.seconds(operation, self.scale) for operation, count in self.calls.items())

    def starting(self, rates: Rates) -> float:
        """Seconds of those for which the GPU waits because its kernels are shorter than it takes to start them."""
        return self.seconds(rates) - self.seconds(rates._replace(launch=0.0))

    def shared(self, by: Callable[[Operation], str], rates: Rates | None = None) -> dict[str, GroupShare]:
        """Shares by what `by` says of an operation; seconds are 0 without rates."""
        shares: dict[str, GroupShare] = {}
        for operation, count in self.calls.items():
            share = shares.setdefault(by(operation), GroupShare())
            share.calls += count
            share.flops += count * self.scale * operation.flops
            share.bytes += count * self.scale * (operation.read + operation.written)
            share.seconds += count * rates.seconds(operation, self.scale) if rates else 0.0
        return shares or {"": GroupShare()}

    @property
    def bytes(self) -> float:
        return self.shared(lambda operation: "")[""].bytes

    def rows(self) -> list[list]:
        """Rows for a file: group, kind, bytes, FLOPs and calls; names and places are left out."""
        merged: dict[tuple, float] = {}
        for operation, count in self.calls.items():
            key = (GROUPS.index(operation.group), operation.kind, operation.read + operation.written, operation.flops)
            merged[key] = merged.get(key, 0) + count
        return [[*key, count] for key, count in sorted(merged.items())]


def from_rows(rows: Iterable[list]) -> Work:
    """What `Work.rows` gave, as far as it is in there."""
    return Work({Operation(GROUPS[group], "", "", kind, moved, 0, flops): count
                 for group, kind, moved, flops, count in rows})
