"""An exponential moving average of a network's parameters, of which every data rank keeps its own part only.

Each rank averages the part of the float32 weights that it holds, or would hold, as a ZeRO partition; no rank ever has the
whole average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from gigatok_ds.checkpoint.fragments import Fragment


class ShardedEMA:
    """ema = decay * ema + (1 - decay) * weights, from the weights as they are when it is made. Buffers are not averaged."""

    def __init__(self, decay: float, live: Callable[[], Mapping[str, Fragment]]):
        """live: this data rank's fragments of the weights by parameter name, as they are now; the same ones every time."""
        self.decay, self._live = decay, live
        self.fragments = {name: Fragment(start, values.detach().float().clone()) for name, (start, values) in live().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights once: after each update of theirs."""
        live = self._live()
        assert live.keys() == self.fragments.keys(), "the weights are partitioned otherwise than when the average began"
        if self.fragments:
            torch._foreach_lerp_([fragment.values for fragment in self.fragments.values()],
                                 [live[name].values.detach().float() for name in self.fragments], 1 - self.decay)
