"""The next batch travels to the GPU while the current one is computed with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gigatok_ds.data.loader import as_floats


def on_device(batches: Iterable[dict[str, Tensor]], names: tuple[str, ...],
              device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The batches in their order, with the tensors of these names on `device`, the rest where it is.

    `images` that come as bytes are made floats there, which spares the data workers and the way to the device.
    On a GPU a batch is copied on a stream of its own, one batch ahead; it does not wait if the tensors lie in pinned
    memory. What was read ahead when a run ends is no loss: a resumed run counts batches by its steps.
    """
    return _Ahead(batches, names, device) if device.type == "cuda" else map(_with_floats, batches)


def _with_floats(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return as_floats(batch) if "images" in batch and batch["images"].dtype == torch.uint8 else batch


class _Ahead(Iterator):
    def __init__(self, batches: Iterable[dict[str, Tensor]], names: tuple[str, ...], device: torch.device):
        self.batches, self.names, self.device = iter(batches), names, device
        self.stream = torch.cuda.Stream(device)
        self._fetch()

    def _fetch(self) -> None:
        """Start the next batch on its way; None or the reader's exception if there is none, for its turn to come."""
        self.following: dict[str, Tensor] | Exception | None = None
        try:
            batch = next(self.batches)
            with torch.cuda.stream(self.stream):
                moved = {name: batch[name].to(self.device, non_blocking=True) for name in self.names}
                self.following = _with_floats(batch | moved)
        except StopIteration:
            pass
        except Exception as error:
            self.following = error

    def __next__(self) -> dict[str, Tensor]:
        batch = self.following
        if batch is None:
            raise StopIteration
        if isinstance(batch, Exception):
            raise batch
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for name in self.names:
            # Its memory belongs to the other stream, which must not use it again before the computation has.
            batch[name].record_stream(computing)
        self._fetch()
        return batch
