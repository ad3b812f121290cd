"""Precision recipes: in which format each part of the model is computed.

Parameters are stored in the dtype they were made in (float32 masters in training) and cast where they are used. In
every recipe the router, softmax, norm statistics, RoPE and the logits are float32 (report section 3.3.1).
"""

from __future__ import annotations

import dataclasses
import difflib

import jax
import jax.numpy as jnp

from dsv3_jax.default_device import default_device
from dsv3_jax.errors import ConfigError
from dsv3_jax.precision.fp8_recipe import Fp8Recipe
from pallas_kernels import TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """A precision recipe, which a model is given when it is made.

    Attributes:
      name: its name on the command line and in reports.
      compute_dtype: name of the dtype of activations and of the operands of matrix products.
      fp8: how linear maps are computed in FP8 (section 3.3); None for no FP8. Embedding, output head, router,
        norms, the attention core and the projection of MTP modules never are.
      moment_dtype: dtype of AdamW's moments (section 3.3.3), unless the training configuration names another.
    """

    name: str
    compute_dtype: str
    fp8: Fp8Recipe | None = None
    moment_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("float32", "bfloat16", "float64"):
            raise ConfigError(
                f"precision.compute_dtype must be float32, bfloat16 or float64, not {self.compute_dtype!r}"
            )
        if self.fp8 is not None and self.compute_dtype == "float64":
            raise ConfigError("precision.compute_dtype must be bfloat16 or float32 with FP8 products, not float64")
        if self.moment_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"precision.moment_dtype must be float32 or bfloat16, not {self.moment_dtype!r}")

    @property
    def dtype(self) -> jnp.dtype:
        """Returns `compute_dtype` as a dtype object."""
        return jnp.dtype(self.compute_dtype)

    @property
    def gather_dtype(self) -> jnp.dtype | None:
        """Returns the dtype in which shards of a linear map's weight are all-gathered; None for the weight's own.

        It is float8_e4m3fn where all products multiply by the weight in e4m3 with a scale for every block of 128 x 128.
        Other tiles are cut from the weight as it is stored: from one rounded for the all-gather they would differ.
        """
        if self.fp8 is None:
            return self.dtype
        in_blocks = self.fp8.tile == TILE and "none" not in (self.fp8.forward, self.fp8.input_gradient)
        return jnp.dtype(jnp.float8_e4m3fn) if in_blocks else None

    @property
    def without_fp8(self) -> Precision:
        """Returns the recipe without FP8, for a map that the report leaves in its original precision."""
        return self if self.fp8 is None else dataclasses.replace(self, fp8=None)

    @classmethod
    def preset(cls, name: str) -> Precision:
        """Returns the recipe called `name`; `auto` is bfloat16 where the device computes fast in it, else float32.

        Changes of fields may follow the name, those of the FP8 recipe included: "fp8,promotion=false,tile=32".

        Raises:
          ConfigError: there is no such recipe or field, or the field cannot have that value.
        """
        name, *changes = name.split(",")
        if name == "auto":
            name = "bfloat16" if _computes_fast_in_bfloat16(default_device()) else "float32"
        if name not in PRECISIONS:
            near = difflib.get_close_matches(name, PRECISIONS, n=1) or [", ".join(["auto", *PRECISIONS])]
            raise ConfigError(f"precision '{name}' does not exist; choose {near[0]}")
        return PRECISIONS[name]._changed(changes) if changes else PRECISIONS[name]

    def _changed(self, changes: list[str]) -> Precision:
        own: dict[str, object] = {}
        of_fp8: dict[str, object] = {}
        fp8_fields = {field.name for field in dataclasses.fields(Fp8Recipe)} if self.fp8 else set()
        for change in changes:
            field, _, text = change.partition("=")
            if field in fp8_fields:
                of_fp8[field] = _value(text)
            elif field in ("compute_dtype", "moment_dtype"):
                own[field] = text
            else:
                known = ["compute_dtype", "moment_dtype", *sorted(fp8_fields)]
                near = difflib.get_close_matches(field, known, n=1) or [", ".join(known)]
                raise ConfigError(f"precision '{self.name}' has no field '{field}' to change; choose {near[0]}")
        fp8 = self.fp8 and dataclasses.replace(self.fp8, **of_fp8)
        return dataclasses.replace(self, name=",".join([self.name, *changes]), fp8=fp8, **own)


def _computes_fast_in_bfloat16(device: jax.Device) -> bool:
    """Returns whether a device has hardware for bfloat16 products, which CPUs and NVIDIA GPUs before Ampere lack."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform != "cpu" and not (major.isdecimal() and int(major) < 8)


def _value(text: str) -> bool | int | str:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdigit() else text


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(name="float32", compute_dtype="float32"),
    "bfloat16": Precision(name="bfloat16", compute_dtype="bfloat16"),
    "fp8": Precision(name="fp8", compute_dtype="bfloat16", fp8=Fp8Recipe(), moment_dtype="bfloat16"),
}
