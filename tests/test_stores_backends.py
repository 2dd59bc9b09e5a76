"""The same promises, held by every backend: directory, fsspec URL, S3, icechunk on disk and on S3, zip."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr
from store_synthetic import PLAN, Case, assert_holds, fill, header, sweep

from nsp.errors import InputError, NspError
from nsp.stores import DamageWarning, create_run, export, list_runs, open_run, open_writer, validate
from nsp.stores.backend import locate


def small() -> Case:
    """Eight units: two of the baseline, six of the effects."""
    return sweep(pairs=2, layers=5, components=("resid_post",))


BACKENDS = ["local", "memory", "s3", "icechunk", "icechunk-s3"]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A moto server with one bucket, `runs`."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    boto3 = pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        server = server_module.ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="runs")
        yield endpoint
        server.stop()


@pytest.fixture(params=BACKENDS)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new run can be created, by backend."""
    name = f"run-{uuid.uuid4().hex[:8]}"
    if "s3" in request.param:
        pytest.importorskip("s3fs", reason="needs nsp[s3]")
        request.getfixturevalue("s3_endpoint")
    if "icechunk" in request.param:
        pytest.importorskip("icechunk", reason="needs nsp[icechunk]")
    places = {
        "local": str(tmp_path / f"{name}.zarr"),
        "memory": f"memory://{name}",
        "s3": f"s3://runs/some prefix/{name}",
        "icechunk": f"icechunk://{tmp_path / name}",
        "icechunk-s3": f"icechunk+s3://runs/{name}",
    }
    return places[request.param]


def test_create_resume_complete(location: str) -> None:
    case = small()
    with pytest.raises(NspError, match="nothing is there"):
        open_run(location)
    create_run(location, case.tree, case.units, header=header())
    assert_holds(open_run(location), case, done=set())
    assert fill(location, case, 5) == "running"
    run = open_run(location)
    assert run.pending == [unit.index for unit in case.units[5:]]
    assert_holds(run, case, done=set(range(5)))
    assert fill(location, case) == "complete"
    run = open_run(location)
    assert (run.state, run.pending) == ("complete", [])
    assert_holds(run, case)
    report = validate(location, deep=True)
    assert report.ok, report
    assert f"{len(case.units)} of {len(case.units)} units" in repr(run)


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_runs_under_a_url_are_listed(scheme: str, request: pytest.FixtureRequest) -> None:
    """From their headers, at any depth; what is no run is passed over, as in a directory."""
    if scheme == "s3":
        pytest.importorskip("s3fs", reason="needs nsp[s3]")
        request.getfixturevalue("s3_endpoint")
    top = f"{scheme}://runs/listed {uuid.uuid4().hex[:8]}"
    with pytest.raises(InputError, match="nothing under"):
        list_runs(top)
    case = small()
    for name in ("b[2].zarr", "a/deeper/one.zarr"):
        create_run(f"{top}/{name}", case.tree, case.units, header=header())
    fsspec.open(f"{top}/notes/read.txt", "wb").open().close()
    found = list_runs(top)
    assert [str(run.path) for run in found] == [f"{top}/a/deeper/one.zarr", f"{top}/b[2].zarr"]
    assert {run.summary()["state"] for run in found} == {"running"}
    assert [str(run.path) for run in list_runs(f"{top}/a/deeper/one.zarr")] == [f"{top}/a/deeper/one.zarr"]
    with pytest.raises(InputError, match="is one run"):
        list_runs("icechunk://somewhere")


def test_another_plan_is_refused_or_replaces(location: str) -> None:
    case = small()
    create_run(location, case.tree, case.units, header=header())
    fill(location, case)
    with pytest.raises(InputError, match="--force replaces"):
        open_writer(location, "ff" * 32)
    with pytest.raises(InputError, match="exists already"):
        create_run(location, case.tree, case.units, header=header())
    create_run(location, case.tree, case.units, header=header(plan_hash="ff" * 32), force=True)
    run = open_run(location)
    assert run.plan_hash == "ff" * 32
    assert_holds(run, case, done=set())


def test_claims_exclude_and_data_without_marker_is_hidden(location: str) -> None:
    case = small()
    create_run(location, case.tree, case.units, header=header())
    with open_writer(location, PLAN) as one, open_writer(location, PLAN) as two, one.claim(3) as mine:
        assert mine
        with two.claim(3) as theirs:
            assert not theirs
        with two.claim(4) as other:
            assert other
            two.write(4, case.values(4))
        one.write(3, case.values(3))
        one.invalidate([4])
    assert_holds(open_run(location), case, done={3})
    assert fill(location, case) == "complete"
    assert_holds(open_run(location), case)


def test_a_changed_shard_is_found_and_recomputed(location: str) -> None:
    case = small()
    create_run(location, case.tree, case.units, header=header())
    fill(location, case)
    unit = case.units[4]
    with locate(location).transaction("damage") as transaction:
        array = zarr.open_group(transaction.store, mode="r+")["effects/resid_post/logit_diff"]
        layer = unit.regions["effects/resid_post"]["layer"].start
        array[0, layer, 0] = 12345.0
    report = validate(location, deep=True)
    assert report.damaged_units == (4,)
    assert "effects/resid_post/logit_diff at pair=0, layer=4 (unit 4)" in str(report)
    assert validate(location).ok  # a quick look does not read values
    with open_writer(location, PLAN) as writer:
        writer.invalidate(report.damaged_units)
        assert writer.pending() == [4]
    fill(location, case)
    assert validate(location, deep=True).ok
    assert_holds(open_run(location), case)


def test_a_missing_shard_is_reported_and_the_rest_reads(location: str) -> None:
    case = small()
    create_run(location, case.tree, case.units, header=header())
    fill(location, case)
    run = open_run(location)
    part = next(part for part in run.groups if part.path == "effects/resid_post")
    with locate(location).transaction("damage") as transaction:
        transaction.delete([f"{part.stored}/effect/{part.shard_key('effect', part.grid.cells[5])}"])
    report = validate(location)
    assert [(problem.where, problem.unit) for problem in report.problems] == [("effects/resid_post/effect", 5)]
    run = open_run(location)
    with pytest.warns(DamageWarning, match=r"effects/resid_post/effect at pair=1, layer=0..1 \(unit 5\)"):
        values = run.tree["effects/resid_post"]["effect"].values
    assert np.isnan(values[1, :2]).all()
    assert np.isfinite(values[0]).all()
    assert np.isfinite(values[1, 2:]).all()
    assert len(run.damage) == 1


def test_plain_xarray_reads_it(location: str) -> None:
    case = small()
    create_run(location, case.tree, case.units, header=header())
    fill(location, case)
    tree = xr.open_datatree(locate(location).open_store(), engine="zarr", consolidated=False)
    np.testing.assert_array_equal(
        tree["effects/resid_post"]["effect"].values, open_run(location).tree["effects/resid_post"]["effect"].values
    )


def test_icechunk_tags_finished_runs(tmp_path: Path) -> None:
    icechunk = pytest.importorskip("icechunk")
    case = small()
    location = f"icechunk://{tmp_path / 'run'}"
    create_run(location, case.tree, case.units, header=header())
    fill(location, case)
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path / "run")))
    assert repository.list_tags() == {"complete-1-" + PLAN[:16]}
    with open_writer(location, PLAN) as writer:
        writer.invalidate([0])
    fill(location, case)
    assert len(repository.list_tags()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_a_killed_upload_left_is_replaced(tmp_path: Path) -> None:
    backend: Any = locate("memory://half")
    backend.fs.pipe_file("/half/nsp-creating", b"")
    backend.fs.pipe_file("/half/effects/zarr.json", b"{}")
    case = small()
    create_run("memory://half", case.tree, case.units, header=header())
    assert open_run("memory://half").state == "running"
    backend.fs.pipe_file("/other/thesis.txt", b"years of work")
    with pytest.raises(InputError):
        create_run("memory://other", case.tree, case.units, header=header(), force=True)


def test_unknown_places_say_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no access to nowhere://"):
        open_run("nowhere://bucket/run")
    with pytest.raises(InputError, match="icechunk://path or icechunk"):
        open_run("icechunk+ftp://host/run")


def test_a_zip_of_a_finished_run_opens_in_place(tmp_path: Path) -> None:
    case = small()
    path = tmp_path / "run.zarr"
    create_run(path, case.tree, case.units, header=header())
    with pytest.raises(InputError, match="units missing"):
        export(path, tmp_path / "run.zip")
    fill(path, case)
    assert export(path, tmp_path / "run.zip") == [tmp_path / "run.zip"]
    run = open_run(tmp_path / "run.zip")
    assert_holds(run, case)
    assert validate(tmp_path / "run.zip", deep=True).ok
    tree = xr.open_datatree(zarr.storage.ZipStore(tmp_path / "run.zip", mode="r"), engine="zarr", consolidated=False)
    assert tree["effects/resid_post"]["effect"].notnull().all()
    with pytest.raises(InputError, match="can be read but not written"):
        create_run(tmp_path / "new.zip", case.tree, case.units, header=header())
    with (
        pytest.raises(InputError, match="can be read but not written"),
        open_writer(tmp_path / "run.zip", PLAN) as writer,
    ):
        writer.mark("complete")
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(NspError, match="cannot be opened as a zip"):
        open_run(tmp_path / "bad.zip")
