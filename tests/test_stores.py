"""Run stores: schema, units and layout, writing, reading."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_synthetic import ATTRS, MODULE, PLAN, Unit, assert_holds, capture, empty, expected, fill, header, sweep

from nsp.errors import InputError, NspError
from nsp.stores import clean_text, create_run, open_run, open_writer, planned_bytes, schema
from nsp.stores.encode import round_to_bfloat16
from nsp.stores.layout import chunk_shape, grid_of, shard_shape
from nsp.stores.names import stored_path, true_path

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Any]:
    case = sweep()
    path = tmp_path / "a run – déjà vu.zarr"
    create_run(path, case.tree, case.units, header=header())
    return path, case


def test_a_template_is_complete_in_labels_and_empty_in_results(made: tuple[Path, Any]) -> None:
    path, case = made
    run = open_run(path)
    assert run.state == "running"
    assert run.pending == [unit.index for unit in case.units]
    assert run.recipe["layers"] == "all"
    assert_holds(run, case, done=set())
    assert list(run.tree["inputs"]["clean"].values) == ['When Mary, "John"\nand'] * 3
    assert "running, 0 of" in repr(run)
    assert "<table>" in run._repr_html_()
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]


def test_plain_xarray_reads_a_finished_run(made: tuple[Path, Any]) -> None:
    path, case = made
    assert fill(path, case) == "complete"
    tree = xr.open_datatree(path, engine="zarr", consolidated=False)
    assert tree.attrs["plan_hash"] == PLAN
    value = tree["effects/resid_post"]["logit_diff"].sel(pair=1, layer=3, position=2)
    assert value.dims == ()
    wanted = expected(case)["effects/resid_post"]["logit_diff"]
    assert float(value) == float(wanted[1, 3, 2])
    assert tree["effects/resid_post"]["token_text"].values[0, 0] == " tök"
    assert (tree["effects/resid_post"]["done"] == 1).all()
    assert tree["effects/resid_post"]["logit_diff"].attrs["units"] == "1"


def test_only_committed_units_are_returned(made: tuple[Path, Any]) -> None:
    path, case = made
    fill(path, case, 7)
    run = open_run(path)
    assert run.pending == [unit.index for unit in case.units[7:]]
    assert_holds(run, case, done=set(range(7)))
    # Data without its marker, as a killed writer leaves it, is not returned.
    group = zarr.open_group(path, mode="r+")
    group["effects/resid_post/logit_diff"][...] = 5.0
    values = open_run(path).tree["effects/resid_post"]["logit_diff"]
    done = open_run(path).tree["effects/resid_post"]["done"]
    assert np.isnan(values.where(done == 0, drop=True)).any()
    assert int((values == 5.0).sum()) == int((done == 1).sum()) * values.sizes["position"]


def test_selection_is_lazy_and_equals_numpy(made: tuple[Path, Any]) -> None:
    path, case = made
    fill(path, case)
    lazy = open_run(path).tree["effects/resid_post"]["effect"]
    whole = expected(case)["effects/resid_post"]["effect"].values
    assert not lazy.variable._in_memory
    for key in (
        (slice(None), slice(None, None, -1), 0),
        ([2, 0], slice(1, 4, 2), slice(None)),
        (-1, -1, -1),
        (slice(0, 0), slice(None), [5]),
    ):
        np.testing.assert_array_equal(lazy[key].values, xr.Variable(lazy.dims, whole)[key].values)


def test_component_names_come_back(made: tuple[Path, Any]) -> None:
    path, case = made
    fill(path, case)
    assert f"effects/{MODULE}" in [node.path.strip("/") for node in open_run(path).tree.subtree]
    assert all(":" not in found.name for found in path.rglob("*"))
    assert true_path(stored_path("effects/" + MODULE)) == "effects/" + MODULE


@given(st.text(min_size=1).filter(lambda text: "/" not in text and clean_text(text) == text))
def test_any_component_name_can_be_stored(name: str) -> None:
    assert true_path(stored_path(f"effects/{name}")) == f"effects/{name}"
    assert stored_path(f"effects/{name}").isascii()


def test_a_store_of_another_plan_is_refused(made: tuple[Path, Any]) -> None:
    path, case = made
    with pytest.raises(InputError, match=r"(?s)5e5e.*ffff.*--force.*--out"):
        open_writer(path, "ff" * 32)
    with pytest.raises(InputError, match="exists already"):
        create_run(path, case.tree, case.units, header=header())
    create_run(path, case.tree, case.units, header=header(plan_hash="ff" * 32), force=True)
    assert open_run(path).plan_hash == "ff" * 32


def test_force_spares_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    case = sweep()
    with pytest.raises(InputError, match="not a run of nsp"):
        create_run(tmp_path / "thesis", case.tree, case.units, header=header(), force=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_claims_keep_writers_apart(made: tuple[Path, Any]) -> None:
    path, case = made
    with open_writer(path, PLAN) as one, open_writer(path, PLAN) as two:
        with one.claim(0) as mine:
            assert mine
            with two.claim(0) as theirs:
                assert not theirs
            with pytest.raises(NspError, match="not claimed"):
                two.write(0, case.values(0))
            one.write(0, case.values(0))
        with two.claim(0) as again:
            assert not again  # committed since


def test_a_unit_is_written_behind_the_next_and_keeps_its_claim(made: tuple[Path, Any]) -> None:
    path, case = made
    with open_writer(path, PLAN) as writer, open_writer(path, PLAN) as other:
        slow, order = writer.write, []

        def write(index: int, values: Any) -> None:
            with other.claim(index) as taken:
                order.append((index, taken))
            slow(index, values)

        writer.write = write  # type: ignore[method-assign]
        for index in writer.work():
            writer.write_behind(index, case.values(index))
        assert order == [(unit.index, False) for unit in case.units]
        assert writer.mark("complete") == "complete"
    assert_holds(open_run(path), case)


def test_leaving_the_loop_finishes_the_unit_under_way(made: tuple[Path, Any]) -> None:
    path, case = made
    with open_writer(path, PLAN) as writer:
        work = writer.work()
        index = next(work)
        writer.write_behind(index, case.values(index))
        work.close()
        assert index not in writer.pending()
        with writer.claim(1) as free:
            assert free


def test_an_error_behind_is_raised_by_the_loop(made: tuple[Path, Any]) -> None:
    path, case = made
    with open_writer(path, PLAN) as writer:

        def all_of_it() -> None:
            for index in writer.work():
                values = case.values(index)
                writer.write_behind(index, values if index != 1 else {})

        with pytest.raises(NspError, match="unit 1 must fill"):
            all_of_it()
        assert 0 not in writer.pending()
        assert 1 in writer.pending()


def test_complete_only_when_nothing_is_missing(made: tuple[Path, Any]) -> None:
    path, case = made
    assert fill(path, case, 3) == "running"
    with open_writer(path, PLAN) as writer:
        for index in writer.work():
            writer.write(index, case.values(index))
        assert writer.mark("complete") == "complete"
        writer.invalidate([4])
        assert writer.pending() == [4]
    assert open_run(path).state == "running"
    assert fill(path, case) == "complete"
    assert_holds(open_run(path), case)


def _worker(path: str, written: Any) -> None:
    case = sweep(pairs=6)
    with open_writer(path, PLAN) as writer:
        for index in writer.work(poll=0.01):
            writer.write(index, case.values(index))
            written.put(index)
        writer.mark("complete")


def test_four_writers_share_the_work(tmp_path: Path) -> None:
    case = sweep(pairs=6)
    path = tmp_path / "run.zarr"
    create_run(path, case.tree, case.units, header=header())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nsp.stores.writer"])
    written = context.Queue()
    workers = [context.Process(target=_worker, args=(str(path), written)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(written.get(timeout=5) for _ in case.units) == [unit.index for unit in case.units]
    assert open_run(path).state == "complete"
    assert_holds(open_run(path), case)


def test_wrong_values_are_refused_by_name(made: tuple[Path, Any]) -> None:
    path, case = made
    index = len(case.units) - 1
    good = case.values(index)
    effects = f"effects/{MODULE}"
    with open_writer(path, PLAN) as writer, writer.claim(index):
        with pytest.raises(NspError, match=r"expected \(pair 1, layer 1, position 6\)"):
            writer.write(index, good | {effects: {name: value[0] for name, value in good[effects].items()}})
        with pytest.raises(NspError, match="must fill effect, logit_diff"):
            writer.write(index, good | {effects: {"effect": good[effects]["effect"]}})
        with pytest.raises(NspError, match="does not fill group 'baseline'"):
            writer.write(index, good | {"baseline": {}})
        assert index in writer.pending()


def test_template_must_follow_the_schema(tmp_path: Path) -> None:
    case = sweep()

    def refused(groups: dict[str, xr.Dataset], match: str, **options: Any) -> None:
        with pytest.raises(NspError, match=match):
            create_run(tmp_path / "x.zarr", xr.DataTree.from_dict(groups), (), header=header(**options))
        assert not (tmp_path / "x.zarr").exists()

    coords = {"pair": [0]}
    refused({"results": xr.Dataset()}, "'results' is not a group")
    refused({"baseline/resid_post": xr.Dataset()}, "has no subgroups")
    refused({"baseline": xr.Dataset({"a": ("pair", [1.0])}, coords=coords)}, "long_name, units, method is missing")
    refused({"baseline": xr.Dataset({"a": ("row", [1.0], ATTRS)})}, "dim 'row' is not one of")
    refused({"baseline": xr.Dataset({"a": ("pair", [1.0], ATTRS)})}, "dim pair has no coordinate")
    nan = ATTRS | {"limit": float("nan")}
    refused({"baseline": xr.Dataset({"a": ("pair", [1.0], nan)}, coords=coords)}, "not strict JSON")
    refused({"baseline": xr.Dataset()}, "unknown key 'colour'", colour="red")
    refused({"baseline": xr.Dataset()}, "model.revision is missing", model={"name": "x"})
    kept = {"baseline": xr.Dataset({"done": ("pair", [1], ATTRS)}, coords=coords)}
    refused(kept, "names that the store keeps")
    with pytest.raises(NspError, match="fills group 'nowhere'"):
        create_run(tmp_path / "x.zarr", case.tree, (Unit(0, {"nowhere": {}}),), header=header())


def test_units_must_tile_on_a_regular_grid() -> None:
    def units(*spans: tuple[int, int]) -> list[Unit]:
        return [Unit(index, {"effects/q": {"layer": slice(*span)}}) for index, span in enumerate(spans)]

    sizes = {"pair": 2, "layer": 5}
    grid = grid_of("effects/q", sizes, units((0, 2), (4, 5), (2, 4)))
    assert grid is not None
    assert (grid.dims, grid.extents, dict(grid.units)) == (("layer",), (2,), {(0,): 0, (2,): 1, (1,): 2})
    assert grid_of("baseline", sizes, units((0, 5))) is None
    whole = grid_of("effects/q", sizes, units((0, 5)))
    assert whole is not None
    assert whole.dims == ()
    with pytest.raises(NspError, match="do not tile 'layer'"):
        grid_of("effects/q", sizes, units((0, 3), (3, 4), (4, 5)))
    with pytest.raises(NspError, match="both fill the whole group"):
        grid_of("effects/q", sizes, units((0, 5), (0, 5)))
    corners = [(0, 0), (0, 1), (1, 0)]
    some = [
        Unit(at, {"effects/q": {"pair": slice(p, p + 1), "layer": slice(4 * n, 4 * n + 4)}})
        for at, (p, n) in enumerate(corners)
    ]
    with pytest.raises(NspError, match="no unit fills"):
        grid_of("effects/q", sizes, some)


def test_a_variable_must_have_the_dims_that_units_split(tmp_path: Path) -> None:
    sizes = {"pair": 2, "layer": 4}
    dataset = xr.Dataset(
        {"effect": empty(("pair", "layer"), sizes), "base": empty(("pair",), sizes)},
        coords={"pair": np.arange(2), "layer": np.arange(4)},
    )
    units = [Unit(at, {"effects/q": {"layer": slice(at, at + 1)}}) for at in range(4)]
    with pytest.raises(NspError, match=r"base: units split layer"):
        create_run(tmp_path / "x.zarr", xr.DataTree.from_dict({"effects/q": dataset}), units, header=header())


def test_chunks_follow_the_rules() -> None:
    dims, shape = ("prompt", "layer", "position", "neuron"), (64, 30, 64, 1536)
    units = [Unit(at, {"activations/q": {"prompt": slice(8 * at, 8 * at + 8)}}) for at in range(8)]
    grid = grid_of("activations/q", dict(zip(dims, shape, strict=True)), units)
    assert grid is not None
    inner = chunk_shape(grid, dims, shape, 4)
    assert inner == (8, 1, 64, 512)
    assert shard_shape(grid, dims, shape, inner) == (8, 30, 64, 1536)
    assert chunk_shape(grid, dims, (64, 3, 4, 100), 4) == (8, 3, 4, 100)  # small: one chunk
    assert shard_shape(grid, dims, (64, 30, 64, 1000), (8, 1, 64, 256)) == (8, 30, 64, 1024)  # whole inner chunks


def test_one_unit_is_one_file_a_variable(tmp_path: Path) -> None:
    case = capture()
    create_run(tmp_path / "c.zarr", case.tree, case.units, header=header())
    fill(tmp_path / "c.zarr", case)
    files = sorted(path.name for path in (tmp_path / "c.zarr/activations/mlp_neurons/value").iterdir())
    assert files == ["c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0", "c.3.0.0.0", "zarr.json"]
    assert_holds(open_run(tmp_path / "c.zarr"), case)
    assert planned_bytes(case.tree, case.units) == {"activations/mlp_neurons": 16 * 4 * 16 * 512 * 4}
    assert planned_bytes(case.tree, case.units, "float16") == {"activations/mlp_neurons": 16 * 4 * 16 * 512 * 2}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_store_dtype(tmp_path: Path, dtype: str) -> None:
    case = capture(prompts=4)
    create_run(tmp_path / "c.zarr", case.tree, case.units, header=header(), store_dtype=dtype)
    fill(tmp_path / "c.zarr", case)
    stored = open_run(tmp_path / "c.zarr").tree["activations/mlp_neurons"]["value"]
    whole = expected(case)["activations/mlp_neurons"]["value"].values
    if dtype == "float16":
        assert stored.dtype == np.float16
        np.testing.assert_array_equal(stored.values, whole.astype(np.float16))
    else:
        assert stored.attrs["source_dtype"] == "bfloat16"
        assert (stored.values.view(np.uint32) & 0xFFFF == 0).all()
        np.testing.assert_allclose(stored.values, whole, rtol=2**-8)
    with open_writer(tmp_path / "c.zarr", PLAN) as writer:
        writer.invalidate([0])
        with writer.claim(0):
            values = case.values(0)
            values["activations/mlp_neurons"]["value"][0, 0, 0, :2] = [70000.0, np.inf]
            if dtype == "float16":
                with pytest.raises(NspError, match=r"1 values do not fit float16 \(largest 70000"):
                    writer.write(0, values)
            else:
                writer.write(0, values)
    with pytest.raises(InputError, match="float8"):
        create_run(tmp_path / "d.zarr", case.tree, case.units, header=header(), store_dtype="float8")


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1))
def test_bfloat16_rounding_is_torchs(values: list[float]) -> None:
    torch = pytest.importorskip("torch")
    array = np.array(values, np.float32)
    wanted = torch.from_numpy(array).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(round_to_bfloat16(array), wanted)


def test_hard_texts_round_trip(tmp_path: Path) -> None:
    texts = ["a\0b", "😀 é ß", clean_text("lone \ud800 surrogate"), "", "word " * 5000]
    case = sweep(pairs=5, texts=texts)
    create_run(tmp_path / "t.zarr", case.tree, case.units, header=header(recipe_given={"text": "\ud800 \0 😀"}))
    assert list(open_run(tmp_path / "t.zarr").tree["inputs"]["clean"].values) == texts
    assert (
        list(xr.open_datatree(tmp_path / "t.zarr", engine="zarr", consolidated=False)["inputs/clean"].values) == texts
    )
    assert clean_text("\ud800") == "\\ud800"
    json.loads((tmp_path / "t.zarr" / "zarr.json").read_bytes())


def test_what_is_not_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(NspError, match="nothing is there"):
        open_run(tmp_path / "none.zarr")
    zarr.open_group(tmp_path / "plain.zarr", mode="w")
    with pytest.raises(NspError, match="not a run of nsp"):
        open_run(tmp_path / "plain.zarr")
    with pytest.raises(InputError, match="location is empty"):
        open_run("")


def test_listing_imports_neither_xarray_nor_zarr() -> None:
    code = (
        "import sys, nsp.stores.listing; print([m for m in ('xarray', 'zarr', 'torch', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_schema_states_what_it_checks() -> None:
    assert set(schema.GROUPS) >= {"inputs", "baseline", "effects", "activations", "receipts"}
    full = header() | {"nsp_schema": 1, "created_at": "", "state": "running", "units": 0, "extra": {}}
    assert schema.check_header(full) == []
    assert schema.check_header(full | {"nsp_schema": 99})[0].endswith("update nsp")
    assert "state 'done' is not one of" in schema.check_header(full | {"state": "done"})[0]
