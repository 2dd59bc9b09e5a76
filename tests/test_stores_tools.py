"""Listing, comparing, exporting, and the commands for them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
import xarray as xr
from store_synthetic import PLAN, Case, expected, fill, header, sweep
from typer.testing import CliRunner

from nsp.cli.stores import register
from nsp.errors import InputError
from nsp.stores import create_run, diff, export, list_runs, open_run, open_writer, write_tables


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Case]:
    case = sweep()
    path = tmp_path / "runs" / "one.zarr"
    create_run(path, case.tree, case.units, header=header())
    fill(path, case)
    return path, case


def test_a_thousand_runs_are_listed_in_three_seconds(finished: tuple[Path, Case]) -> None:
    path, _ = finished
    root = (path / "zarr.json").read_bytes()
    for number in range(1000):
        run = path.parent / f"group {number % 10}" / f"{number}.zarr"
        run.mkdir(parents=True)
        (run / "zarr.json").write_bytes(root)
    started = time.perf_counter()
    found = list_runs(path.parent)
    assert time.perf_counter() - started < 3
    assert len(found) == 1001
    assert found[0].summary()["kind"] == "activation-patching"
    with pytest.raises(InputError, match="no directory"):
        list_runs(path.parent / "none")


def test_diff_of_equal_runs(finished: tuple[Path, Case], tmp_path: Path) -> None:
    path, case = finished
    other = tmp_path / "two.zarr"
    create_run(other, case.tree, case.units, header=header())
    fill(other, case)
    found = diff(path, other)
    assert found.same_numbers
    assert found.header == ()
    assert found.largest == 0


def test_diff_aligns_by_coordinates_and_names_the_largest(finished: tuple[Path, Case], tmp_path: Path) -> None:
    path, _ = finished
    case = sweep(pairs=4)  # one pair more
    changed = header(recipe_resolved=header()["recipe_resolved"] | {"layers": "0:5"}, versions={"nsp": "0.2.0"})
    other = tmp_path / "two.zarr"
    create_run(other, case.tree, case.units, header=changed)
    with open_writer(other, PLAN) as writer:
        for index in writer.work():
            values = case.values(index)
            for path_ in values:
                if path_ == "effects/resid_post" and case.units[index].regions[path_]["pair"].start == 1:
                    values[path_]["effect"][0, 0, 2] += 10
            writer.write(index, values)
    found = diff(path, open_run(other))
    assert not found.same_numbers
    first = found.variables[0]
    assert (first.where, first.at["pair"], first.at["position"]) == ("effects/resid_post/effect", 1, 2)
    assert first.largest == pytest.approx(10, abs=1e-4)
    assert first.only_b == 30
    assert ("recipe.layers", "all", "0:5") in found.header
    assert ("versions.nsp", "0.1.0", "0.2.0") in found.header
    assert "largest difference 10 at pair=1" in str(found)


def test_csv_and_parquet_are_long_tables(finished: tuple[Path, Case], tmp_path: Path) -> None:
    path, case = finished
    wanted = expected(case)["effects/resid_post"]["effect"]
    for suffix in ("csv", "parquet"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        (file,) = export(path, tmp_path / f"effects.{suffix}", group="effects/resid_post")
        frame = pd.read_csv(file) if suffix == "csv" else pd.read_parquet(file)
        assert len(frame) == wanted.size
        row = frame[(frame.pair == 2) & (frame.layer == 3) & (frame.position == 4)].iloc[0]
        assert row.effect == pytest.approx(float(wanted[2, 3, 4]), rel=1e-6)
        assert row.token_text == " tök"
        assert not {"done", "unit", "sha256"} & set(frame.columns)
        written = export(path, tmp_path / f"all-{suffix}", file_format=suffix)
        assert f"baseline.{suffix}" in [file.name for file in written]
    texts = pd.read_csv(tmp_path / "all-csv" / "inputs.pair.csv")
    assert texts.clean[0] == 'When Mary, "John"\nand'


def test_tables_leave_out_what_is_not_committed(tmp_path: Path) -> None:
    case = sweep()
    path = tmp_path / "run.zarr"
    create_run(path, case.tree, case.units, header=header())
    fill(path, case, 4)
    (file,) = export(path, tmp_path / "effects.csv", group="effects/resid_post")
    assert len(pd.read_csv(file)) == 2 * 6  # unit 3: pair 0, layers 0 and 1


def test_netcdf_holds_every_group(finished: tuple[Path, Case], tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf")
    path, case = finished
    (file,) = export(path, tmp_path / "run.nc")
    tree = xr.open_datatree(file, engine="h5netcdf")
    np.testing.assert_array_equal(
        tree["effects/resid_post"]["effect"].values, expected(case)["effects/resid_post"]["effect"].values
    )
    assert tree.attrs["plan_hash"] == PLAN
    assert json.loads(tree.attrs["recipe_resolved"])["layers"] == "all"
    (file,) = export(path, tmp_path / "effects.nc", group="effects/resid_post")
    assert xr.open_dataset(file)["effect"].dims == ("pair", "layer", "position")


def test_export_says_what_it_can_do(finished: tuple[Path, Case], tmp_path: Path) -> None:
    path, _ = finished
    with pytest.raises(InputError, match="zip, csv, parquet, netcdf"):
        export(path, tmp_path / "x.xlsx")
    with pytest.raises(InputError, match=r"no group 'effects/q'.*effects/resid_post"):
        export(path, tmp_path / "x.csv", group="effects/q")


def test_tables_of_an_experiment(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Table:
        title: str
        columns: tuple[str, ...]
        rows: tuple[tuple[object, ...], ...]

    (file,) = write_tables([Table("Top sites: denoising", ("site", "effect"), (("a,b", 1.5),))], tmp_path)
    assert file.name == "top-sites-denoising.csv"
    assert pd.read_csv(file).site[0] == "a,b"


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    register(made)
    return made


def test_commands(app: typer.Typer, finished: tuple[Path, Case], tmp_path: Path) -> None:
    path, case = finished
    runner = CliRunner(env={"COLUMNS": "200"})

    def run(*arguments: object, code: int = 0) -> str:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.stdout if "--json" in arguments else result.output

    listed = run("ls", path.parent)
    assert "one.zarr" in listed
    assert "complete" in listed
    assert json.loads(run("ls", path.parent, "--json"))[0]["kind"] == "activation-patching"
    assert "no runs" in run("ls", tmp_path / "runs" / "one.zarr" / "inputs")
    assert "nothing wrong" in run("validate", path, "--deep")
    assert "equal value for value" in run("diff", path, path)
    assert "one.zip" in run("export", path, "--zip")
    assert (tmp_path / "runs" / "one.zip").exists()
    run("export", path, "--out", tmp_path / "t", "--format", "csv")
    assert (tmp_path / "t" / "baseline.csv").exists()
    next((path / "effects/resid_post/effect").glob("c.*")).unlink()
    assert "the shard is missing" in run("validate", path, code=1)
    assert json.loads(run("validate", path, "--json", code=1))["ok"] is False
    run("validate", path, "--repair", code=1)
    assert len(open_run(path).pending) == 1
    fill(path, case)
    run("validate", path, "--deep")
    other = tmp_path / "other.zarr"
    create_run(other, case.tree, case.units, header=header())
    run("diff", path, other, code=1)
