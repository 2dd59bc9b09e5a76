"""The command line: what it prints, where results go, exit codes. A toy experiment stands in for models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr
from fake_experiment import FakeExperiment

from nsp.cli.app import main
from nsp.cli.console import cell_text, recipe_kinds
from nsp.recipe_schema import recipe_schema

TOY = "kind: toy\nout: runs/toy.zarr\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeExperiment:
    fake = FakeExperiment()
    monkeypatch.chdir(tmp_path)
    fake.install(monkeypatch)
    (tmp_path / "toy.yaml").write_text(TOY)
    return fake


def stores(folder: str = ".") -> list[str]:
    """Every store below a folder, and whatever looks like the remains of one."""
    return sorted(str(path.parent) for path in Path(folder).rglob("zarr.json") if path.parent.suffix == ".zarr")


# Running


def test_run_stores_and_prints_the_strongest_sites(fake: FakeExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "toy.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "toy summary" in out
    assert " John\\n[bold]" in out  # token texts are shown as they are, on one line
    assert "1.000" in out
    assert out.rstrip().endswith("results: runs/toy.zarr")
    assert "results go to runs/toy.zarr" in err
    tree = xr.open_datatree("runs/toy.zarr", engine="zarr", consolidated=False)
    assert tree["effects/resid_post"]["effect"].sel(pair=1, layer=2, position=4) == 1


def test_options_override_the_recipe(fake: FakeExperiment) -> None:
    arguments = [
        "--set",
        "model=gpt2",
        "--set",
        "layers=0:6",
        "--memory",
        "4GB",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
    ]
    assert main(["run", "toy.yaml", *arguments, "--no-progress", "--resume"]) == 0
    (recipe,) = fake.log.prepared
    assert (recipe.layers, recipe.memory_bytes) == ("0:6", 4 * 10**9)
    (loaded,) = fake.log.loaded
    assert (loaded["name"], loaded["device"], loaded["dtype"]) == ("gpt2", "cpu", "bfloat16")


def test_out_is_the_store_or_a_folder_for_it(fake: FakeExperiment) -> None:
    assert main(["run", "toy.yaml", "--out", "elsewhere/x"]) == 0
    assert Path("elsewhere/x/zarr.json").is_file()
    assert main(["run", "toy.yaml", "--out", "elsewhere/x"]) == 0  # the store itself, again
    assert main(["run", "toy.yaml", "--out", "elsewhere"]) == 0
    assert Path("elsewhere/toy.zarr/zarr.json").is_file()


def test_several_recipes_load_each_model_once(fake: FakeExperiment) -> None:
    Path("matrix.yaml").write_text("kind: toy\nmatrix: {model: [a, b], layers: [1, 2]}\n")
    assert main(["run", "matrix.yaml", "toy.yaml", "--set", "seed=3", "--out", "all"]) == 0
    assert [options["name"] for options in fake.log.loaded] == ["a", "b", "smollm2"]
    assert stores("all") == sorted(
        ["all/toy.zarr", *(f"all/matrix-model={model}-layers={layer}.zarr" for model in "ab" for layer in (1, 2))]
    )


def test_a_dry_run_prints_the_plan_and_writes_nothing(fake: FakeExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "toy.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "would write runs/toy.zarr" in out
    assert "toy on smollm2" in out
    assert stores() == []
    assert not Path("runs").exists()


def test_an_interrupted_run_keeps_its_work_and_goes_on(
    fake: FakeExperiment, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("interrupt").touch()
    assert main(["run", "toy.yaml"]) == 130
    err = capsys.readouterr().err
    assert err.count("interrupted; finished work is kept in runs/toy.zarr") == err.count("interrupted") == 1
    assert "Traceback" not in err
    Path("interrupt").unlink()
    assert main(["run", "toy.yaml"]) == 0
    assert fake.log.units == [0, 1]
    assert main(["run", "toy.yaml"]) == 0
    assert fake.log.units == [0, 1]


def test_ctrl_c_while_a_model_loads_is_said_once(
    fake: FakeExperiment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nsp.experiments.models.load", interrupted)
    assert main(["run", "toy.yaml"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted; finished work is kept"
    assert stores() == []


def test_a_store_of_another_run_is_only_replaced_by_force(
    fake: FakeExperiment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "toy.yaml"]) == 0
    assert main(["run", "toy.yaml", "--set", "seed=1"]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["run", "toy.yaml", "--set", "seed=1", "--force"]) == 0
    assert fake.log.units == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("metric", "message"), [("fail", "error: out of memory"), ("bug", "ZeroDivisionError: division")]
)
def test_a_failed_run_exits_with_1(
    fake: FakeExperiment, capsys: pytest.CaptureFixture[str], metric: str, message: str
) -> None:
    assert main(["run", "toy.yaml", "--set", f"metric={metric}"]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert main(["run", "toy.yaml", "--set", f"metric={metric}", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "no such recipe: none.yaml"),
        (["run", "toy.yaml", "--set", "metrc=l2"], "--set metrc=l2: unknown key 'metrc'; did you mean 'metric'?"),
        (["run", "toy.yaml", "--set", "layers=99"], "layers: 99 is out of range; the model has layers 0 to 29"),
        (["run", "toy.yaml", "--set", "model=nosuch"], "there is no model 'nosuch'"),
        (["run", "toy.yaml", "--set", "file=none.csv"], "none.csv does not exist"),
        (["run", "toy.yaml", "--memory", "lots"], "--memory lots: memory: 'lots' is no size"),
        (["run", "toy.yaml", "--dtype", "bf16"], "--dtype bf16: model.dtype: 'bf16' is not valid; did you mean 'bfl"),
        (["run", "toy.yaml", "toy.yaml"], "would both write runs/toy.zarr"),
        (["run", "toy.yaml", "bad.yaml"], "bad.yaml:2: unknown key 'siz'; did you mean 'size'?"),
        (["run", "toy.yaml", "--out", "toy.yaml"], "toy.yaml is a file"),
        (["run"], "Missing argument"),
        (["run", "toy.yaml", "--nosuch"], "No such option"),
        (["nosuch"], "No such command"),
        (["show"], "Missing argument"),
        (["show", "none.zarr"], "no such store: none.zarr"),
        (["show", "."], "is no store of results"),
        (["plot", "none.zarr"], "no such store: none.zarr"),
        (["plot", "x.zarr", "-o", "x.gif"], "a figure ends in .png"),
        (["plot", "x.zarr", "--pair", "one"], "Invalid value"),
        (["recipes", "iou"], "no shipped recipe 'iou'; did you mean 'ioi'?"),
        (["schema", "-o", "toy.yaml/x.json"], "cannot write toy.yaml/x.json"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_message_with_exit_code_2(
    fake: FakeExperiment, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("bad.yaml").write_text("kind: toy\nsiz: 3\nout: b.zarr\n")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert stores() == []
    assert not Path("runs").exists()


def test_all_wrong_recipes_are_told_before_any_runs(fake: FakeExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("kind: toy\nsiz: 3\n")
    Path("worse.yaml").write_text("kind: toi\n")
    assert main(["run", "toy.yaml", "bad.yaml", "worse.yaml"]) == 2
    err = capsys.readouterr().err
    assert "bad.yaml:2" in err
    assert "worse.yaml:1" in err
    assert fake.log.loaded == []


def test_a_wrong_run_of_the_same_model_stops_all_of_them_before_the_first(
    fake: FakeExperiment, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("m.yaml").write_text('kind: toy\nmatrix: {layers: [1, "99"]}\n')
    assert main(["run", "m.yaml"]) == 2
    assert "error: m (layers=99): layers: 99 is out of range" in capsys.readouterr().err
    assert stores() == []


# show and plot


def test_show_prints_the_summary_again(fake: FakeExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "toy.yaml"])
    first = capsys.readouterr().out
    assert main(["show", "runs/toy.zarr"]) == 0
    shown, (summary, result) = capsys.readouterr().out, first.rsplit("\n", 2)[:2]
    assert shown.startswith(summary)
    assert shown.endswith(f"\n{result}\n")
    heatmap = shown.removeprefix(summary).splitlines()
    assert heatmap[1] == "resid_post: normalised effect, mean of 2 pairs"
    assert heatmap[2].split()[0] == "2"  # the highest layer
    assert heatmap[-3].endswith("/ no value")
    assert main(["show", "runs/tox.zarr"]) == 2
    assert "there are runs/toy.zarr" in capsys.readouterr().err


def test_plot_writes_a_figure(fake: FakeExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "toy.yaml"])
    capsys.readouterr()
    assert main(["plot", "runs/toy.zarr"]) == 0
    assert capsys.readouterr().out == "wrote runs/toy-resid_post-effect.png\n"
    assert Path("runs/toy-resid_post-effect.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "runs/toy.zarr", "-o", "figures/x.svg", "--metric", "logit_diff", "--pair", "1"]) == 0
    assert "<svg" in Path("figures/x.svg").read_text()
    assert os.listdir("figures") == ["x.svg"]
    for option, message in (
        (["--metric", "logit_dif"], "did you mean 'logit_diff'?"),
        (["--component", "resid_pots"], "did you mean 'resid_post'?"),
        (["--pair", "2"], "there is no pair 2; the store has 0 to 1"),
        (["--head", "1"], "has no dim 'head'"),
    ):
        capsys.readouterr()
        assert main(["plot", "runs/toy.zarr", *option]) == 2
        assert message in capsys.readouterr().err


# What ships, and the program itself


def test_recipes_lists_and_prints_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "ioi-heads" in out
    assert "activation-patching" in out
    assert main(["recipes", "ioi"]) == 0
    assert capsys.readouterr().out.startswith("# yaml-language-server: $schema=")


def test_schema_goes_to_stdout_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema(recipe_kinds())
    assert main(["schema", "-o", "a/b.json"]) == 0
    assert json.loads(Path("a/b.json").read_text()) == recipe_schema(recipe_kinds())


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nsp 0.")
    for words in ([], ["run"], ["recipes"], ["schema"], ["show"], ["plot"], ["models"]):
        assert main([*words, "--help"]) == 0
        assert "Usage: nsp" in capsys.readouterr().out


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys, nsp.cli.app as a; a.main(['--help']); a.main(['run', '--help']); print('torch' in sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
    assert time.monotonic() - start < 10  # under a second on an idle machine; this one may be busy


def test_output_is_plain_in_a_pipe_and_the_exit_code_is_the_process_s(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "40"}
    command = [sys.executable, "-m", "nsp.cli.app"]
    done = subprocess.run(
        [*command, "recipes"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert any("ioi-heads" in line and "attention head" in line for line in done.stdout.splitlines())
    done = subprocess.run([*command, "show", "none.zarr"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such store: none.zarr\n"


@pytest.mark.parametrize(
    ("cell", "text"), [(0.12345, "0.123"), (None, "-"), (" a\n", " a\\n"), ("日本", "日本"), (3, "3"), (True, "True")]
)
def test_cells_stay_on_one_line(cell: object, text: str) -> None:
    assert cell_text(cell) == text
