"""Corpora that other programs have tokenised: .bin files as nanoGPT and Megatron-LM write them.

- nanoGPT: ids one after another, little-endian uint16 (uint32 where the vocabulary is larger), with an end-of-text id
  between documents. A file called val.bin (or validation.bin, test.bin) is held out.
- modded-nanogpt and llm.c: the same after a header of 256 int32: a magic number, a version (1: uint16, 7 or another
  magic number: uint32), and the number of ids.
- Megatron-LM: NAME.bin with NAME.idx beside it, which says the dtype and where each document begins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import check_regular, read_regular

INDEX = ".idx"
_HELD_OUT = {"val", "valid", "validation", "test"}
_HEADER_INTS, _HEADERS = 256, {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LARGEST_INDEX = 2**32  # bytes
_PIECE = 2**16  # ids of a piece of a file that has no end-of-text id


def is_held_out(file: Path) -> bool:
    """Returns whether a file is for validation, by its name: val.bin, fineweb_val_000000.bin, test.bin ..."""
    return bool({*file.stem.lower().replace("-", "_").split("_")} & _HELD_OUT)


def read_token_bin(file: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the ids of each document of a file, uint32, without end-of-text ids.

    A file that has no end-of-text id is cut into pieces of 65,536 ids.

    Raises:
      UserError: the file is damaged or of another form, or holds an id outside the vocabulary.
    """
    check_regular(file)
    index = file.with_suffix(INDEX)
    for number, ids in enumerate(_megatron(file, index) if index.exists() else _plain(file, tokenizer)):
        ids = ids[ids != tokenizer.eos_id]
        if len(ids) and (int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0):
            wrong = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            raise UserError(
                f"{file}, document {number}: token id {wrong} is outside the vocabulary of {tokenizer.vocab_size}: "
                "set data.tokenizer to the tokenizer it was made with"
            )
        yield ids.astype(np.uint32)


def _plain(file: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    size, start = file.stat().st_size, 0
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    count = None
    if size >= 4 * _HEADER_INTS:
        header = np.fromfile(file, "<i4", _HEADER_INTS)
        if int(header[0]) in _HEADERS:
            dtype, start, count = _HEADERS[int(header[0])], 4 * _HEADER_INTS, int(header[2])
    if (size - start) % dtype.itemsize or (count is not None and count * dtype.itemsize != size - start):
        raise UserError(f"{file} holds no whole number of {dtype.itemsize}-byte ids: it is damaged or of another form")
    if size == start:
        return
    ids = np.memmap(file, dtype, "r", start)
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    if not len(ends):
        ends = np.arange(_PIECE, len(ids), _PIECE)
        yield from np.split(ids, ends)
        return
    begin = 0
    for end in [*ends.tolist(), len(ids)]:
        yield ids[begin:end]
        begin = end + 1


def _megatron(file: Path, index: Path) -> Iterator[np.ndarray]:
    raw = read_regular(index, max_bytes=_LARGEST_INDEX)
    start = len(_MEGATRON_MAGIC) + 25  # after the version, the code of the dtype, and two counts
    if not raw.startswith(_MEGATRON_MAGIC) or len(raw) < start:
        raise UserError(f"{index} is not an index of Megatron-LM; remove it if {file.name} has no index")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", raw, len(_MEGATRON_MAGIC))
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise UserError(f"{index}: version {version} with dtype code {code} is not known")
    if len(raw) < start + sequences * 12 + documents * 8 or not documents:
        raise UserError(f"{index} ends early: it was cut")
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    sizes = np.frombuffer(raw, "<i4", sequences, start)
    pointers = np.frombuffer(raw, "<i8", sequences, start + sequences * 4)
    borders = np.frombuffer(raw, "<i8", documents, start + sequences * 12)
    if sequences and int((pointers + sizes.astype(np.int64) * dtype.itemsize).max()) > file.stat().st_size:
        raise UserError(f"{file} is shorter than {index.name} says: it was cut, or belongs to another index")
    if not sequences:
        return
    ids = np.memmap(file, dtype, "r")
    for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        begins = (pointers[first:last] // dtype.itemsize).tolist()
        parts = [ids[begin : begin + size] for begin, size in zip(begins, sizes[first:last].tolist(), strict=True)]
        yield np.concatenate(parts) if parts else ids[:0]
