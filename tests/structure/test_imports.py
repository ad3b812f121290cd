"""Checks imports: they point down ARCHITECTURE.md's table of packages, form no cycle, and take public names only."""

from __future__ import annotations

import ast
import functools
import re

import pytest
from source_tree import ROOT, Import, aliases, imports_of, modules, syntax_tree

# Methods of named tuples, which are public although their names begin with an underscore.
_PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}


@functools.cache
def _table() -> tuple[dict[str, int], set[tuple[str, str]]]:
    """Returns the height of each package, 0 for the lowest, and the pairs (importer, imported) allowed besides."""
    rows = re.search(r"^\| Packages.*?\n\|[-|]+\n(.*?)\n(?!\|)", (ROOT / "ARCHITECTURE.md").read_text(), re.M | re.S)
    assert rows is not None, "ARCHITECTURE.md has no table whose first column is called Packages"
    height, beside = {}, set()
    for level, row in enumerate(reversed(rows[1].splitlines())):
        packages, *_, arrows = [cell.strip() for cell in row.strip("|").split("|")]
        height |= {name.strip("/"): level for name in re.findall(r"`([\w/.]+)`", packages)}
        beside |= set(re.findall(r"`([\w.]+) -> ([\w.]+)`", arrows))
    return height, beside


def _package(module: str) -> str:
    """Returns the entry of the table under which `module` falls."""
    first, *rest = module.split(".")
    if first != "dsv3_jax":
        return first
    if not rest:
        return "dsv3_jax"
    return rest[0] if (ROOT / first / rest[0]).is_dir() else f"{rest[0]}.py"


def _all_imports() -> list[Import]:
    return [imported for module in modules() for imported in imports_of(module)]


def test_every_package_has_its_row():
    height, _ = _table()
    assert not {_package(module) for module in modules()} - set(height)


def test_imports_between_packages_of_one_row_go_one_way():
    _, beside = _table()
    assert not [arrow for arrow in beside if arrow[::-1] in beside]


def test_no_import_points_up():
    """Imports for type checkers alone count too, except within a row."""
    height, beside = _table()
    wrong = []
    for each in _all_imports():
        importer, imported = _package(each.importer), _package(each.imported)
        if importer == imported or height[importer] > height[imported]:
            continue
        if height[importer] < height[imported]:
            wrong.append(f"{each}: upward")
        elif (importer, imported) not in beside and not each.types_only:
            wrong.append(f"{each}: within the row, where ARCHITECTURE.md has no arrow")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    """Imports inside functions count; those for type checkers alone do not, as they are never run.

    To import a module of a package runs the package's `__init__` first, which counts where the importer is outside it.
    """
    edges: dict[str, set[str]] = {module: set() for module in modules()}
    for each in _all_imports():
        if each.types_only:
            continue
        edges[each.importer].add(each.imported)
        parents = each.imported.split(".")
        for size in range(2, len(parents)):
            package = ".".join(parents[:size])
            if package in modules() and not f"{each.importer}.".startswith(f"{package}."):
                edges[each.importer].add(package)
    cycles = _cycles(edges)
    assert not cycles, "\n" + "\n".join(" <-> ".join(sorted(cycle)) for cycle in cycles)


def _cycles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Returns the sets of modules that reach one another (the strongly connected components of more than one)."""

    @functools.cache
    def reached(module: str) -> frozenset[str]:
        seen, waiting = set(), [module]
        while waiting:
            for following in edges[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        return frozenset(seen)

    found: list[set[str]] = []
    for module in edges:
        if module in reached(module) and not any(module in cycle for cycle in found):
            found.append({other for other in reached(module) if module in reached(other)})
    return found


def test_cycles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d", "a"}}
    assert _cycles(edges) == [{"b", "c"}, {"d"}]


@pytest.mark.parametrize("tree", ["dsv3_jax", "pallas_kernels", "experiments"])
def test_private_names_stay_in_their_module(tree):
    wrong = [
        f"{modules()[module].relative_to(ROOT)}:{line} takes {name}"
        for module in modules()
        if module.split(".")[0] == tree
        for line, name in _private_names(module)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def _private_names(module: str) -> list[tuple[int, str]]:
    """Returns the lines of `module` that take a name with a leading underscore from another module, and those names."""
    found = [
        (each.line, f"{each.imported}.{name}")
        for each in imports_of(module)
        for name in each.names
        if name.startswith("_") and not name.startswith("__")
    ]
    bound = aliases(module)
    for node in ast.walk(syntax_tree(module)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root, _, rest = ast.unparse(node.value).partition(".")
            if root in bound and node.attr not in _PUBLIC:
                found.append((node.lineno, ".".join(filter(None, [bound[root], rest, node.attr]))))
    return found
