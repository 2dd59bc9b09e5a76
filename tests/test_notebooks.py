"""The notebooks of examples/: each runs from its first cell to its last, its own asserts included, without the network.

What they show is kept in the files, so that a reader of the repository sees it. After a change that alters it, run

    NSP_KEEP_OUTPUTS=1 pytest tests/test_notebooks.py

which writes the outputs of these runs back, without what differs from machine to machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# A path of the machine that ran it. Recipes, stores and docs are named relative to the reader's folder.
MACHINE = re.compile(r"/(?:root|home|tmp|work|Users|private|opt|usr|var)/|[A-Z]:\\\\|site-packages")
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def tidy(notebook: Any) -> Any:
    """The notebook without times, warnings of the machine and progress bars that are over."""
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [
                output for output in kept if not output.get("data", {}).get("text/plain", "").startswith("branches ")
            ]
    return notebook


def test_the_five_notebooks_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "quickstart",
        "ioi_patch_to_circuit",
        "patchscope",
        "bias_scan",
        "remote",
    }


@by_name
def test_it_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, 4)
    kept = pictures(notebook)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"], "a warning on standard error"
    if os.environ.get("NSP_KEEP_OUTPUTS"):
        nbformat.write(tidy(notebook), path)
    else:
        assert pictures(notebook) == kept > 0


@by_name
def test_what_is_kept_is_small_whole_and_of_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "kept from one run, in order"
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not MACHINE.findall("".join(str(output) for output in outputs(notebook)))
    assert path.stat().st_size < 400_000
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    # Prose before every step, and results that are checked where they are shown.
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 6
    assert sum(line.lstrip().startswith("assert ") for cell in code for line in cell.source.splitlines()) >= 3
