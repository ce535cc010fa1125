"""What a run does about steps that went wrong, and how often it looks for what should not be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gigatok_ds.config.model import at_least
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """A step whose losses or gradients are not finite changes nothing: it is left out for all networks, and counted.
    `in_a_row` such steps in a row end the run (1: the first one does).

    With `spike_deviations` n a step whose loss lies more than n standard deviations above the mean of the last 100 is a
    spike (null: none is; 20 leaves the usual noise alone). `on_spike` leaves it out like the above ("skip"), takes
    everything back to the newest checkpoint and goes on with the next data ("rewind"), or ends the run ("stop").

    What ranks hold alike is compared between them after every `compare_every` steps and before every checkpoint.
    """

    in_a_row: int = 10
    spike_deviations: float | None = None
    on_spike: Literal["skip", "rewind", "stop"] = "skip"
    compare_every: int = 1000

    def __post_init__(self) -> None:
        at_least(1, "faults", in_a_row=self.in_a_row, compare_every=self.compare_every)
        if self.spike_deviations is not None and self.spike_deviations <= 0:
            raise InputError(f"faults.spike_deviations is {self.spike_deviations}; it must be above 0, or null")
        if self.on_spike != "skip" and self.spike_deviations is None:
            raise InputError(
                f"faults.on_spike is {self.on_spike}, but without faults.spike_deviations nothing is a spike; "
                "set that, for instance to 20"
            )
