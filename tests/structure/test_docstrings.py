"""Checks that public docstrings begin with what the thing is or returns."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from source_tree import ROOT, modules, syntax_tree

# First words of sentences that have no verb, or that say nothing without the sentence before them.
_UNCLEAR = re.compile(r"(Of|As|And|Likewise|Ditto|So|That|The same)\b")


def _documented(module: str) -> Iterator[tuple[int, str, str | None]]:
    """Yields line, name and docstring of the module and of every public class, function and method in it."""
    tree = syntax_tree(module)
    yield 1, module, ast.get_docstring(tree)
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
                yield child.lineno, prefix + child.name, ast.get_docstring(child)
                if isinstance(child, ast.ClassDef):
                    waiting.append((f"{child.name}.", child))


@pytest.mark.parametrize("tree", ["dsv3_jax", "pallas_kernels"])
def test_docstrings(tree):
    wrong = []
    for module, path in modules().items():
        if module.split(".")[0] != tree:
            continue
        for line, name, text in _documented(module):
            where = f"{path.relative_to(ROOT)}:{line} {name}"
            if text and _UNCLEAR.match(text):
                wrong.append(f"{where}: {text.splitlines()[0]}")
    assert not wrong, f"{len(wrong)} begin unclearly\n" + "\n".join(wrong)
