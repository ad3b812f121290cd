"""Peak rates of known accelerators, for the model FLOPs utilisation (MFU)."""

from __future__ import annotations

import jax

# Operations per second of dense bfloat16 products, from the vendors' data sheets, by a part of the device's name.
_PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "H20": 148e12,  # after H200, whose name contains it
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak bfloat16 operations per second of a device, or None where it is not known, as for CPUs."""
    return next((peak for name, peak in _PEAKS.items() if name in device.device_kind), None)
