"""Documents packed into rows of tokens, one stream cut every T tokens (report section 4.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsv3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """A random-access source of rows; what the data loader reads.

    Row i holds tokens i*T .. i*T+T of the stream: T inputs and, one place on, T targets, so that every token of the
    stream but the first is a target once. The tail shorter than a row is left out.

    Attributes:
      stream: the documents one after another, each with its end token; may be mapped from a file.
      starts: where each document begins in the stream.
    """

    stream: np.ndarray
    starts: np.ndarray
    sequence_length: int

    def __len__(self) -> int:
        return max(0, (len(self.stream) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segment ids of a row, int32 [T+1] each; segments are counted from 1 in every row."""
        begin = int(index) * self.sequence_length
        end = begin + self.sequence_length + 1
        tokens = np.asarray(self.stream[begin:end], np.int32)
        boundaries = self.starts[np.searchsorted(self.starts, begin, "right") : np.searchsorted(self.starts, end)]
        opens = np.zeros(len(tokens), np.int32)
        opens[0] = 1
        opens[boundaries - begin] = 1
        return tokens, np.cumsum(opens, dtype=np.int32)


def pack(documents: Sequence[Sequence[int] | np.ndarray], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The stream of all documents, each followed by `eos_id`, and where each begins."""
    sizes = np.array([len(document) + 1 for document in documents], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    stream = np.full(int(sizes.sum()), eos_id, np.int32)
    for start, document in zip(starts, documents, strict=True):
        stream[start : start + len(document)] = document
    return stream, starts


def load_rows(folder: Path, sequence_length: int) -> PackedRows | None:
    """Rows of a stream saved in `folder`, mapped from disk; None where there is none."""
    try:
        stream = np.load(folder / "stream.npy", mmap_mode="r", allow_pickle=False)
        starts = np.load(folder / "starts.npy", allow_pickle=False)
    except (FileNotFoundError, ValueError):
        return None
    return PackedRows(stream, starts, sequence_length)


def save_stream(folder: Path, stream: np.ndarray, starts: np.ndarray) -> None:
    """Saves a stream under a name that appears when it is whole."""
    temporary = folder.with_name(folder.name + ".writing")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        np.save(temporary / "stream.npy", stream)
        np.save(temporary / "starts.npy", starts)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"the tokenised corpus cannot be written to {folder}: {error.strerror}") from error
