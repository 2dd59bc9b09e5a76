"""The catalogue, sources, directories, options and modules."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, tiny_llama, tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import logging as transformers_logging

from nsp.errors import InputError, NspError
from nsp.models import (
    CATALOGUE,
    find,
    hashing,
    load_weights,
    nearest,
)


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


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_catalogue_holds_what_was_promised() -> None:
    promised = (
        "smollm2 smollm2-135m smollm2-360m gpt2 pythia-160m qwen2.5-0.5b qwen3-0.6b gemma-3-270m gemma-2-2b "
        "llama-3.2-1b-inst llama-3.2-3b-inst llama-3.1-8b-inst phi-3-mini mistral-7b"
    )
    assert set(promised.split()) <= set(CATALOGUE)
    for alias, entry in CATALOGUE.items():
        assert entry.alias == alias
        assert entry.parameters > 1e8
        assert entry.layers >= 12
        assert entry.licence
    assert CATALOGUE["gpt2"].memory_bytes["float32"] == 4 * 124_439_808
    assert CATALOGUE["gpt2"].memory_bytes["4bit"] == 124_439_808 // 2


def test_no_two_aliases_share_weights() -> None:
    sources = [(entry.hub_id, entry.revision) for entry in CATALOGUE.values()]
    assert len(set(sources)) == len(sources)


def test_find_and_nearest() -> None:
    assert find("GPT2") is CATALOGUE["gpt2"]
    assert find("gpt3") is None
    assert nearest("smolm2")[0] == "smollm2"
    assert "qwen2.5-0.5b" in nearest("someone/Qwen2.5-0.5B")


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, nsp.models.locate; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# --- what can be written as a source ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolm2", "gpt-2"])
def test_unknown_name_says_what_is_near_and_what_forms_there_are(cache: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"(?s)Did you mean .*(smollm2|gpt2).*alias.*hub id.*directory.*\.gguf"):
        load_weights(name)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("./nowhere", "there is no directory"),
        ("/nowhere/at/all", "there is no directory"),
        ("gone.gguf", r"there is no file gone\.gguf"),
        ("a b", "there is no model 'a b'"),
        ("", "there is no model ''"),
        ("gpt2@", "without a revision"),
        ("smollm2@main", "takes no revision"),
    ],
)
def test_sources_that_cannot_be_meant(cache: Path, source: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_weights(source)


def test_two_revisions_and_a_revision_of_a_directory(cache: Path, directory: Path) -> None:
    with pytest.raises(InputError, match="two revisions"):
        load_weights("gpt2@a", revision="b")
    with pytest.raises(InputError, match="takes no revision"):
        load_weights(directory, revision="main")
    with pytest.raises(InputError, match="not int"):
        load_weights(3)  # type: ignore[arg-type]


def test_an_alias_wins_over_a_directory_of_its_name(
    cache: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.rename(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NspError, match="openai-community/gpt2"):
        load_weights("gpt2")
    assert load_weights("./gpt2").origin.source == "directory"


# --- directories -----------------------------------------------------------------------------------------------------


def test_a_directory_loads_ready_for_use(cache: Path, directory: Path) -> None:
    loaded = load_weights(directory, device="cpu")
    assert loaded.name == "tiny"
    assert not loaded.module.training
    assert not any(value.requires_grad for value in loaded.module.parameters())
    assert loaded.dtype == torch.float32  # the default on cpu, though the checkpoint is bfloat16
    assert loaded.device.type == "cpu"
    assert loaded.tokenizer("ab a")["input_ids"] == tiny_tokenizer()("ab a")["input_ids"]
    assert str(directory.parent) not in str(loaded.config)
    assert load_weights(str(directory), device="cpu", dtype="auto").dtype == torch.bfloat16


def test_loading_is_silent(cache: Path, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_weights(directory, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == before


def test_provenance_of_a_directory(cache: Path, directory: Path) -> None:
    provenance = load_weights(directory, device="cpu", attn_implementation="eager").provenance
    assert (provenance.name, provenance.source, provenance.revision) == ("tiny", "directory", None)
    assert (provenance.dtype, provenance.device, provenance.quantization) == ("float32", "cpu", None)
    assert provenance.attn_implementation == "eager"
    assert provenance.weights_hash == hashing.hash_file(directory / "model.safetensors")
    assert len(provenance.tokenizer_hash) == 64


def test_a_sharded_directory_loads_and_its_hash_covers_every_shard(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "sharded"
    tiny_llama().save_pretrained(path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(path)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 1
    before = load_weights(path, device="cpu").provenance.weights_hash
    shards[-1].unlink()
    with pytest.raises(InputError, match=f"weight files are missing, the first is {shards[-1].name}"):
        load_weights(path, device="cpu")
    tiny_llama(seed=1).save_pretrained(path, max_shard_size="20KB")
    assert load_weights(path, device="cpu").provenance.weights_hash != before


def test_directories_that_are_not_whole(cache: Path, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match="it has no weights"):
        load_weights(directory)
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="not a weight index"):
        load_weights(directory)
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match=r"tiny cannot be loaded as a model: it has no config\.json"):
        load_weights(directory)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter"):
        load_weights(directory)


def test_a_weight_that_is_missing_is_not_made_up(cache: Path, directory: Path) -> None:
    file = directory / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 of its model's weights, the first is {name}"):
        load_weights(directory, device="cpu")


def test_a_weight_too_many_is_named_in_a_warning(cache: Path, directory: Path) -> None:
    file = directory / "model.safetensors"
    save_file({**load_file(file), "stray.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 weights in the checkpoint have no place.*stray\.weight"):
        load_weights(directory, device="cpu")


def test_damaged_weights_wrong_shapes_and_unknown_models(cache: Path, directory: Path) -> None:
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged or cut short"):
        load_weights(directory, device="cpu")
    file.write_bytes(whole)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(InputError, match="tiny cannot be loaded by transformers"):
        load_weights(directory, device="cpu")
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "nothing-known"}))
    with pytest.raises(InputError, match="nothing-known"):
        load_weights(directory, device="cpu")


def test_pickled_weights_are_read_only_where_there_are_no_safetensors(cache: Path, directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"not to be opened")
    kept = load_weights(directory, device="cpu").module.state_dict()
    (directory / "model.safetensors").unlink()
    torch.save(tiny_llama().to(torch.bfloat16).state_dict(), directory / "pytorch_model.bin")
    for name, value in load_weights(directory, device="cpu").module.state_dict().items():
        torch.testing.assert_close(value, kept[name])


def test_a_directory_without_tokenizer_needs_one(cache: Path, directory: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    tiny_tokenizer().save_pretrained(words)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(InputError, match=r"no tokenizer can be read for tiny .* tokenizer="):
        load_weights(directory, device="cpu")
    own = tiny_tokenizer()
    assert load_weights(directory, device="cpu", tokenizer=own).tokenizer is own
    assert load_weights(directory, device="cpu", tokenizer=words).tokenizer("b")["input_ids"] == own("b")["input_ids"]


def test_code_of_ones_own_needs_trust(cache: Path, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (directory / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match=r"Python code of its own.*trust_remote_code=True"):
        load_weights(directory, device="cpu", tokenizer=tiny_tokenizer())


def test_a_bidirectional_model_gets_its_masked_head(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "bert"
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(path)
    assert isinstance(load_weights(path, tokenizer=tiny_tokenizer()).module, BertForMaskedLM)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device": "gpu9"}, "device 'gpu9' is not known"),
        ({"dtype": "fp32"}, r"dtype 'fp32' .* float32, bfloat16, float16, float64 or auto"),
        ({"dtype": torch.int64}, "dtype 'int64'"),
        ({"dtype": 32}, "not int"),
        ({"quantization": "3bit"}, "quantization '3bit' is not known"),
        ({"attn_implementation": "flesh"}, "cannot use attn_implementation 'flesh'"),
    ],
)
def test_options_that_are_impossible(cache: Path, directory: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_weights(directory, **{"device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(directory: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        load_weights(directory, device="cuda:1")


def test_quantization_without_bitsandbytes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="bitsandbytes, which is not installed"):
        load_weights(directory, device="cpu", quantization="4bit")


def test_dtype_by_name_and_by_value(cache: Path, directory: Path) -> None:
    assert load_weights(directory, device="cpu", dtype="torch.float16").dtype == torch.float16
    assert load_weights(directory, device="cpu", dtype=torch.float64).dtype == torch.float64


# --- modules ---------------------------------------------------------------------------------------------------------


def test_a_module_is_used_as_it_is(cache: Path) -> None:
    module, tokenizer = tiny_llama().train(), tiny_tokenizer()
    loaded = load_weights(module, tokenizer=tokenizer)
    assert loaded.module is module
    assert loaded.tokenizer is tokenizer
    assert not module.training
    assert not any(value.requires_grad for value in module.parameters())
    assert (loaded.name, loaded.provenance.source) == ("LlamaForCausalLM", "module")
    assert load_weights(tiny_llama(), dtype="bfloat16", attn_implementation="eager").dtype == torch.bfloat16
    assert load_weights(tiny_llama()).provenance.tokenizer_hash == ""


def test_a_module_takes_no_options_of_loading(cache: Path) -> None:
    with pytest.raises(InputError, match="not for a built module"):
        load_weights(tiny_llama(), quantization="4bit")
    with pytest.raises(InputError, match="needs a transformers model"):
        load_weights(torch.nn.Linear(2, 2), attn_implementation="eager")
    with pytest.raises(InputError, match="attn_implementation 'flesh'"):
        load_weights(tiny_llama(), attn_implementation="flesh")


def test_module_hash_follows_the_weights(cache: Path) -> None:
    first, again, other = (load_weights(tiny_llama(seed)).provenance.weights_hash for seed in (0, 0, 1))
    assert first == again != other
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    assert hashing.module_sha256(changed) != first
