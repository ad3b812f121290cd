"""Makes one mistake at a time in a copy of the code and checks that the tests named beside it fail.

Each file of `patches/` is a mistake: a patch of the code, whose first line names the tests that must notice it:

    # tests: tests/training/test_losses.py::test_a tests/training/test_losses.py::test_b

`python tests/mutants/run.py` (or `make mutants`) first checks that all of these tests pass on the unchanged code, and
then writes a table of which mistakes were noticed. It exits with code 1 unless all were.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATCHES = Path(__file__).with_name("patches")
_PASSED, _FAILED = 0, 1  # pytest's exit codes; any other means that tests did not run
_LIMIT = 600  # seconds for the tests of one mistake
_HUNK = re.compile(r"^\+\+\+ b/(?P<file>\S+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A mistake: its name, the file it changes, the tests that must notice it, and the patch that makes it."""

    name: str
    file: str
    tests: tuple[str, ...]
    patch: Path


def read_mutant(patch: Path) -> Mutant:
    """Returns the mistake that a patch file describes.

    Raises:
      ValueError: the first line names no tests, or the patch changes no file.
    """
    text = patch.read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    files = _HUNK.findall(text)
    if not first.startswith("# tests: ") or not files:
        raise ValueError(f"{patch.name}: expected a first line '# tests: ...' and a patch after it")
    return Mutant(patch.stem, files[0], tuple(first.removeprefix("# tests: ").split()), patch)


def read_mutants(names: list[str]) -> list[Mutant]:
    """Returns all mistakes, or those whose names contain one of `names`."""
    mutants = [read_mutant(patch) for patch in sorted(PATCHES.glob("*.patch"))]
    return [mutant for mutant in mutants if not names or any(name in mutant.name for name in names)]


def applies(mutant: Mutant) -> bool:
    """Returns whether the patch still fits the code of this checkout."""
    command = ["git", "apply", "--check", str(mutant.patch)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def _copy(folder: Path) -> Path:
    """Copies the checkout's tracked files to `folder`; compiled test programs are shared with it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (ROOT / ".jax_cache").mkdir(exist_ok=True)
    (folder / ".jax_cache").symlink_to(ROOT / ".jax_cache")
    return folder


def _run_tests(folder: Path, tests: tuple[str, ...]) -> int:
    """Returns pytest's exit code; a run past the time limit counts as a failed test."""
    command = [sys.executable, "-m", "pytest", "-m", "", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return _FAILED
    if done.returncode not in (_PASSED, _FAILED):
        print(done.stdout[-1500:], done.stderr[-500:], file=sys.stderr)
    return done.returncode


def outcome(mutant: Mutant) -> str:
    """Returns "noticed", "NOT NOTICED", or why neither can be said."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = _copy(Path(name))
        command = ["patch", "-p1", "--quiet", "--input", str(mutant.patch)]
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
            return "THE PATCH DOES NOT FIT"
        found = {_PASSED: "NOT NOTICED", _FAILED: "noticed"}
        return found.get(_run_tests(folder, mutant.tests), "THE TESTS DID NOT RUN")


def table(outcomes: dict[Mutant, str]) -> str:
    """Returns the outcomes as a page of Markdown."""
    noticed = sum(value == "noticed" for value in outcomes.values())
    lines = [
        "# Mistakes made on purpose",
        "",
        f"{noticed} of {len(outcomes)} single mistakes in the code are noticed by the tests named for them"
        " (`make mutants`, patches in `tests/mutants/patches`).",
        "",
        "| mistake | in | outcome |",
        "|---|---|---|",
    ]
    lines += [f"| {m.name.replace('_', ' ').replace('-', ' ')} | `{m.file}` | {v} |" for m, v in outcomes.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only mistakes whose names contain one of these")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes tried at the same time (default: 2)")
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    options = parser.parse_args()
    mutants = read_mutants(options.names)
    if not mutants:
        parser.error(f"no mistake in {PATCHES} has such a name")
    tests = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        print(f"running {len(tests)} tests on the unchanged code", flush=True)
        if _run_tests(_copy(Path(name)), tests) != _PASSED:
            print("these tests do not pass on the unchanged code", file=sys.stderr)
            return 1
    outcomes = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, found in zip(mutants, pool.map(outcome, mutants), strict=True):
            outcomes[mutant] = found
            print(f"{len(outcomes):3d}/{len(mutants)}  {found:12s}  {mutant.name}", flush=True)
    if options.out:
        options.out.write_text(table(outcomes), encoding="utf-8")
    else:
        print(table(outcomes))
    return int(any(found != "noticed" for found in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
