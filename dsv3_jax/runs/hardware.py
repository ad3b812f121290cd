"""What a known accelerator can do, for the model FLOPs utilisation."""

from __future__ import annotations

import jax

# Dense bfloat16 products, operations a second, from the vendors' data sheets.
_PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 operations a second of a device, or None where it is not known (a CPU, say)."""
    return next((peak for name, peak in _PEAKS.items() if name in device.device_kind), None)
