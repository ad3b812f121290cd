"""Checks that the mistakes kept as patches still fit the code and name tests that exist. `make mutants` tries them."""

from __future__ import annotations

import subprocess

import pytest
from mutants.run import PATCHES, ROOT, Mutant, applies, read_mutant, table

MUTANTS = [read_mutant(patch) for patch in sorted(PATCHES.glob("*.patch"))]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_patch_fits_and_its_tests_exist(mutant: Mutant) -> None:
    if subprocess.run(["git", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("git is not installed")
    assert applies(mutant), f"{mutant.patch} no longer fits {mutant.file}: make it again"
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert name.split("::")[-1].split("[")[0] in (ROOT / path).read_text(encoding="utf-8"), test


def test_the_table_counts_what_was_noticed() -> None:
    one, two = (Mutant(name, "a.py", ("t",), PATCHES) for name in ("one", "two"))
    page = table({one: "noticed", two: "NOT NOTICED"})
    assert "1 of 2" in page
    assert "| two | `a.py` | NOT NOTICED |" in page
