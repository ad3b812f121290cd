"""The line with which a command refuses bad input."""

from __future__ import annotations

import pytest

from dsv3_jax.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Returns the one line on stderr of a command that exits with code 2."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("dsv3: ")
    assert "---" not in lines[0]
    assert "helptext" not in lines[0]
    return lines[0]
