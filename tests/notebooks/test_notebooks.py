"""Checks that every notebook is well formed, has no outputs or those of one whole run, and runs when shortened."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def is_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with the extra `notebooks`")
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = read(path)
    assert sum(map(is_parameters, cells)) == 1
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert re.search(r"two\s+(CPU\s+)?cores", source(cells[0])), "it does not say how long it takes"
    assert 'find_spec("dsv3_jax") is None' in "".join(map(source, code[:2])), "the package is not installed first"
    counts = [cell["execution_count"] for cell in code]
    if any(cell["outputs"] for cell in code) or any(counts):
        assert counts == list(range(1, len(code) + 1)), "outputs are not of one run from top to bottom"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    shown = json.dumps(outputs)
    assert not re.search(r"/(home|root|tmp|Users)/", shown), "it shows a path of the machine on which it ran"
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert len(shown) < 150_000 * max(drawn, 1), "a figure is too large to keep"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs as a plain script in this process, with SHORT set after the cell of parameters, and draws no figures."""
    monkeypatch.chdir(tmp_path)
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        for number, cell in enumerate(read(path)):
            if cell["cell_type"] == "code":
                exec(compile(source(cell), f"{path.name}, cell {number}", "exec"), namespace)
                if is_parameters(cell):
                    namespace["SHORT"] = True
    finally:
        namespace["plt"].close("all")
        matplotlib.use(backend)
