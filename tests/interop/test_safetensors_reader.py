"""The reader against the reference library, hand-made broken files, and mutated ones."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interop.checkpoints import file_bytes
from safetensors.numpy import save

from dsv3_jax.errors import UserError
from dsv3_jax.interop.safetensors_reader import DTYPE_NAMES, DTYPES, read_header
from dsv3_jax.interop.safetensors_writer import TensorSpec, write_safetensors

F32_4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
SIXTEEN = bytes(16)


def read_bytes(tmp_path: Path, data: bytes) -> dict[str, np.ndarray]:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return {name: entry.read() for name, entry in read_header(path).items()}


@st.composite
def named_arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Tensors of all dtypes the numpy flavour of the library can write, empty and scalar ones included."""
    kinds = [np.float32, np.float16, np.float64, np.int8, np.uint8, np.int64, np.bool_, ml_dtypes.bfloat16]
    result = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4)):
        if name == "__metadata__":
            continue
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        kind = np.dtype(draw(st.sampled_from(kinds)))
        count = int(np.prod(shape)) * kind.itemsize
        raw = draw(st.binary(min_size=count, max_size=count))
        result[name] = (np.frombuffer(raw, np.uint8) % 2).astype(np.uint8).view(kind).reshape(shape)
    return result


class TestAgainstTheLibrary:
    @settings(max_examples=40, deadline=None)
    @given(arrays=named_arrays())
    def test_reads_what_the_library_writes(self, tmp_path_factory: pytest.TempPathFactory, arrays: dict) -> None:
        read = read_bytes(tmp_path_factory.mktemp("file"), save(arrays))
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            assert read[name].shape == array.shape
            assert read[name].tobytes() == array.tobytes()

    def test_the_library_reads_what_we_write(self, tmp_path: Path) -> None:
        from safetensors import safe_open

        rng = np.random.default_rng(0)
        arrays = {
            f"t{i}": rng.standard_normal((3, i)).astype(kind)
            for i, kind in enumerate([np.float32, ml_dtypes.bfloat16, np.float16, np.float32])
        }
        specs = [TensorSpec(name, DTYPE_NAMES[a.dtype], a.shape) for name, a in arrays.items()]
        path = tmp_path / "out.safetensors"
        write_safetensors(path, specs, arrays.values())
        with safe_open(path, "numpy") as file:
            assert set(file.keys()) == set(arrays)
            for name, array in arrays.items():
                np.testing.assert_array_equal(file.get_tensor(name).view(np.uint8), array.view(np.uint8))

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
    def test_float8(self, tmp_path: Path, dtype: str) -> None:
        values = np.arange(256, dtype=np.uint8)
        header = {"w": {"dtype": dtype, "shape": [16, 16], "data_offsets": [0, 256]}}
        read = read_bytes(tmp_path, file_bytes(header, values.tobytes()))["w"]
        assert read.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(read.view(np.uint8).ravel(), values)

    def test_rows(self, tmp_path: Path) -> None:
        array = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
        path = tmp_path / "rows.safetensors"
        path.write_bytes(save({"first": np.zeros(7, np.float32), "w": array}))
        entry = read_header(path)["w"]
        np.testing.assert_array_equal(entry.read_rows(1, 4), array[1:4])
        into = np.empty((2, 12), np.float32)
        entry.read_rows_into(3, 5, into)
        np.testing.assert_array_equal(into, array[3:].reshape(2, 12))


def second(begin: int, end: int) -> dict:
    return {"a": F32_4, "b": {"dtype": "F32", "shape": [4], "data_offsets": [begin, end]}}


def one(**changes: object) -> bytes:
    return file_bytes({"a": F32_4 | changes}, SIXTEEN)


# name: (bytes, words of the message)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "seven_bytes": (b"\x01" * 7, "too few"),
    "header_longer_than_file": (file_bytes({"a": F32_4}, SIXTEEN, length=10_000), "was cut"),
    "header_longer_than_allowed": (struct.pack("<Q", 100_000_001) + b"{}", "at most"),
    "header_length_2_64": (b"\xff" * 8 + b"{}", "at most"),
    "header_cut": (file_bytes({"a": F32_4})[:-5], "was cut"),
    "no_header": (file_bytes(b""), "does not start"),
    "nul_padding": (file_bytes(json.dumps({"a": F32_4}).encode() + b"\0\0", SIXTEEN), "not valid JSON"),
    "leading_space": (file_bytes(b' {"a":1}'), "does not start"),
    "not_json": (file_bytes(b"{not json"), "not valid JSON"),
    "not_utf8": (file_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "utf16": (file_bytes("{}".encode("utf-16")), "does not start"),
    "trailing_json": (file_bytes(b"{}{}"), "not valid JSON"),
    "nan_constant": (file_bytes(b'{"a": NaN}'), "NaN"),
    "list": (file_bytes(b"[]"), "does not start"),
    "huge_integer": (file_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "duplicate_key": (
        file_bytes(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            SIXTEEN,
        ),
        "twice",
    ),
    "entry_is_list": (file_bytes({"a": [1]}, SIXTEEN), "tensor 'a' must have"),
    "entry_is_null": (file_bytes({"a": None}, SIXTEEN), "tensor 'a' must have"),
    "entry_lacks_dtype": (file_bytes({"a": {"shape": [4], "data_offsets": [0, 16]}}, SIXTEEN), "must have dtype"),
    "entry_has_more": (one(extra=1), "nothing else"),
    "unknown_dtype": (one(dtype="F31"), "dtype 'F31'"),
    "dtype_number": (one(dtype=3), "dtype 3"),
    "dtype_list": (one(dtype=["F32"]), "dtype"),
    "shape_negative": (one(shape=[-4]), "shape"),
    "shape_fraction": (one(shape=[4.0]), "shape"),
    "shape_bool": (one(shape=[True, 4]), "shape"),
    "shape_string": (one(shape="4"), "shape"),
    "shape_null": (one(shape=None), "shape"),
    "shape_overflow": (one(shape=[2**62, 2**62]), "needs"),
    "shape_beyond_64_bits": (one(shape=[2**64]), "shape"),
    "shape_rank": (one(shape=[1] * 9 + [4]), "at most 8"),
    "shape_too_large": (one(shape=[5]), "needs 20"),
    "shape_too_small": (one(shape=[3]), "needs 12"),
    "dtype_too_wide": (one(dtype="F64"), "needs 32"),
    "offsets_three": (one(data_offsets=[0, 8, 16]), "two whole numbers"),
    "offsets_negative": (one(data_offsets=[-1, 15]), "two whole numbers"),
    "offsets_string": (one(data_offsets="0,16"), "two whole numbers"),
    "offsets_swapped": (one(data_offsets=[16, 0]), "is at bytes"),
    "offsets_beyond_file": (one(data_offsets=[0, 2**40]), "is at bytes"),
    "data_cut": (file_bytes({"a": F32_4}, bytes(15)), "is at bytes"),
    "data_left_over": (file_bytes({"a": F32_4}, bytes(17)), "belong to no tensor"),
    "gap_at_start": (one(data_offsets=[0, 16]).replace(b"[0, 16]", b"[1, 17]") + b"\0", "gap"),
    "gap_between": (file_bytes(second(17, 33), bytes(33)), "gap"),
    "overlap": (file_bytes(second(8, 24), bytes(24)), "overlaps"),
    "same_place": (file_bytes(second(0, 16), SIXTEEN), "overlaps"),
    "metadata_number": (file_bytes({"__metadata__": {"a": 1}, "a": F32_4}, SIXTEEN), "__metadata__"),
    "metadata_list": (file_bytes({"__metadata__": []}), "__metadata__"),
    "deep_nesting": (file_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "deeper"),
    "deep_unclosed": (file_bytes(b'{"a":' + b"[" * 100_000), "deeper"),
    "entry_bomb": (file_bytes(b'{"a":[' + b"1," * 4_000_000 + b"1]}"), "more than"),
    "bracket_bomb": (file_bytes(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"), "more than"),
    "control_characters": (file_bytes({"a\n\x1b[2J": {"dtype": "F32"}}), r"a\\n\\x1b\[2J"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00" + b"cos\nsystem\n(S'true'\ntR.", "at most"),
}


class TestBrokenFiles:
    @pytest.mark.parametrize("name", BROKEN)
    def test_is_one_line_naming_the_file(self, tmp_path: Path, name: str) -> None:
        data, words = BROKEN[name]
        start = time.monotonic()
        with pytest.raises(UserError, match=words) as caught:
            read_bytes(tmp_path, data)
        assert "model.safetensors" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 600 + len(str(tmp_path))
        assert time.monotonic() - start < 5

    def test_absent_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot read"):
            read_header(tmp_path / "absent.safetensors")
        with pytest.raises(UserError, match="cannot read"):
            read_header(tmp_path)

    def test_cut_after_the_header_was_read(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(one())
        entry = read_header(path)["a"]
        path.write_bytes(one()[:-1])
        with pytest.raises(UserError, match=r"tensor 'a' ends early"):
            entry.read()

    def test_empty_tensors_and_odd_names_are_allowed(self, tmp_path: Path) -> None:
        header = {
            "../../etc/x": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        }
        read = read_bytes(tmp_path, file_bytes(header, np.float32(2.5).tobytes()))
        assert read["../../etc/x"].shape == (0, 3)
        assert read["b"] == np.float32(2.5)
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def test_a_claim_of_terabytes_allocates_nothing(self, tmp_path: Path) -> None:
        header = {"a": {"dtype": "F64", "shape": [2**37], "data_offsets": [0, 2**40]}}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError):
            read_bytes(tmp_path, file_bytes(header, bytes(64)))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


VALID = file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a": F32_4,
        "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [16, 28]},
        "c": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [28, 32]},
    },
    bytes(range(32)),
)


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A valid file with bytes flipped, inserted, removed, repeated or cut off."""
    data = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["flip", "set", "digit", "insert", "remove", "cut", "repeat"]))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at] = draw(st.integers(0, 255))
        elif kind == "digit":
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[draw(st.sampled_from(digits))] = draw(st.sampled_from(b"0123456789-.e"))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 8))]
        elif kind == "cut":
            del data[at:]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


def check_message(message: str) -> None:
    """One line that a terminal can show."""
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    message.encode("utf-8")


class TestFuzz:
    """Whatever the bytes: tensors, or a UserError of one line; never another exception."""

    @settings(max_examples=800, deadline=None)
    @given(data=st.one_of(mutants(), st.binary(max_size=64)))
    @example(VALID[:8] + VALID[8:].replace(b"[4]", b"[1e1]", 1))
    @example(VALID.replace(b'"F32"', b'"\\ud800"'))
    @example(VALID.replace(b'"a"', b'"\\u0000"'))
    @example(VALID.replace(b"[0, 16]", b"[0,-0]", 1))
    def test_only_our_errors(self, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
        path.write_bytes(data)
        try:
            header = read_header(path)
        except UserError as error:
            check_message(str(error))
            return
        total = 0
        for entry in header.values():
            assert entry.read().nbytes == entry.nbytes
            total += entry.nbytes
        assert total <= len(data)
