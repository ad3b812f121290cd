"""Low-rank adapters in the files that PEFT reads: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.interop.safetensors_writer import TensorSpec, write_safetensors


def save_adapters(folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes adapters into a new folder.

    Args:
      tensors: float32 arrays by the names that PEFT gives them.
      config: what adapter_config.json holds.

    Raises:
      UserError: the folder cannot be written.
    """
    specs = [TensorSpec(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    try:
        folder.mkdir(parents=True)
        values = (np.asarray(value, np.float32) for value in tensors.values())
        write_safetensors(folder / "adapter_model.safetensors", specs, values)
        text = json.dumps(config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {reason_of(error)}") from error
