"""A model's hashes are those of what it is now: weights and tokenizers that are edited after loading have others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_models as tiny
import pytest
import torch
from ndif_server import checkpoint

import nsp
from nsp.errors import InputError


@pytest.fixture
def model(tmp_path: Path) -> nsp.Model:
    return nsp.load(checkpoint(tmp_path / "weights"), device="cpu", dtype="float32")


def edits() -> dict[str, Any]:
    def in_place(layer: Any) -> None:
        with torch.no_grad():
            layer.mlp.down_proj.weight[3, 5] += 1.0  # one number

    def behind_torch(layer: Any) -> None:
        layer.mlp.down_proj.weight.data.mul_(3)

    def replaced(layer: Any) -> None:
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight * 1.5, requires_grad=False)

    return {"in place": in_place, "through .data": behind_torch, "another parameter": replaced}


@pytest.mark.parametrize("edit", edits().values(), ids=edits())
def test_edited_weights_are_another_model(model: nsp.Model, edit: Any, tmp_path: Path) -> None:
    pair = nsp.pair(clean=tiny.text(tiny.CLEAN), corrupt=tiny.text(tiny.CORRUPT), answer="w7", distractor="w9")
    place = tmp_path / "run.zarr"
    as_loaded = model.provenance.weights_hash
    assert model.provenance.weights_hash == as_loaded
    nsp.experiments.activation_patching(model, pair, components="mlp_out", positions="last", out=place)
    edit(model.module.model.layers[1])
    assert model.provenance.weights_hash != as_loaded
    with pytest.raises(InputError, match="another plan"):
        nsp.experiments.activation_patching(model, pair, components="mlp_out", positions="last", out=place)


def test_an_edited_tokenizer_is_another_one(model: nsp.Model) -> None:
    as_loaded = model.provenance.tokenizer_hash
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert model.provenance.tokenizer_hash != as_loaded


def test_the_same_model_moved_is_the_same_one(model: nsp.Model) -> None:
    as_loaded = model.provenance
    model.module.to("cpu")
    assert model.provenance == as_loaded
