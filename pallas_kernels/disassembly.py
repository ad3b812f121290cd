"""Reads the machine code (SASS) of a Hopper kernel: which instructions its main loop has, and in which order.

A product's speed depends on that order as much as on the number of instructions: a load before the products delays
them by its latency, and so does anything between waiting for them and releasing their stage of the ring.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shutil

# How the instructions that matter are called in the summary of a loop, by the beginning of their names.
_NAMES = {
    "QGMMA": "WGMMA",
    "HGMMA": "WGMMA",
    "WARPGROUP.DEPBAR": "WAIT",
    "SYNCS.ARRIVE": "RELEASE",
    "LDG": "LOAD",
    "LD.": "LOAD",
    "LDS": "LOAD_SHARED",
    "LDL": "SPILL",
    "STL": "SPILL",
    "FMUL": "FMUL",
    "FFMA": "FFMA",
    "FADD": "FADD",
    "MEMBAR": "FENCE",
    "FENCE": "FENCE",
    "BAR.": "BARRIER",
}
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([^;]*);")
_JUMP = re.compile(r"BRA.*`\((\.L_x_\d+)\)")


def cuda_folder() -> pathlib.Path | None:
    """Returns the folder whose `bin` has nvdisasm: of the wheel nvidia-cuda-nvdisasm, or of the toolkit on PATH."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for program in pathlib.Path(root).glob("*/bin/nvdisasm"):
            return program.parents[1]
    program = shutil.which("nvdisasm")
    return pathlib.Path(program).parents[1] if program else None


def main_loop(sass: str) -> list[str]:
    """Returns the instructions of the innermost loop that multiplies on the tensor cores, in order.

    They have the names WGMMA, WAIT (for the products), RELEASE (of a stage), LOAD, LOAD_SHARED, SPILL, FMUL, FFMA,
    FADD, FENCE and BARRIER. Other instructions, such as address arithmetic and jumps, are left out. The list is empty
    where no loop multiplies.
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(instruction[1])
    loops = []
    for end, instruction in enumerate(code):
        jump = _JUMP.match(instruction)
        start = labels.get(jump[1], end + 1) if jump else end + 1
        if start <= end and any("GMMA" in other for other in code[start:end]):
            loops.append(code[start:end])
    return [name for instruction in min(loops, key=len, default=[]) if (name := _name(instruction))]


def _name(instruction: str) -> str | None:
    return next((name for prefix, name in _NAMES.items() if instruction.startswith(prefix)), None)
