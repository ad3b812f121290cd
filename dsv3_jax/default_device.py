"""The device that JAX computes on when none is named, or one line that says why there is none."""

from __future__ import annotations

import os

import jax

from dsv3_jax.errors import UserError


def default_device() -> jax.Device:
    """Returns JAX's first device.

    Raises:
      UserError: JAX finds none, as where the plugin of the platform that JAX_PLATFORMS names is not installed.
    """
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS")
        reason = " ".join(str(error).split())[:200] or "no platform could be started"
        hint = f"JAX_PLATFORMS is '{wanted}': install the extra cuda13, cuda12 or tpu, or unset it"
        raise UserError(f"JAX finds no device ({reason})" + (f"; {hint}" if wanted else "")) from error
