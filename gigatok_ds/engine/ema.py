"""An exponential moving average of a network's parameters, of which every data rank keeps its own part only.

Each rank averages the part of the float32 weights that it holds, or would hold, as a ZeRO partition; no rank ever has
the whole average.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gigatok_ds.checkpoint.fragments import Fragment
from gigatok_ds.engine.zero_stages import Place


class ShardedEMA:
    """ema = decay * ema + (1 - decay) * weights, from the weights as they are when it is made. Buffers are not
    averaged.

    `fragments` are views of the average by parameter name. What lies in one tensor is averaged in one go.
    """

    def __init__(self, decay: float, places: Mapping[str, Place]):
        """places: where this data rank's part of each parameter is, now and ever after."""
        self.decay = decay
        stretches: dict[int, tuple[int, int]] = {}
        for place in places.values():
            begin, end = stretches.get(id(place.holder), (place.offset, place.offset))
            stretches[id(place.holder)] = min(begin, place.offset), max(end, place.offset + place.size)
        holders = {id(place.holder): place.holder.detach().view(-1) for place in places.values()}
        self._live = [holders[key].narrow(0, begin, end - begin) for key, (begin, end) in stretches.items()]
        self._averages = [values.clone() for values in self._live]
        averages = dict(zip(stretches, self._averages, strict=True))
        self.fragments = {name: Fragment(place.start, averages[id(place.holder)].narrow(
            0, place.offset - stretches[id(place.holder)][0], place.size)) for name, place in places.items()}

    @torch.no_grad()
    def update(self, left_out: Tensor | None = None) -> None:
        """Take in the weights once: after each update of theirs. left_out: a scalar on the device, 1 to take in
        nothing.
        """
        if left_out is None:
            torch._foreach_lerp_(self._averages, self._live, 1 - self.decay)
            return
        share = (1 - left_out) * (1 - self.decay)
        for average, live in zip(self._averages, self._live, strict=True):
            average.lerp_(live, share)
