"""Reads the project's source files, by their syntax trees alone: modules, what each imports, what each defines."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREES = ("dsv3_jax", "pallas_kernels", "experiments")


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module of the project, and the line that imports it."""

    importer: str
    imported: str
    names: tuple[str, ...]  # the names in `from imported import ...`; () where the module itself is imported
    line: int
    types_only: bool  # under `if TYPE_CHECKING:`

    def __str__(self) -> str:
        path = modules()[self.importer].relative_to(ROOT)
        return f"{path}:{self.line} imports {self.imported}" + (f" ({', '.join(self.names)})" if self.names else "")


@functools.cache
def modules() -> dict[str, Path]:
    """Returns the path of every module, by its dotted name."""
    found = {}
    for tree in TREES:
        for path in sorted((ROOT / tree).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def syntax_tree(module: str) -> ast.Module:
    """Returns the parsed source of `module`."""
    return ast.parse(modules()[module].read_text())


@functools.cache
def imports_of(module: str) -> tuple[Import, ...]:
    """Returns every import of the project's own modules in `module`, those inside functions included."""
    return tuple(_imports(module, syntax_tree(module), types_only=False))


def aliases(module: str) -> dict[str, str]:
    """Returns the names that imports bind in `module`, each with the dotted name of the project that it stands for."""
    bound = {}
    for node in ast.walk(syntax_tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname or "." not in alias.name:
                    bound[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(module, node)
            bound |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
    return {name: target for name, target in bound.items() if target.split(".")[0] in TREES}


def _imports(module: str, tree: ast.AST, types_only: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules():
                    yield Import(module, alias.name, (), node.lineno, types_only)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(module, node)
            submodules = [alias.name for alias in node.names if f"{source}.{alias.name}" in modules()]
            for name in submodules:
                yield Import(module, f"{source}.{name}", (), node.lineno, types_only)
            names = tuple(alias.name for alias in node.names if alias.name not in submodules)
            if names and source in modules():
                yield Import(module, source, names, node.lineno, types_only)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if isinstance(node.args[0], ast.Constant) and node.args[0].value in modules():
                yield Import(module, node.args[0].value, (), node.lineno, types_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                yield from _imports(module, ast.Module([statement], []), types_only=True)
            for statement in node.orelse:
                yield from _imports(module, ast.Module([statement], []), types_only)
            continue
        yield from _imports(module, node, types_only)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = modules()[module].name == "__init__.py"
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])
