"""Checks that files from elsewhere cannot hang a command, and that texts from elsewhere cannot steer a terminal."""

from __future__ import annotations

import io
import os
import socket
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.bounded_json import read_object
from dsv3_jax.errors import UserError
from dsv3_jax.interop.safetensors_reader import read_header
from dsv3_jax.regular_files import check_regular, checked_file, open_regular, read_regular
from dsv3_jax.terminal import printable, say


@pytest.fixture(params=["pipe", "socket", "device", "folder", "absent", "link to a device", "link to itself"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a path that is no regular file, which a plain `open` may wait for or read for ever."""
    path = tmp_path / "it"
    match request.param:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            monkeypatch.chdir(tmp_path)  # the address of a socket may have 100 characters
            socket.socket(socket.AF_UNIX).bind("it")
        case "device":
            path = Path("/dev/zero")
        case "folder":
            path.mkdir()
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "link to itself":
            path.symlink_to(path)
    return path


def test_no_reader_opens_what_is_no_file(no_file: Path) -> None:
    readers = [open_regular, check_regular, read_header]
    readers += [lambda path: read_regular(path, max_bytes=9), lambda path: read_object(path, max_bytes=9)]
    for read in readers:
        with pytest.raises(UserError, match=r"cannot read .*(it|zero): \w") as caught:
            read(no_file)
        assert "\n" not in str(caught.value)


def test_files_and_links_to_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b", max_bytes=5) == b"12345"
    with pytest.raises(UserError, match="larger than 4 bytes"):
        read_regular(tmp_path / "b", max_bytes=4)


def test_a_file_of_a_folder_is_really_in_it(tmp_path: Path) -> None:
    inside, outside = tmp_path / "folder/deep", tmp_path / "other"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    folder = tmp_path / "folder"
    (folder / "in").symlink_to(inside / "file")
    assert checked_file(folder, "in") == inside / "file"
    for target in (outside / "file", outside / "absent"):
        (folder / "out").symlink_to(target)
        with pytest.raises(UserError, match=r"leads out of the folder|is missing"):
            checked_file(folder, "out")
        (folder / "out").unlink()


@given(st.text())
def test_printable_text_has_no_control_characters_and_loses_nothing(text: str) -> None:
    shown = printable(text)
    assert not [each for each in shown if unicodedata.category(each) == "Cc" and each not in "\n\t"]
    assert printable(shown) == shown
    kept = "".join(each for each in text if unicodedata.category(each) != "Cc" or each in "\n\t")
    assert kept == text or len(shown) == len(kept) + 4 * (len(text) - len(kept))
    stream = io.StringIO()
    say(text, to=stream)
    assert stream.getvalue() == shown + "\n"
