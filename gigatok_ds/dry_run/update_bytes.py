"""Bytes that an optimizer step moves within a GPU's memory, as DeepSpeed 0.19.8 and one fused Adam kernel take it."""

from __future__ import annotations


def update_bytes(*, half: bool, partitioned: bool, average: bool) -> dict[str, int]:
    """Bytes read and written for each parameter that a rank updates, by what for.

    half: weights and gradients are in half precision, beside float32 masters. partitioned: ZeRO 1 to 3, which keeps
    masters of its own of float32 weights as well. average: an exponential moving average is kept.
    """
    low = 2 if half else 4
    return {
        "are gradients finite": low,  # one look: engine/zero_gradients.py
        "gradient norm": low + (4 + 4 if half else 0),  # in float32, of a copy
        # Laid flat, and made float32.
        "gradients to the optimizer": (low + low if partitioned else 0) + (low + 4 if half else 0),
        "clipping": 4 + 4,
        "Adam": 4 * 4 + 3 * 4,  # reads weight, both moments and gradient; writes all but the gradient
        "updated weights": 4 + low if half or partitioned else 0,  # from their masters
        "moving average": 3 * 4 if average else 0,
    }


def muon_bytes(*, half: bool) -> dict[str, int]:
    """The same for each element of a Muon matrix, instead of "Adam": what is done element by element on its rank."""
    low = 2 if half else 4
    return {
        "momentum": 2 * 4 + 4,
        "decay": 4 + 4,
        "Nesterov's direction": 2 * 4 + 4 + 4 + low,
        "packing": low + low,
        "applying": 4 + low + 4,
    }


def bucket_bytes(*, half: bool, partitioned: bool) -> int:
    """Bytes of a micro batch, for each parameter of a rank: its gradient is copied into a bucket that is sent."""
    return 2 * (2 if half else 4) if partitioned else 0
