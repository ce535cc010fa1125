"""Whether batches travel to the device while it computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from acceptance.findings import Findings
from acceptance.section import Setting
from acceptance.timing import seconds_of
from gigatok_ds.data.prefetch import on_device

BOUND = 1.1  # times the seconds of the same computation on a batch that is there already


def run(setting: Setting, found: Findings) -> None:
    on_gpu, device = setting.on_gpu, torch.device(setting.device)
    images, side, products, batches = (64, 4096, 40, 12) if on_gpu else (2, 256, 2, 3)
    resident = torch.zeros(images, 3, 256, 256, device=setting.device)
    matrix = torch.randn(side, side, device=setting.device)

    def compute(batch: Tensor) -> Tensor:
        result = matrix
        for _ in range(products):
            result = matrix @ result / side
        return batch.mean() + result.mean()

    def arriving() -> Iterator[dict[str, Tensor]]:
        return on_device(_batches(batches, images, pinned=on_gpu), ("images",), device)

    def travelling() -> list[Tensor]:
        return [compute(batch["images"]) for batch in arriving()]

    def staying() -> list[Tensor]:
        return [compute(resident) for _ in range(batches)]

    seconds, least = (seconds_of(way, setting, repeats=3, warm_up=1) for way in (travelling, staying))
    found.figure("a step whose batch travels", seconds / batches * 1e3, "ms",
                 f"{least / batches * 1e3:.3g} ms with a batch that is there")
    if on_gpu:
        found.check("copies hide behind the computation", seconds <= BOUND * least,
                    f"{seconds / least:.3f} x, bound {BOUND} x")
    means = [float(batch["images"].mean()) for batch in arriving()]
    right = [number / 127.5 - 1 for number in range(batches)]
    error = max(abs(ours - value) for ours, value in zip(means, right, strict=True))
    found.check("every batch arrives, in order, as numbers in [-1, 1]", error <= 1e-5, f"means at most {error:.1e} off")


def _batches(count: int, images: int, *, pinned: bool) -> Iterator[dict[str, Tensor]]:
    """As the loader gives them: bytes, in pinned memory for a GPU."""
    for number in range(count):
        batch = torch.full((images, 3, 256, 256), number, dtype=torch.uint8)
        yield {"images": batch.pin_memory() if pinned else batch}
