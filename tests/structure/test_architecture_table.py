"""Checks that every file and name in the code that ARCHITECTURE.md mentions exists."""

from __future__ import annotations

import ast
import re

import pytest
from source_tree import ROOT

_TEXT = (ROOT / "ARCHITECTURE.md").read_text()
# `path/to/file.py:name` or `path/to/file.py:Class.method`, below the root or below dsv3_jax.
_PLACES = re.findall(r"`?\b([\w/]+\.py):([A-Za-z_][\w.]*\w)", _TEXT)
# | Eq. 13-16 | `pallas_kernels/routing/reference.py:select` |
_ROWS = re.findall(r"^\|[^|\n]*(?:Eq\.|§|[Ss]ection)[^|\n]*\|[^\n]*?[\w/]+\.py:\w+", _TEXT, re.M)


def test_the_table_has_rows():
    assert len(_ROWS) >= 10


@pytest.mark.parametrize(("file", "name"), _PLACES)
def test_named_code_exists(file, name):
    path = next((path for path in (ROOT / file, ROOT / "dsv3_jax" / file) if path.is_file()), None)
    assert path is not None, f"ARCHITECTURE.md names {file}, which does not exist"
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = [node for node in body if part in _defined(node)]
        assert found, f"{file} defines no {name}"
        body = getattr(found[-1], "body", [])


def _defined(node: ast.stmt) -> list[str]:
    """Returns the names that a statement defines in its own scope."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []
