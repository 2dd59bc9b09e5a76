"""The hub. It is never asked: its answers are played by monkeypatches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, errors
from tiny_models import tiny_llama, tiny_tokenizer

from nsp.errors import InputError, NspError
from nsp.models import (
    CATALOGUE,
    hub,
    load_weights,
    locate,
    on_disk,
    pull,
)

try:  # whichever of the two this huggingface_hub is built on
    import httpx2 as httpx
except ImportError:
    import httpx


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty nsp cache and an empty hub cache."""
    monkeypatch.setenv("NSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NSP_SMOLLM2_GGUF", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A whole Hugging Face directory of a tiny random Llama, in bfloat16."""
    path = tmp_path / "tiny"
    tiny_llama().to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


# --- the hub ---------------------------------------------------------------------------------------------------------


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = httpx.Request("GET", "https://huggingface.co/api/models/x/y")
    return kind("the hub said no", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "kind", "match"),
    [
        (http_error(errors.GatedRepoError, 403), NspError, r"is gated.*huggingface\.co/o/gpt2-x.*export HF_TOKEN"),
        (http_error(errors.RepositoryNotFoundError, 404), InputError, r"no model o/gpt2-x on the hub.*gpt2"),
        (http_error(errors.RevisionNotFoundError, 404), InputError, "o/gpt2-x has no revision 'v9'"),
        (http_error(errors.HfHubHTTPError, 401), NspError, r"HTTP 401.*HF_TOKEN"),
        (http_error(errors.HfHubHTTPError, 503), NspError, "cannot be reached"),
        (httpx.ConnectError("Name or service not known"), NspError, r"cannot be reached \(Name or service.*smollm2"),
        (OSError(28, "No space left on device"), NspError, "the disk is full"),
    ],
)
def test_what_the_hub_may_answer(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[NspError], match: str
) -> None:
    def answer(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    with pytest.raises(kind, match=match) as caught:
        load_weights("o/gpt2-x", revision="v9")
    assert type(caught.value) is kind


def test_offline_says_so_and_gated_models_say_how_to_get_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NspError, match=r"HF_HUB_OFFLINE is set, and no complete copy of openai-community/gpt2"):
        load_weights("gpt2")
    with pytest.raises(NspError, match=r"also gated.*google/gemma-2-2b.*HF_TOKEN"):
        pull("gemma-2-2b")


class FakeHub:
    """Serves one directory as the repository o/tiny, into the hub cache's layout."""

    def __init__(self, directory: Path, commit: str = "a" * 40) -> None:
        self.directory, self.commit, self.asked = directory, commit, 0

    def listing(self, *_: Any, **__: Any) -> list[str]:
        return [path.name for path in self.directory.iterdir()]

    def download(self, hub_id: str, **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.asked += 1
        root = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
        target = root / "snapshots" / self.commit
        target.mkdir(parents=True, exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(self.commit)
        allowed = options.get("allow_patterns")
        for name in filter_repo_objects(
            self.listing(), allow_patterns=allowed, ignore_patterns=options.get("ignore_patterns")
        ):
            (target / name).write_bytes((self.directory / name).read_bytes())
        return str(target)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", self.listing)
        return self


def test_a_hub_model_is_fetched_without_pickles_and_then_loads_offline(
    cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "modeling_tiny.py"):
        (directory / name).write_bytes(b"must not be fetched")
    served = FakeHub(directory).install(monkeypatch)
    origin = pull("o/tiny")
    assert origin.directory is not None
    names = {path.name for path in origin.directory.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "modeling_tiny.py"}
    asked = served.asked

    loaded = load_weights(f"o/tiny@{served.commit}", device="cpu")  # a commit: nothing to ask
    assert served.asked == asked
    provenance = loaded.provenance
    assert (provenance.source, provenance.revision) == ("hub:o/tiny", served.commit)

    monkeypatch.undo()
    monkeypatch.setenv("NSP_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache.parent / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("o/tiny") == origin
    with pytest.raises(NspError, match="HF_HUB_OFFLINE"):
        locate("o/tiny", revision="v2")


def test_a_download_that_stopped_half_way_is_not_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "served"
    tiny_llama().save_pretrained(path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(path)
    served = FakeHub(path).install(monkeypatch)
    origin = pull("o/tiny")
    assert origin.directory is not None
    shard = sorted(origin.directory.glob("*.safetensors"))[0]
    shard.unlink()
    assert hub.cached_snapshot("o/tiny") is None

    def cut(*_: Any, **__: Any) -> str:
        raise OSError("cut")

    monkeypatch.setattr("huggingface_hub.snapshot_download", cut)
    with pytest.raises(NspError, match="no complete copy of o/tiny"):
        load_weights("o/tiny")
    served.install(monkeypatch)
    load_weights("o/tiny", device="cpu")
    assert shard.is_file()


def test_a_repository_without_a_model(cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors"):
        (directory / name).unlink()
    FakeHub(directory).install(monkeypatch)
    with pytest.raises(InputError, match=r"o/tiny cannot be loaded as a model: it has no config\.json"):
        load_weights("o/tiny")


@pytest.mark.parametrize("name", ["./tiny", "nonsense", "tiny.gguf"])
def test_only_names_can_be_pulled(cache: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be pulled"):
        pull(name)


def test_on_disk_of_a_hub_model(cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_disk(CATALOGUE["gpt2"]) is None
    FakeHub(directory).install(monkeypatch)
    origin = pull("gpt2")
    assert on_disk(CATALOGUE["gpt2"]) == origin.directory
    assert origin.source == "catalogue:gpt2"
    assert origin.hub_id == "openai-community/gpt2"
