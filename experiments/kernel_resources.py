"""Lists registers, spills and shared memory of every kernel, compiled for Hopper and TPU on any machine.

    python experiments/kernel_resources.py
    python experiments/kernel_resources.py --only swiglu latent_decode     the other kernels keep their entries

Writes kernel_resources.json and kernel_resources.md into experiments/results/ (or --out). Needs the extra `aot`
(`make setup-aot`). Each compiler runs in a process of its own.
"""

from __future__ import annotations

import itertools
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
    """Returns the packages of pallas_kernels that list cases to compile ahead of time."""
    package = pathlib.Path(pallas_kernels.__file__).parent
    return sorted(path.parent.name for path in package.glob("*/ahead_cases.py"))


def compiled(target: str, chosen: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Compiles operations for a target in a new process and returns the resources of each case."""
    path = os.pathsep.join([str(WHEELS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pallas_kernels.compile_ahead", target, "--all", *chosen]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        sys.exit(f"compiling for {target} failed (see above); `make setup-aot` installs the compilers")
    results = json.loads(run.stdout)
    for case in itertools.chain.from_iterable(results.values()):
        case.pop("seconds")
        for kernel in case.get("kernels", ()):
            kernel["main_loop"] = in_words(kernel["main_loop"])
    return results


def in_words(main_loop: list[str] | None) -> str | None:
    """Returns the order of a loop's instructions in one line, such as "4 WGMMA, 5 LOAD, WAIT, RELEASE, 96 FFMA"."""
    if main_loop is None:
        return None
    runs = [(what, sum(1 for _ in run)) for what, run in itertools.groupby(main_loop)]
    return ", ".join(what if count == 1 else f"{count} {what}" for what, count in runs)


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Returns the results as Markdown tables."""
    lines = [
        "# Resources of the kernels",
        "",
        "Written by `experiments/kernel_resources.py`. Compiled for sm_90a with ptxas of CUDA 13. Registers are those",
        "per thread at launch; a warp-specialised kernel then gives its producer 40 and its consumers 232.",
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
    lines += ["", "Size of the program compiled for each TPU, in bytes:", ""]
    tpus = [target for target in results if target != "hopper"]
    lines += [f"| operation | case | {' | '.join(tpus)} |", "| --- | --- |" + " --- |" * len(tpus)]
    for operation, cases in results[tpus[0]].items():
        for index, case in enumerate(cases):
            sizes = " | ".join(f"{results[target][operation][index]['program_bytes']:,}" for target in tpus)
            lines.append(f"| {operation} | {case['case']} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--out", type=folder, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", nargs="+", default=operations(), choices=operations(), help="operations to compile")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "kernel_resources.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for target in TARGETS:
        found = results.get(target, {}) | compiled(target, options.only)
        results[target] = {operation: found[operation] for operation in sorted(found)}
    file.write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "kernel_resources.md").write_text(table(results))
    print(f"wrote kernel_resources.json and kernel_resources.md into {options.out}")


if __name__ == "__main__":
    main()
