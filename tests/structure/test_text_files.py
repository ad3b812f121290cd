"""Checks that text files are read and written as UTF-8 whatever the locale is, which `open` would follow."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from source_tree import modules, syntax_tree


def _locale_dependent(module: str) -> Iterator[int]:
    """Yields the lines that open a file as text without naming its encoding."""
    for node in ast.walk(syntax_tree(module)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        binary = any("b" in str(value.value) for value in node.args if isinstance(value, ast.Constant))
        binary |= any(word.arg == "buffering" for word in node.keywords)
        of_module = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        other = of_module and node.func.value.id in ("os", "gzip", "Image")  # pyright: ignore[reportAttributeAccessIssue]
        if name in ("read_text", "write_text") or (name in ("open", "fdopen") and not binary and not other):
            yield node.lineno


def test_every_text_file_has_an_encoding():
    package = [module for module in modules() if module.startswith(("dsv3_jax", "pallas_kernels"))]
    assert not [f"{modules()[module]}:{line}" for module in package for line in _locale_dependent(module)]
