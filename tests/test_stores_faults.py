"""What can go wrong with a disk, a process or a clock, and what is left afterwards."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from store_synthetic import PLAN, Case, assert_holds, capture, fill, header, sweep
from store_trials import Tally, longest, plan, trial

from nsp.errors import InputError, NspError
from nsp.stores import DamageWarning, create_run, list_runs, open_run, open_writer, validate

HAS_ICECHUNK = importlib.util.find_spec("icechunk") is not None


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Case]:
    case = sweep()
    path = tmp_path / "run.zarr"
    create_run(path, case.tree, case.units, header=header())
    fill(path, case)
    return path, case


def trials(directory: Path, count: int) -> Tally:
    total = Tally()
    for backend, phase, writers, location, seed in plan(count, directory, icechunk=HAS_ICECHUNK):
        total.add(trial(location, phase, writers, seed, longest(backend, phase)))
    return total


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    found = trials(tmp_path, 10)
    assert found.failures == 0, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_9_two_hundred_times(tmp_path: Path) -> None:
    found = trials(tmp_path, 200)
    assert found.failures == 0, found


def _resumes(path: Path, case: Case, units: list[int]) -> None:
    """Exactly `units` are computed again, and then nothing is wrong."""
    with open_writer(path, PLAN) as writer:
        assert writer.invalidate_damaged() == tuple(units)
        assert writer.pending() == units
    assert fill(path, case) == "complete"
    assert validate(path, deep=True).ok
    assert_holds(open_run(path), case)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_corrupt_chunk_is_named_and_recomputed(finished: tuple[Path, Case], damage: str) -> None:
    path, case = finished
    chunk = path / "effects/resid_post/logit_diff/c.1.2.0"
    data = bytearray(chunk.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
    chunk.write_bytes({"flip": data, "truncate": data[:-3], "empty": b""}[damage])
    run = open_run(path)
    with pytest.warns(DamageWarning, match=r"effects/resid_post/logit_diff at pair=1, layer=4 \(unit 8\)"):
        values = run.tree["effects/resid_post"]["logit_diff"].values
    assert np.isnan(values[1, 4]).all()
    assert np.isnan(values).sum() == values.shape[2]
    assert "1 shards cannot be read" in repr(run)
    assert validate(path, deep=True).damaged_units == (8,)
    _resumes(path, case, [8])


def test_a_corrupt_inner_chunk_of_a_shard_is_named(tmp_path: Path) -> None:
    case = capture(prompts=4, layers=8, positions=32, neurons=512, step=4)
    path = tmp_path / "run.zarr"
    create_run(path, case.tree, case.units, header=header())
    fill(path, case)
    (shard,) = (path / "activations/mlp_neurons/value").glob("c.*")
    data = bytearray(shard.read_bytes())
    data[100] ^= 0xFF
    shard.write_bytes(data)
    with pytest.warns(DamageWarning, match="prompt=|all coordinates"):
        assert np.isnan(open_run(path).tree["activations/mlp_neurons"]["value"].sel(layer=0).values).all()
    _resumes(path, case, [0])


def test_a_corrupt_marker_counts_as_missing(finished: tuple[Path, Case]) -> None:
    path, case = finished
    (path / "effects/resid_post/done/c.1.2").write_bytes(b"")
    assert open_run(path).pending == [8]
    assert "not committed" in str(validate(path))
    with open_writer(path, PLAN) as writer:
        assert writer.pending() == [8]
    fill(path, case)
    assert validate(path, deep=True).ok


def test_corrupt_inputs_are_reported(finished: tuple[Path, Case]) -> None:
    path, _ = finished
    chunk = path / "inputs/token_id/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[-6] ^= 0xFF
    chunk.write_bytes(data)
    assert [problem.where for problem in validate(path, deep=True).problems] == ["inputs/token_id"]
    assert np.isfinite(open_run(path).tree["effects/resid_post"]["effect"].values).all()


@pytest.mark.parametrize("content", [b"", b'{"zarr_format": 3, "node', None])
def test_truncated_metadata_hides_one_variable(finished: tuple[Path, Case], content: bytes | None) -> None:
    path, _ = finished
    metadata = path / "effects/resid_post/logit_diff/zarr.json"
    if content is None:
        metadata.unlink()
    else:
        metadata.write_bytes(content)
    with pytest.warns(DamageWarning, match=r"effects/resid_post/logit_diff.*metadata is damaged"):
        tree = open_run(path).tree
    assert list(tree["effects/resid_post"].data_vars) == ["effect"]
    assert np.isfinite(tree["effects/resid_post"]["effect"].values).all()
    report = validate(path)
    assert "effects/resid_post/logit_diff: metadata is damaged" in str(report)
    with pytest.raises(NspError, match=r"cannot be continued: the metadata of effects/resid_post/logit_diff"):
        open_writer(path, PLAN)


def test_a_truncated_header_says_what_to_do(finished: tuple[Path, Case]) -> None:
    path, case = finished
    root = path / "zarr.json"
    root.write_bytes(root.read_bytes()[:100])
    with pytest.raises(NspError, match=r"zarr.json is damaged .* --force"):
        open_run(path)
    assert not validate(path).ok
    assert [run.problem for run in list_runs(path.parent)] == ["damaged header"]
    create_run(path, case.tree, case.units, header=header(), force=True)
    assert open_run(path).pending


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_file_that_another_writer_is_about_to_rename_is_no_damage(tmp_path: Path) -> None:
    """Headers are replaced by rename, so a writer that opens the store may see the new one under its first name."""
    case = sweep()
    path = tmp_path / "run.zarr"
    create_run(path, case.tree, case.units, header=header())
    (path / ".zarr.json.0123.partial").write_bytes(b"{")
    (path / "effects" / ".zarr.json.4567.partial").write_bytes(b"{")
    assert open_run(path).state == "running"
    assert fill(path, case) == "complete"
    assert validate(path, deep=True).ok


def test_a_full_disk_stops_clearly_and_resumes_when_there_is_room(small_disk: Path) -> None:
    case = capture(prompts=32, layers=4, positions=16, neurons=256, step=4)
    path = small_disk / "run.zarr"
    create_run(path, case.tree, case.units, header=header())
    ballast = small_disk / "ballast"
    room = os.statvfs(small_disk)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - 700_000))
    with pytest.raises(NspError, match=r"no space left .* unit \d+.*intact.*resume"):
        fill(path, case)
    done = set(np.flatnonzero(open_run(path).done))
    assert 0 < len(done) < len(case.units)
    assert_holds(open_run(path), case, done)
    assert validate(path, deep=True).ok
    ballast.unlink()
    assert fill(path, case) == "complete"
    assert_holds(open_run(path), case)


def test_a_full_disk_at_creation_leaves_nothing(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(4_190_000))
    case = sweep()
    with pytest.raises(NspError, match="no space left"):
        create_run(small_disk / "run.zarr", case.tree, case.units, header=header())
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that nobody may write to, holding a run that is not finished."""
    place = tmp_path / "read-only"
    place.mkdir()
    case = sweep()
    create_run(place / "run.zarr", case.tree, case.units, header=header())
    fill(place / "run.zarr", case, 4)
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        for path in [place, *place.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield place
        for path in [place, *place.rglob("*")]:
            path.chmod(0o755)
        return
    mounts = [["mount", "--bind", str(place), str(place)], ["mount", "-o", "remount,ro,bind", str(place)]]
    if any(subprocess.run(command, capture_output=True, check=False).returncode for command in mounts):
        pytest.skip("cannot make a directory read-only here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_directory_reads_and_refuses_to_write(read_only: Path) -> None:
    case = sweep()
    run = open_run(read_only / "run.zarr")
    assert_holds(run, case, set(range(4)))
    assert validate(read_only / "run.zarr", deep=True).ok
    with pytest.raises(NspError, match="refused to write"):
        fill(read_only / "run.zarr", case)
    with pytest.raises(NspError, match=r"refused to write .*--out"):
        create_run(read_only / "new.zarr", case.tree, case.units, header=header())


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sweep()
    path = tmp_path / "run.zarr"
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    create_run(path, case.tree, case.units, header=header())
    os.utime(path / "zarr.json", (1, 1))
    fill(path, case, 5)
    for chunk in path.rglob("c*"):
        os.utime(chunk, (4_000_000_000, 4_000_000_000))
    assert fill(path, case) == "complete"
    assert_holds(open_run(path), case)
    assert validate(path, deep=True).ok


def test_paths_with_spaces_and_other_letters(tmp_path: Path) -> None:
    case = sweep()
    for name in ("a run.zarr", "прогон №1.zarr", "[brackets]*?.zarr", "100% über.zarr"):
        path = tmp_path / "my runs – été" / name
        create_run(path, case.tree, case.units, header=header())
        assert fill(path, case) == "complete"
        assert_holds(open_run(path), case)
        assert xr.open_datatree(path, engine="zarr", consolidated=False)["effects/resid_post/effect"].notnull().all()
    assert len(list_runs(tmp_path)) == 4


def test_a_file_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    case = sweep()
    (tmp_path / "run").write_text("a text")
    for force in (False, True):
        with pytest.raises(InputError):
            create_run(tmp_path / "run", case.tree, case.units, header=header(), force=force)
    assert (tmp_path / "run").read_text() == "a text"


def test_an_abandoned_creation_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".run.zarr.creating-0/store").mkdir(parents=True)
    case = sweep()
    create_run(tmp_path / "run.zarr", case.tree, case.units, header=header())
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]


def test_a_failed_write_leaves_the_unit_pending(finished: tuple[Path, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    path, case = finished
    with open_writer(path, PLAN) as writer:
        writer.invalidate([5])

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("nsp.stores.disk.sync_file", fail)
        with writer.claim(5), pytest.raises(NspError, match="no space left"):
            writer.write(5, case.values(5))
        monkeypatch.undo()
        assert writer.pending() == [5]
    assert fill(path, case) == "complete"
    assert_holds(open_run(path), case)
