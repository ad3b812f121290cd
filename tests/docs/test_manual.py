"""Checks the pages of the manual and README: the commands in them exist, and the manual is built without a warning."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from simulated import environment

from dsv3_jax.cli.fields import kinds_of_fields
from dsv3_jax.cli.main import COMMANDS, main
from dsv3_jax.cli.plan import PlanOptions
from dsv3_jax.cli.train import TrainOptions
from dsv3_jax.runs.processes import Processes
from dsv3_jax.training.defaults import default_run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """Returns the words after `dsv3` of every such line in the code blocks of a page."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [re.sub(r"^(\.venv/bin/|srun )", "", line) for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"dsv3 [a-z]", line)]


def known_options(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    if command in ("train", "plan"):
        run = default_run("nano")
        sections = {name: getattr(run, name) for name in ("model", "data", "training", "lora", "teacher", "mesh")}
        options = PlanOptions() if command == "plan" else TrainOptions(**sections, processes=Processes())
        return {f"--{name.replace('_', '-')}" for name in kinds_of_fields(options)}
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--\w[\w-]*(?:\.[\w-]+)*", capsys.readouterr().out))


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, *words in commands(page):
        assert name in COMMANDS
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given <= known_options(name, capsys), words


def test_every_page_is_linked() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or re.search(rf"^{name}$", index, re.M), f"{name} is not in the table of contents"


@pytest.mark.slow
def test_the_manual_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_parser", reason="Sphinx, MyST and furo come with the extra `docs`")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command = [*build, str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
