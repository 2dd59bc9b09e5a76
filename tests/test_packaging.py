"""The wheel: one import name, everything in it, and it works from where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nsp

ROOT = Path(__file__).parents[1]
SOURCES = ("nsp", "cli", "stores", "recipes")
PACKAGES = ("nsp", "nsp.cli", "nsp.stores", "nsp.recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: a build leaves folders behind, and takes in what lies in old ones."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "dist", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own, without what it depends on."""
    folder = tmp_path_factory.mktemp("target")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-index", "--target", str(folder), str(wheel), cwd=folder)
    return folder


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """What a command prints; it sees nsp in `path` before the one that these tests run with."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    outcome = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def test_the_wheel_adds_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nsp"}
    assert len(tops) == 2


def test_the_wheel_holds_every_source(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"nsp/py.typed"}
    for folder in SOURCES:
        inside = "nsp" if folder == "nsp" else f"nsp/{folder}"
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".pyi", ".yaml", ".css", ".js"):
                wanted.add(f"{inside}/{path.relative_to(ROOT / folder).as_posix()}")
    assert {name for name in names if name.startswith("nsp/")} == wanted
    assert {"nsp/cli/app.py", "nsp/stores/writer.py", "nsp/recipes/ioi.yaml"} <= names


def test_the_wheel_states_its_licence(wheel: Path) -> None:
    packed = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
    text = packed.read(metadata).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.11\n" in text
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in packed.namelist())


def test_the_command_works_from_the_wheel(target: Path, tmp_path: Path) -> None:
    names = ", ".join(PACKAGES)
    code = f"import {names}; print(*(module.__file__ for module in ({names})), sep='\\n')"
    places = run(sys.executable, "-c", code, cwd=tmp_path, path=target).splitlines()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(target) for place in places)
    command = str(target / "bin" / "nsp")
    assert run(command, "--version", cwd=tmp_path, path=target) == f"nsp {nsp.__version__}\n"
    listed = run(command, "recipes", cwd=tmp_path, path=target)
    assert all(path.stem in listed for path in (ROOT / "recipes").glob("*.yaml"))


def test_both_statements_of_the_version_agree(target: Path, tmp_path: Path) -> None:
    code = "import nsp; from importlib.metadata import version; print(nsp.__version__ == version('nsp'))"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=target) == "True\n"
