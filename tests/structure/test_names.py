"""Checks that every name that a function reads from its module is defined there.

The linter and the type checker cannot: both are told to ignore undefined names, which the letters of array shapes are.
"""

from __future__ import annotations

import builtins
import dis
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for name in ("dsv3_jax", "pallas_kernels", "experiments") for path in (ROOT / name).rglob("*.py"))
_OF_A_MODULE = {"__file__", "__name__", "__doc__", "__path__", "__spec__", "__package__"}


def code_objects(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_objects(constant)


def undefined(source: str) -> set[str]:
    """Returns the names that functions of a module read from it, but that it does not define."""
    module = compile(source, "module", "exec", dont_inherit=True)
    defined, read = set(dir(builtins)) | _OF_A_MODULE, set()
    for code in code_objects(module):
        for instruction in dis.get_instructions(code):
            if instruction.opname == "STORE_GLOBAL" or (code is module and instruction.opname == "STORE_NAME"):
                defined.add(instruction.argval)
            elif instruction.opname == "LOAD_GLOBAL":
                read.add(instruction.argval)
    return read - defined


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_defined(path: Path) -> None:
    assert not undefined(path.read_text(encoding="utf-8"))


def test_an_undefined_name_is_found() -> None:
    assert undefined("import math\ndef f():\n    return [math.pi, lambda: missing]\n") == {"missing"}
