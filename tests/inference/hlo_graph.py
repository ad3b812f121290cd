"""Reads what depends on what in a compiled program: which products on which exchanges, by the scope they are in."""

from __future__ import annotations

import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"(?:^|[)}\]] )(?P<name>[a-z][\w-]*)\((?P<operands>[^)]*)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?(?P<names>[^,}]*(?:, %[^,}]*)*)")
_NAME = re.compile(r"%([\w.-]+)")
_EXCHANGES = ("all-to-all", "ragged-all-to-all")

Content = frozenset[tuple[str, str]]
"""Pairs of a kind, `product` or `exchange`, and the scope that its name contains."""


class Program:
    """The instructions of a compiled program.

    Args:
      text: `compiled.as_text()`.
      scopes: names of `jax.named_scope`.
    """

    def __init__(self, text: str, scopes: list[str]):
        self._scopes = scopes
        self._lines: dict[str, dict[str, str]] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self._lines.setdefault(found["name"], {})
            elif found := _INSTRUCTION.match(line):
                current[found["name"]] = found["rest"]
        self._contents: dict[str, Content] = {}

    def dependences(self) -> set[tuple[str, str]]:
        """Returns (a, b) where, in some computation, a product of scope b needs the result of an exchange of scope a.

        An instruction that has instructions of several scopes inside, such as the loop over layers, is looked into,
        and not compared with others.
        """
        return {pair for computation in self._lines for pair in self._dependences_in(computation)}

    def _dependences_in(self, computation: str) -> Iterator[tuple[str, str]]:
        after: dict[str, set[str]] = {}  # the scopes of exchanges that each instruction needs
        for name, line in self._lines[computation].items():
            operation = _OPERATION.search(line)
            operands = _NAME.findall(operation["operands"]) if operation else []
            own = self._content_of(line)
            needs = {scope for operand in operands for scope in after.get(operand, ())}
            scopes = {scope for _, scope in own}
            if len(scopes) == 1:
                yield from ((scope, b) for kind, b in own if kind == "product" for scope in needs)
                yield from ((b, b) for b in scopes if {kind for kind, _ in own} == {"product", "exchange"})
            after[name] = needs | {scope for kind, scope in own if kind == "exchange" and len(scopes) == 1}

    def _content_of(self, line: str) -> Content:
        operation = _OPERATION.search(line)
        kinds = []
        if operation and operation["name"].removesuffix("-start") in _EXCHANGES:
            kinds.append("exchange")
        if operation and (operation["name"] == "dot" or "matmul" in line.split("metadata")[0]):
            kinds.append("product")
        scope = next((scope for scope in self._scopes if f"/{scope}/" in line), None)
        own = {(kind, scope) for kind in kinds if scope is not None}
        for called in _CALLED.findall(line):
            for name in _NAME.findall(called):
                own |= self._content(name)
        return frozenset(own)

    def _content(self, computation: str) -> Content:
        if computation not in self._contents:
            lines = self._lines.get(computation, {}).values()
            self._contents[computation] = frozenset().union(*map(self._content_of, lines))
        return self._contents[computation]
