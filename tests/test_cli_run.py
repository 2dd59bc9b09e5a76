"""`nsp run` through its real entry point: a recipe file and a model directory in, a store and a table out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from engine_models import module, reference, text, tokenizer
from hooks_reference import Edit, replacing

import nsp
from nsp.experiments import EXPERIMENTS, run
from nsp.recipe import load_recipe_file

CLEAN, CORRUPT = [5, 11, 23, 7, 40], [5, 11, 50, 9, 40]
SHORT_CLEAN, SHORT_CORRUPT = [3, 1, 4], [3, 9, 4]
RECIPE = f"""\
kind: activation-patching
model: ./tiny
pairs:
  - {{clean: {text(CLEAN)}, corrupt: {text(CORRUPT)}, answer: w4, distractor: w9, name: long}}
  - {{clean: {text(SHORT_CLEAN)}, corrupt: {text(SHORT_CORRUPT)}, answer: w7, distractor: w20}}
components: [resid_post, z]
heads: all
out: runs/x.zarr
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as a hub model's: configuration, weights, tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    module("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, tiny: Path) -> Path:
    """A working directory with a recipe beside its model."""
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1", "PYTHONUTF8": "1"}


def command(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``nsp <words>`` in a process of its own."""
    entry = Path(sys.executable).with_name("nsp")
    return subprocess.run(
        [str(entry), *words], cwd=place, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )


def done(place: Path, *words: str) -> str:
    result = command(place, *words)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def stores(place: Path) -> list[str]:
    return sorted(str(found.parent.relative_to(place)) for found in place.rglob("zarr.json") if found.parent.suffix)


def opened(store: Path) -> xr.DataTree:
    """As anyone would who has never heard of nsp."""
    return xr.open_datatree(store, engine="zarr", consolidated=False)


def test_a_recipe_becomes_a_store_that_anyone_can_read(place: Path, tiny: Path) -> None:
    out = done(place, "run", "recipe.yaml", "--no-progress")
    assert "results: runs/x.zarr" in out
    assert "z: strongest sites" in out
    tree = opened(place / "runs/x.zarr")
    hooks = reference(nsp.load(tiny, dtype="float32"))
    pairs = [(CLEAN, CORRUPT, 4, 9), (SHORT_CLEAN, SHORT_CORRUPT, 7, 20)]
    for number, (clean, corrupt, answer, distractor) in enumerate(pairs):
        donors = hooks.values(clean, [("z", 1), ("resid_post", 1)])
        for position in range(len(corrupt)):
            for name, head in (("resid_post", None), ("z", 2)):
                change = replacing(donors[name, 1], [position], None if head is None else [head])
                logits = hooks.logits(corrupt, [Edit(name, 1, change)])[-1]
                found = tree[f"effects/{name}"]["logit_diff"].sel(pair=number, layer=1, position=position)
                value = found if head is None else found.sel(head=head)
                np.testing.assert_allclose(value, float(logits[answer] - logits[distractor]), atol=1e-4)
        plain = hooks.logits(clean)[-1]
        np.testing.assert_allclose(
            tree["baseline"]["logit_diff_clean"][number], float(plain[answer] - plain[distractor]), atol=1e-4
        )
    assert tree["inputs"]["text_corrupt"].values[0] == text(CORRUPT)
    # The same command again has nothing to do, and says so; `nsp show` prints the same table.
    again = command(place, "run", "recipe.yaml")
    assert again.returncode == 0
    assert "nothing is left to compute" in again.stderr
    assert again.stdout == out
    assert done(place, "show", "runs/x.zarr").splitlines()[:8] == out.splitlines()[:8]
    xr.testing.assert_identical(opened(place / "runs/x.zarr"), tree)


def test_a_dry_run_prints_the_plan_and_writes_nothing(place: Path) -> None:
    out = done(place, "run", "recipe.yaml", "--dry-run", "--set", "layers=1:3", "--out", "elsewhere.zarr")
    assert "would write elsewhere.zarr" in out
    for word in ("branches", "pruned", "passes", "of naive cost", "time", "memory", "resid_post[1:3]", "z[1:3][*]"):
        assert word in out
    assert stores(place) == []


def test_settings_out_and_force(place: Path) -> None:
    done(
        place,
        "run",
        "recipe.yaml",
        "--set",
        "layers=1:3",
        "--set",
        "components=[z]",
        "--out",
        "a.zarr",
        "--no-progress",
    )
    assert stores(place) == ["a.zarr"]
    tree = opened(place / "a.zarr")
    assert set(tree["effects"].children) == {"z"}
    assert tree["effects/z"]["layer"].values.tolist() == [1, 2]
    settings = [
        "run",
        "recipe.yaml",
        "--set",
        "mode=interchange",
        "--set",
        "heads=null",
        "--out",
        "a.zarr",
        "--no-progress",
    ]
    refused = command(place, *settings)
    assert refused.returncode == 2
    assert "a.zarr" in refused.stderr
    assert "--force" in refused.stderr
    xr.testing.assert_identical(opened(place / "a.zarr"), tree)
    done(place, *settings, "--force")
    replaced = opened(place / "a.zarr")
    assert replaced["inputs"]["base"].values.tolist() == ["corrupt", "clean"] * 2
    assert replaced["effects/z"]["logit_diff"].dims == ("pair", "layer", "position")
    assert stores(place) == ["a.zarr"]


KILLER = """
    import os, signal, sys
    from nsp.experiments.activation_patching import experiment as patching

    patching._UNIT_FLOP = 2e5  # many units
    allowed, whole = int(sys.argv[1]), patching.ActivationPatching.compute

    def compute(self, *arguments):
        global allowed
        if allowed == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        allowed -= 1
        return whole(self, *arguments)

    patching.ActivationPatching.compute = compute
    from nsp.cli.app import main

    sys.exit(main(sys.argv[2:]))
"""


def killed(place: Path, after: int, *words: str) -> subprocess.CompletedProcess[str]:
    """``nsp <words>``, killed by the system after a number of units of work."""
    arguments = [sys.executable, "-c", textwrap.dedent(KILLER), str(after), *words]
    return subprocess.run(
        arguments, cwd=place, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )


def in_one_go(place: Path) -> xr.DataTree:
    """The recipe's store, written in this process without a stop."""
    recipes = {kind: experiment.recipe_class for kind, experiment in EXPERIMENTS.items()}
    (item,) = load_recipe_file(place / "recipe.yaml", [], kinds=recipes)
    job = EXPERIMENTS["activation-patching"](nsp.load(place / "tiny", dtype="float32"), item.recipe)
    run(job, out=place / "whole.zarr", progress=False)
    return opened(place / "whole.zarr")


def test_a_run_that_was_killed_goes_on_where_it_stopped(place: Path) -> None:
    words = ["run", "recipe.yaml", "--no-progress"]
    first = killed(place, 3, *words)
    assert first.returncode == -9
    half = opened(place / "runs/x.zarr").load()
    assert np.isfinite(half["effects/resid_post"]["logit_diff"]).any()
    assert np.isnan(half["effects/z"]["logit_diff"].isel(pair=1, position=0)).any()
    second = killed(place, -1, *words, "--memory", "200KB")  # another budget: the same run
    assert second.returncode == 0, second.stderr
    assert re.search(r"found [23] of", second.stderr)  # the third one may have been on its way to the disk
    tree = opened(place / "runs/x.zarr")
    whole = in_one_go(place)
    for group in ("effects/resid_post", "effects/z", "baseline", "receipts/z"):
        for name, array in tree[group].data_vars.items():
            percent = 100 if str(name).startswith("recovery") else 1
            np.testing.assert_allclose(array, whole[group][name], rtol=1e-5, atol=2e-5 * percent)


def recipe_with(**keys: str) -> str:
    lines = [line for line in RECIPE.splitlines() if line.split(":")[0] not in keys]
    if "pairs" in keys:
        lines = [line for line in lines if not line.startswith("  - ")]
    return "\n".join([*lines, *(f"{key}: {value}" for key, value in keys.items()), ""])


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ({"layer": "0"}, (), "recipe.yaml:9: unknown key 'layer'"),  # with the file, the line, and the nearest key
        ({"layers": "[1, 3]"}, (), "3 is out of range"),
        ({"pairs": "[{clean: w1 w2 w3, corrupt: w1 w2, answer: w4, distractor: w5}]"}, (), "the donor 3"),
        ({"pairs": "[{clean: w1 w2, corrupt: w1 w3, answer: w4 w5, distractor: w5}]"}, (), "is 2 tokens"),
        ({"pairs": "missing.csv"}, (), "missing.csv"),
        ({"model": "smollm3-tiny"}, (), "smollm3-tiny"),
        ({}, ("--out", "recipe.yaml"), "is a file"),
    ],
    ids=["key", "layer", "lengths", "answer", "file", "model", "out"],
)
def test_wrong_input_is_one_message_and_exit_code_two(
    place: Path, keys: dict[str, str], words: tuple[str, ...], message: str
) -> None:
    (place / "recipe.yaml").write_text(recipe_with(**keys))
    result = command(place, "run", "recipe.yaml", *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("error") == 1
    assert "Traceback" not in result.stderr
    assert "Traceback" not in result.stdout
    assert stores(place) == []
    assert not (place / "runs").exists()
