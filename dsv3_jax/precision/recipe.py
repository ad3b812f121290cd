"""Which format each part of the model is computed in.

Parameters are stored in the dtype they were made in (float32 masters in training) and cast where they are used.
Whatever the recipe, the router, softmax, norm statistics, RoPE and the logits are float32 (report section 3.3.1).
"""

from __future__ import annotations

import dataclasses
import difflib

import jax
import jax.numpy as jnp

from dsv3_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """A precision recipe, given to the model as an object.

    Attributes:
      name: what people call it.
      compute_dtype: dtype of activations and of the operands of matrix products, as a name jax.numpy knows.
    """

    name: str
    compute_dtype: str

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("float32", "bfloat16", "float64"):
            raise ConfigError(
                f"precision.compute_dtype must be float32, bfloat16 or float64, not {self.compute_dtype!r}"
            )

    @property
    def dtype(self) -> jnp.dtype:
        """`compute_dtype` as a dtype object."""
        return jnp.dtype(self.compute_dtype)

    @classmethod
    def preset(cls, name: str) -> Precision:
        """The recipe called `name`; `auto` is bfloat16 where the default device is fast at it, float32 on a CPU."""
        if name == "auto":
            name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        if name not in PRECISIONS:
            near = difflib.get_close_matches(name, PRECISIONS, n=1) or [", ".join(["auto", *PRECISIONS])]
            raise ConfigError(f"precision '{name}' does not exist; choose {near[0]}")
        return PRECISIONS[name]


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(name="float32", compute_dtype="float32"),
    "bfloat16": Precision(name="bfloat16", compute_dtype="bfloat16"),
}
