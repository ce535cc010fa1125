"""What a tokenizer run measures on its validation images, beside PSNR and the use of the codebook."""

from __future__ import annotations

from dataclasses import dataclass

from gigatok_ds.config.model import at_least
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """None of it changes what is trained, so that a run may be resumed with other settings.

    `perceptual`: LPIPS by the network of the perceptual loss, where the recipe has that loss with LPIPS. `inception`:
    the file of torch-fidelity's Inception weights, for rFID (null: none). `images`: how many images are measured,
    evenly spaced over the data (null: all). `fid_every`: rFID only at validations whose step is a multiple of it, and
    at the last step (null: at each).
    """

    perceptual: bool = True
    inception: str | None = None
    images: int | None = None
    fid_every: int | None = None

    def __post_init__(self) -> None:
        at_least(2, "validation", images=self.images)
        at_least(1, "validation", fid_every=self.fid_every)
        if self.fid_every is not None and self.inception is None:
            raise InputError(f"validation.fid_every is {self.fid_every}, but it does nothing without "
                             "validation.inception; give that the path of the Inception weights")
