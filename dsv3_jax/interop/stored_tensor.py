"""A published tensor in its file, read by rows in the form that the model wants."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from dsv3_jax.interop.fp8_weights import dequantise, dequantise_into
from dsv3_jax.interop.safetensors_reader import DTYPES, TensorEntry
from dsv3_jax.interop.tensor_names import BLOCK, PublishedTensor


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A published tensor and where a file has it.

    Attributes:
      published: name, shape, and the part of a parameter that it fills.
      entry: dtype, shape and position in the file.
      scale: the same of the scales of an FP8 tensor; None for other tensors.
      rotary_width: number of rows at the end of each head that are reordered from halves (i, i + width/2) to pairs
        (2i, 2i + 1); 0 for tensors that are read as they are.
    """

    published: PublishedTensor
    entry: TensorEntry
    scale: TensorEntry | None = None
    rotary_width: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the files, scales included."""
        return self.entry.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def scales(self) -> StoredTensor:
        """The scales as a tensor that fills the same index of an array of scales."""
        assert self.scale is not None
        shape = self.published.scale_shape
        return StoredTensor(dataclasses.replace(self.published, shape=shape, tail=shape), self.scale)

    def read(self, first: int, last: int) -> Float[np.ndarray, "rows ..."]:
        """Reads part of the parameter that this tensor fills.

        Args:
          first, last: range along the first axis of `published.tail`; only its rows are read from the file.

        Returns:
          [last - first, *tail[1:]] in the stored dtype, or in float32 where the tensor is FP8 with scales.
        """
        unit = self.published.shape[0] // self.published.tail[0]
        rows = self._rows(first * unit, last * unit)
        return rows.reshape(last - first, *self.published.tail[1:])

    def read_into(self, first: int, last: int, target: Float[np.ndarray, "..."]) -> None:
        """Does what `read` does, but converts into `target`, a C-contiguous array of any float dtype."""
        unit = self.published.shape[0] // self.published.tail[0]
        start, stop = first * unit, last * unit
        if self.rotary_width or (self.scale is not None and start % BLOCK):
            target[...] = self.read(first, last).reshape(target.shape)
        elif self.scale is not None:
            scales = self.scale.read_rows(start // BLOCK, -(-stop // BLOCK)).astype(np.float32)
            dequantise_into(self.entry.read_rows(start, stop), scales, target.reshape(stop - start, -1))
        elif DTYPES[self.entry.dtype] == target.dtype:
            self.entry.read_rows_into(start, stop, target)
        else:
            target[...] = self.entry.read_rows(start, stop).reshape(target.shape)

    def _rows(self, first: int, last: int) -> np.ndarray:
        if self.rotary_width:
            heads = self._rows_in_stored_order(0, self.published.shape[0])
            return _halves_to_pairs(heads, self.published.rotary_head, self.rotary_width)[first:last]
        return self._rows_in_stored_order(first, last)

    def _rows_in_stored_order(self, first: int, last: int) -> np.ndarray:
        if self.scale is None:
            return self.entry.read_rows(first, last)
        start, stop = first - first % BLOCK, min(-(-last // BLOCK) * BLOCK, self.published.shape[0])
        scales = self.scale.read_rows(start // BLOCK, -(-stop // BLOCK)).astype(np.float32)
        return dequantise(self.entry.read_rows(start, stop), scales)[first - start : last - start]


def _halves_to_pairs(matrix: np.ndarray, head: int, rotary: int) -> np.ndarray:
    """Moves rows (i, i + rotary/2) of each head's rotary part to (2i, 2i + 1)."""
    heads = matrix.reshape(-1, head, matrix.shape[-1])
    halves = heads[:, head - rotary :].reshape(heads.shape[0], 2, rotary // 2, -1)
    pairs = halves.swapaxes(1, 2).reshape(heads.shape[0], rotary, -1)
    return np.concatenate([heads[:, : head - rotary], pairs], axis=1).reshape(matrix.shape)
