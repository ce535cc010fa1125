"""What GPUs can compute at most."""

from __future__ import annotations

# Dense peaks in TFLOP/s by the makers' data sheets, by a part of the device's name (the first that fits): half
# precision (bf16 and fp16 alike, sums in float32), TF32, and fp32 outside the tensor cores.
PEAKS = {
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "GB200": (2500.0, 1250.0, 80.0),
    "GB300": (2500.0, 1250.0, 80.0),
    "A100": (312.0, 156.0, 19.5),
    "H100": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "B200": (2250.0, 1125.0, 75.0),
    "B300": (2250.0, 1125.0, 75.0),
    "MI300X": (1307.4, 653.7, 163.4),
    "L40S": (362.05, 183.0, 91.6),
    "RTX 6000 Ada": (364.2, 182.1, 91.1),
    "RTX PRO 6000": (503.8, 251.9, 126.0),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 5090": (209.5, 104.8, 104.8),
}


def peak_tflops(device_name: str, precision: str, *, tf32: bool) -> float | None:
    """What a GPU of that name can do at most in training.precision `precision`, TFLOP/s; None where not known.

    tf32: whether fp32 matrix products may use the tensor cores.
    """
    column = 0 if precision != "fp32" else 1 if tf32 else 2
    return next((peaks[column] for part, peaks in PEAKS.items() if part in device_name), None)
