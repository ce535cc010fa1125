"""The training crop by `data.decoding`."""

from __future__ import annotations

from gigatok_ds.data.transforms import TrainingTransform
from gigatok_ds.errors import InputError


def training_transform(size: int, crop_scale: tuple[float, float] = (0.8, 1.0), flip: bool = True,
                       decoding: str = "exact", *, orient: bool = False) -> TrainingTransform:
    """The training crop by `decoding`: "exact", the original's pixels, or "fast" (see data.fast). orient: see
    `decode_image`.

    Raises InputError when the latter's decoder is not installed.
    """
    if decoding == "exact":
        return TrainingTransform(size, crop_scale, flip, orient)
    assert decoding == "fast"
    try:
        from gigatok_ds.data.fast import FastTransform
    except ImportError as error:
        raise InputError(f"data.decoding is fast, which needs simplejpeg ({error}); pip install simplejpeg, or set "
                         "data.decoding=exact") from None
    return FastTransform(size, crop_scale, flip, orient)
