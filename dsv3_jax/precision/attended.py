"""The output of attention as it is kept for two backward passes: attention's own and the next linear map's.

The report keeps it once, in E5M6, because both passes use it (section 3.3.3). With it and the logarithms of the rows'
sums, no backward pass has to compute attention again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from dsv3_jax.precision.e5m6 import PackedE5M6, pack, unpack
from dsv3_jax.precision.keeping import keep
from dsv3_jax.precision.prepared import PreparedRows
from dsv3_jax.precision.recipe import Precision
from pallas_kernels import TILE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttendedRows(PreparedRows):
    """The output of attention, kept for the backward pass already. Linear maps read it as they read an array.

    Attributes:
      rows: [*batch, H, v].
      packed: the rows in E5M6, with the same leading axes; None where the rows are kept as they are.
    """

    rows: Float[Array, "..."]
    packed: PackedE5M6 | None

    def reshape(self, *shape: int) -> AttendedRows:
        """Returns the same rows with other batch axes, or with the heads on one axis."""
        rows = self.rows.reshape(*shape)
        return AttendedRows(rows, None if self.packed is None else _reshaped(self.packed, rows.shape))


@dataclasses.dataclass(frozen=True)
class KeptOutput:
    """How the output of attention is kept; what `pallas_kernels.latent_attention_and_kept` calls a `Keep`.

    Attributes:
      packs: in E5M6; else as it is.
    """

    packs: bool

    @classmethod
    def of(cls, precision: Precision, width: int) -> KeptOutput | None:
        """Returns how a recipe keeps it; None where only the next linear map does, in a format of its own.

        Args:
          width: of a head's values. Heads are packed one by one: E5M6 has a scale for every 128 columns.
        """
        if precision.fp8 is None:
            return cls(packs=False)
        return cls(packs=True) if precision.fp8.after_attention == "e5m6" and width % TILE == 0 else None

    def keep(
        self, out: Float[Array, "B T H v"], log_sums: Float[Array, "..."]
    ) -> tuple[Float[Array, "B T H v"], PackedE5M6 | None, Float[Array, "..."]]:
        """Returns the output, what is kept in its place, and the logarithms of sums, of which all needed are marked."""
        if not self.packs:
            return keep(out), None, keep(log_sums)
        packed = _reshaped(pack(out.reshape(-1, out.shape[-1])), out.shape)
        return out, jax.tree.map(keep, packed), keep(log_sums)

    def restore(self, packed: PackedE5M6, like: Float[Array, "B T H v"]) -> Float[Array, "B T H v"]:
        """Returns the output that was kept, with the shape and dtype of `like`."""
        rows = _reshaped(packed, (like.size // like.shape[-1], like.shape[-1]))
        return unpack(rows).astype(like.dtype).reshape(like.shape)


def _reshaped(packed: PackedE5M6, shape: tuple[int, ...]) -> PackedE5M6:
    """Returns the same numbers in the parts of an array of that shape; rows are whole tiles."""
    *batch, width = shape
    parts: dict[str, Any] = {
        "packed": packed.packed.reshape(*batch, -1, 3),
        "scales": packed.scales.reshape(*batch, -1),
    }
    return PackedE5M6(**parts, width=width)
