"""Checks that the wheel works without the repository, and that the facts about the package agree everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import dsv3_jax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"]


def run(*command: str | Path, folder: Path, **changes: str) -> str:
    """Runs a command in a folder and returns what it prints, after checking that it succeeds."""
    env = os.environ | changes
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the wheel and the sdist, built from a copy of the packages and of the files beside them."""
    source, out = tmp_path_factory.mktemp("source") / "dsv3-jax", tmp_path_factory.mktemp("built")
    for package in ("dsv3_jax", "pallas_kernels"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy(file, source)
    for other in ("tests/test_a.py", "tests/golden/a.npz", "experiments/results/a.json", "notebooks/a.ipynb"):
        (source / other).parent.mkdir(parents=True, exist_ok=True)
        (source / other).touch()
    build = "import setuptools.build_meta as b, sys; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
    run(sys.executable, "-c", build, out, folder=source)
    return out


def test_the_sdist_holds_what_a_wheel_is_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = [name.partition("/")[2] for name in file.getnames()]
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "dsv3_jax/py.typed"} <= {*names}
    assert not [name for name in names if name.startswith(("tests", "experiments", "notebooks"))]


def test_the_wheel_holds_every_file_of_the_packages(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info" not in name}
    packages = [path for package in ("dsv3_jax", "pallas_kernels") for path in (ROOT / package).rglob("*")]
    files = [path for path in packages if path.is_file() and path.suffix not in (".md", ".pyc")]
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}


def test_the_installed_command_trains_plans_and_writes_elsewhere(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run(*pip, "--target", site, wheel, folder=tmp_path)

    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    changes = {"PYTHONPATH": str(site), **cache}
    version = run(sys.executable, site / "bin" / "dsv3", "--version", folder=tmp_path, **changes)
    assert version == f"dsv3 {dsv3_jax.__version__}\n"
    train = ["train", "--preset", "tiny", "--out", "run", "--steps", "2", "--training.sample-tokens", "0"]
    train += ["--data.corpus", str(ROOT / "README.md"), "--data.tokenizer", "byte"]
    generate = ["generate", "run", "--prompt", "def ", "--max-new-tokens", "2", "--no-stream"]
    plan = ["plan", "--preset", "tiny", "--target", "local"]
    program = f"""
import dsv3_jax, pallas_kernels
from dsv3_jax.cli.main import main
print([main(words) for words in {[train, generate, plan]}], dsv3_jax.__file__, pallas_kernels.__file__)
"""
    shown = run(sys.executable, "-c", program, folder=tmp_path, **changes)
    assert shown.splitlines()[-1].startswith("[0, 0, 0] ")
    assert shown.splitlines()[-1].count(str(site)) == 2
    assert "step 2: validation loss" in shown
    assert "\ndef " in shown


def test_the_version_is_written_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.search(rf"^## {re.escape(dsv3_jax.__version__)}$", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_address_of_the_repository_is_the_same_everywhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CITATION.cff", *(ROOT / "notebooks").glob("*.ipynb")]
    pages += [ROOT / "docs" / "first_hour.md", ROOT / "docs" / "how_to" / "one_gpu.md"]
    for page in pages:
        found = set(re.findall(r"https://[\w./-]+/dsv3-jax\b", page.read_text()))
        assert found <= {ADDRESS}, f"{page} has another address than pyproject.toml"
    installing = [page for page in pages if f"git+{ADDRESS}" in page.read_text()]
    assert len(installing) >= len(pages) - 2  # all but CITATION.cff and a notebook that installs nothing


def test_the_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["repository-code"] == ADDRESS
