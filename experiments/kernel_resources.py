"""Registers, spills and shared memory of every kernel, compiled for Hopper and for TPUs without either.

    python experiments/kernel_resources.py

Writes kernel_resources.json and kernel_resources.md into experiments/results/ (or --out). Needs the extra `aot`
(`make setup-aot`). The compilers run in processes of their own.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from command_line import CommandLine, folder

import pallas_kernels
from pallas_kernels.compile_ahead import TARGETS

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "experiments" / "results"
WHEELS = REPOSITORY / ".venv" / "aot"


def operations() -> list[str]:
    """The packages of pallas_kernels that list what to compile ahead."""
    package = pathlib.Path(pallas_kernels.__file__).parent
    return sorted(path.parent.name for path in package.glob("*/ahead_cases.py"))


def compiled(target: str) -> dict[str, list[dict[str, Any]]]:
    path = os.pathsep.join([str(WHEELS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pallas_kernels.compile_ahead", target, *operations()]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        sys.exit(f"compiling for {target} failed (see above); the extra 'aot' is installed by make setup-aot")
    return json.loads(run.stdout)


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    lines = [
        "# Resources of the kernels",
        "",
        "By `experiments/kernel_resources.py`. Compiled for sm_90a with ptxas of CUDA 13. Registers are those at",
        "launch; a warp-specialised kernel then moves them from its producer (40) to its consumers (232).",
        "",
        "| operation | case | kernel | registers | spilled bytes | shared memory | tensor-core instruction |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation, cases in results["hopper"].items():
        for case in cases:
            for kernel in case["kernels"]:
                spilled = kernel["spill_store_bytes"] + kernel["spill_load_bytes"]
                instruction = ", ".join(name.split("aligned.")[-1] for name in kernel["tensor_core"]) or "none"
                lines.append(
                    f"| {operation} | {case['case']} | {kernel['kernel']} | {kernel['registers']} | {spilled} | "
                    f"{kernel['shared_memory_bytes']:,} | {instruction} |"
                )
    lines += ["", "Compiled to the end for TPUs (bytes of program):", ""]
    tpus = [target for target in results if target != "hopper"]
    lines += [f"| operation | case | {' | '.join(tpus)} |", "| --- | --- |" + " --- |" * len(tpus)]
    for operation, cases in results[tpus[0]].items():
        for index, case in enumerate(cases):
            sizes = " | ".join(f"{results[target][operation][index]['program_bytes']:,}" for target in tpus)
            lines.append(f"| {operation} | {case['case']} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--out", type=folder, default=RESULTS)
    options = parser.parse_args()
    results = {target: compiled(target) for target in TARGETS}
    for operations_of_target in results.values():
        for case in (case for cases in operations_of_target.values() for case in cases):
            case.pop("seconds")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernel_resources.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "kernel_resources.md").write_text(table(results))
    print(f"wrote kernel_resources.json and kernel_resources.md into {options.out}")


if __name__ == "__main__":
    main()
