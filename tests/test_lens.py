"""Lenses against the model's own output, tuned-lens files, and direct logit attribution that sums to the logit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, LAYERS, VOCABULARY, WIDTH, model, text
from torch import nn

import nsp
from nsp.errors import InputError
from nsp.experiments import logit_attribution, logit_lens, patchscope_lens, tuned_lens
from nsp.experiments.lens.recipe import LensRecipe
from nsp.experiments.lens.summary import headline, settled_layer, summarise
from nsp.experiments.lens.tuned import TunedLens, load_tuned_lens, train_tuned_lens
from nsp.experiments.logit_attribution.frozen_norm import frozen_norm
from nsp.experiments.logit_attribution.summary import shares
from nsp.experiments.logit_attribution.summary import summarise as summarise_attribution
from nsp.experiments.patchscope.templates import TEMPLATES, target_prompt


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def either(request: pytest.FixtureRequest) -> nsp.Model:
    return model(request.param)


@pytest.fixture(scope="module")
def llama() -> nsp.Model:
    return model("llama")


def hidden_states(of: nsp.Model, ids: list[int]) -> list[torch.Tensor]:
    """What each layer receives, and the residual stream after the last one, by hooks: (position, width) each."""
    layers = of.module.get_submodule(of.geometry.table.layers)
    found: list[torch.Tensor] = []

    def receives(_module: Any, arguments: Any, keywords: Any) -> None:
        found.append((arguments[0] if arguments else keywords["hidden_states"]).detach()[0])

    hooks = [layer.register_forward_pre_hook(receives, with_kwargs=True) for layer in layers]
    norm = of.module.get_submodule(of.geometry.table.final_norm)
    hooks.append(norm.register_forward_pre_hook(receives, with_kwargs=True))
    of.module(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


def unembedded(of: nsp.Model, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities by the model's own modules, float64."""
    table = of.geometry.table
    logits = of.module.get_submodule(table.head)(of.module.get_submodule(table.final_norm)(hidden))
    return torch.log_softmax(logits.detach().double(), dim=-1)


# --- lenses ---------------------------------------------------------------------------------------------------------


def test_the_logit_lens_is_norm_and_head_at_every_layer_and_position(either: nsp.Model) -> None:
    tree = logit_lens(either, [text(CLEAN), text(CORRUPT[:6])], tokens=["w7", 12], top=4)
    lens, top = tree["effects/lens"].to_dataset(), tree["effects/top"].to_dataset()
    assert lens["entropy"].dims == ("prompt", "layer", "position")
    assert lens["token"].values.tolist() == [7, 12]
    for row, ids in enumerate([CLEAN, CORRUPT[:6]]):
        states = hidden_states(either, ids)
        output = torch.log_softmax(either.module(torch.tensor([ids])).logits[0].detach().double(), dim=-1)
        for layer in range(LAYERS):
            log_p = unembedded(either, states[layer + 1])
            for position in range(len(ids)):
                at = {"prompt": row, "layer": layer, "position": position}
                here = log_p[position]
                assert float(lens["entropy"].sel(at)) == pytest.approx(float(-(here.exp() * here).sum()), abs=1e-4)
                assert float(lens["logprob"].sel({**at, "token": 7})) == pytest.approx(float(here[7]), abs=1e-4)
                assert float(lens["prob"].sel(at).isel(token=1)) == pytest.approx(float(here[12].exp()), abs=1e-5)
                assert int(lens["rank"].sel({**at, "token": 12})) == int((here > here[12]).sum())
                assert top["token_id"].sel(at).values.tolist() == here.topk(4).indices.tolist()
                true = output[position]
                assert float(lens["divergence"].sel(at)) == pytest.approx(
                    float((true.exp() * (true - here)).sum()), abs=1e-4
                )
                if position + 1 < len(ids):
                    assert float(lens["next_logprob"].sel(at)) == pytest.approx(
                        float(here[ids[position + 1]]), abs=1e-4
                    )
    # Beyond the shorter prompt nothing is read.
    assert np.isnan(lens["entropy"].sel(prompt=1, position=slice(6, None))).all()
    assert (lens["next_rank"].sel(prompt=1, position=slice(5, None)) == -1).all()


def test_the_last_layer_is_the_models_output(either: nsp.Model) -> None:
    tree = logit_lens(either, text(CLEAN), layers=-1)
    lens = tree["effects/lens"].to_dataset()
    assert lens["layer"].values.tolist() == [LAYERS - 1]
    assert float(np.abs(lens["divergence"]).max()) < 1e-6
    assert (lens["output_rank"] == 0).all()


def test_positions_are_chosen_a_prompt(llama: nsp.Model) -> None:
    lens = logit_lens(llama, [text(CLEAN), text(CORRUPT[:6])], positions="last", layers="0:2")[
        "effects/lens"
    ].to_dataset()
    assert lens["position"].values.tolist() == [5, 8]
    assert np.isfinite(lens["entropy"].sel(prompt=0, position=8)).all()
    assert np.isnan(lens["entropy"].sel(prompt=0, position=5)).all()


def test_the_patchscope_lens_reads_the_identity_prompt(llama: nsp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a hook that puts each hidden state at the placeholder, one forward pass a cell."""
    import nsp.experiments.lens.experiment as module

    ids = [7, 8, 7, 8, 3]
    monkeypatch.setattr(module, "target_prompt", lambda *_: (llama.encode(ids), 4))
    lens = patchscope_lens(llama, text(CLEAN))["effects/lens"].to_dataset()
    states = hidden_states(llama, CLEAN)
    for layer in range(LAYERS):
        for position in (0, 4, 8):

            def put(
                _module: Any, _arguments: Any, output: torch.Tensor, layer: int = layer, position: int = position
            ) -> torch.Tensor:
                output = output.clone()
                output[0, 4] = states[layer + 1][position]
                return output

            hook = llama.module.model.layers[layer].register_forward_hook(put)
            log_p = torch.log_softmax(llama.module(torch.tensor([ids])).logits[0, -1].detach().double(), dim=-1)
            hook.remove()
            found = float(lens["entropy"].sel(prompt=0, layer=layer, position=position))
            assert found == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=1e-4)
    # At the last layer nothing of the identity prompt is left to read it with: the lens is the model's output.
    assert float(np.abs(lens["divergence"].sel(layer=LAYERS - 1)).max()) < 1e-5


def test_the_lens_templates_end_where_they_say(tokenizer: Any) -> None:
    prompt, position = target_prompt(tokenizer, TEMPLATES["few_shot"])
    assert position == len(prompt) - 1
    prompt, position = target_prompt(tokenizer, TEMPLATES["identity"])
    assert position == len(prompt) - 2


def test_a_lens_run_is_a_store_with_a_summary(llama: nsp.Model, tmp_path: Path) -> None:
    tree = logit_lens(llama, [text(CLEAN)] * 3, tokens="w7", out=tmp_path / "lens.zarr")
    assert nsp.open_run(tmp_path / "lens.zarr").header["extra"]["headline"] == headline(tree)
    said = str(summarise(tree))
    assert "means over prompts" in said
    assert "w7" in said
    settled = settled_layer(tree)
    rank = tree["effects/lens"]["output_rank"].isel(prompt=0)
    for position in range(len(CLEAN)):
        ranks = rank.isel(position=position).values.tolist()
        first = next(layer for layer in range(LAYERS) if all(value == 0 for value in ranks[layer:]))
        assert int(settled.isel(prompt=0, position=position)) == first
    opened = xr.open_datatree(tmp_path / "lens.zarr", engine="zarr", consolidated=False)
    assert opened["effects/top"]["token_text"].values.tolist() == tree["effects/top"]["token_text"].values.tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"method": "tuned"}, "weights or train"), ({"target_layer": 1}, "patchscope"), ({"weights": "x"}, "weights or train"),
     ({"template": "identity"}, "patchscope")],
)  # fmt: skip
def test_wrong_lens_recipes_say_what_is_needed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LensRecipe.model_validate({"kind": "lens", "prompts": ["a"], **changes})


# --- tuned lens -----------------------------------------------------------------------------------------------------


def random_lens(of: nsp.Model) -> TunedLens:
    generator = torch.Generator().manual_seed(5)
    width = of.geometry.d_model
    return TunedLens(
        torch.randn(LAYERS, width, width, generator=generator) * 0.1,
        torch.randn(LAYERS, width, generator=generator),
        "tiny",
    )


def test_a_tuned_lens_translates_what_each_layer_receives(either: nsp.Model) -> None:
    """Translator i is applied to what layer i receives, as in the tuned-lens package; none after the last layer."""
    lens = random_lens(either)
    found = tuned_lens(either, text(CLEAN), lens)["effects/lens"].to_dataset()
    states = hidden_states(either, CLEAN)
    for layer in range(LAYERS):
        hidden = states[layer + 1]
        if layer + 1 < LAYERS:
            translator = nn.Linear(WIDTH, WIDTH)
            translator.weight.data, translator.bias.data = lens.weight[layer + 1], lens.bias[layer + 1]
            hidden = hidden + translator(hidden)
        log_p = unembedded(either, hidden)
        for position in (0, 5, 8):
            value = float(found["entropy"].sel(prompt=0, layer=layer, position=position))
            assert value == pytest.approx(float(-(log_p[position].exp() * log_p[position]).sum()), abs=1e-4)


def test_files_of_the_tuned_lens_package_load_and_are_written(llama: nsp.Model, tmp_path: Path) -> None:
    """config.json and params.pt, the state dict of a ModuleList of Linear layers."""
    translators = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    torch.save(translators.state_dict(), tmp_path / "params.pt")
    config = {"base_model_name_or_path": "org/tiny", "d_model": WIDTH, "num_hidden_layers": LAYERS, "bias": True,
              "base_model_revision": None, "unembed_hash": "ab", "lens_type": "linear_tuned_lens"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    lens = load_tuned_lens(tmp_path, llama)
    assert torch.equal(lens.weight[1], translators[1].weight)
    assert torch.equal(lens.bias[2], translators[2].bias)
    lens.save(tmp_path / "again")
    state = torch.load(tmp_path / "again" / "params.pt", weights_only=True)
    assert state.keys() == translators.state_dict().keys()
    assert json.loads((tmp_path / "again" / "config.json").read_text()).keys() == config.keys()
    fresh = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    fresh.load_state_dict(state)
    assert torch.equal(load_tuned_lens(tmp_path / "again", llama).weight, lens.weight)


def test_a_lens_of_another_model_is_an_error(llama: nsp.Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tuned lens"):
        load_tuned_lens(tmp_path, llama)
    random_lens(llama).save(tmp_path)
    other = model("llama", hidden_size=24)
    with pytest.raises(InputError, match=r"3 layers of width 32.*3 layers of width 24"):
        load_tuned_lens(tmp_path, other)
    state = torch.load(tmp_path / "params.pt", weights_only=True)
    del state["1.weight"]
    torch.save(state, tmp_path / "params.pt")
    with pytest.raises(InputError, match=r"no 1\.weight"):
        load_tuned_lens(tmp_path, llama)


def test_training_brings_the_lens_closer_to_the_output(llama: nsp.Model, tmp_path: Path) -> None:
    words = np.random.default_rng(0).integers(0, VOCABULARY - 2, 3000)
    (tmp_path / "text.txt").write_text(text([int(word) for word in words]))
    how = {"tokens": 3000, "sequence": 30, "batch": 32, "rate": 1e-3}
    start = train_tuned_lens(llama, tmp_path / "text.txt", steps=0, **how)
    trained = train_tuned_lens(llama, tmp_path / "text.txt", steps=60, **how)
    assert start.divergence is not None
    assert trained.divergence is not None
    assert (start.divergence[0] <= start.divergence[1]).all()
    assert (trained.divergence[0] <= start.divergence[0]).all()
    assert trained.divergence[0].mean() < 0.97 * start.divergence[0].mean()
    assert all(parameter.grad is None for parameter in llama.module.parameters())
    again = train_tuned_lens(llama, tmp_path / "text.txt", steps=60, **how)
    assert torch.equal(again.weight, trained.weight)
    with pytest.raises(InputError, match="two pieces"):
        train_tuned_lens(llama, tmp_path / "text.txt", tokens=100, sequence=90)


# --- direct logit attribution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("distractor", [None, 20])
def test_shares_sum_to_the_logit(either: nsp.Model, distractor: int | None) -> None:
    """Components, heads and neurons each sum to the model's own logit (difference), by its own forward pass."""
    tree = logit_attribution(either, text(CLEAN), 12, distractor, by=["component", "head", "neuron"], position=5)
    logits = either.module(torch.tensor([CLEAN])).logits[0, 5].detach().double()
    expected = float(logits[12] - (0 if distractor is None else logits[distractor]))
    baseline = {str(name): float(value[0]) for name, value in tree["baseline"].to_dataset().data_vars.items()}
    assert baseline["logit"] == pytest.approx(expected, abs=1e-4)
    assert baseline["total"] == pytest.approx(expected, abs=1e-3)
    parts = baseline["embed"] + baseline["bias"]
    whole = (
        parts
        + float(tree["attribution/attn_out"]["contribution"].sum())
        + float(tree["attribution/mlp_out"]["contribution"].sum())
    )
    assert whole == pytest.approx(expected, abs=1e-3)
    for component in ("z", "mlp_neurons"):
        dataset = tree[f"attribution/{component}"].to_dataset()
        parts += float(dataset["contribution"].sum()) + float(dataset["bias"].sum())
    assert parts == pytest.approx(expected, abs=1e-3)
    assert tree["attribution/z"]["contribution"].dims == ("prompt", "layer", "head")
    assert tree["attribution/mlp_neurons"]["contribution"].dims == ("prompt", "layer", "neuron")
    assert "sum to" in str(summarise_attribution(tree))
    assert len(shares(tree)) == 2 + LAYERS * 4 + LAYERS * either.geometry.d_mlp


def test_a_heads_share_is_its_output_through_the_frozen_norm(llama: nsp.Model) -> None:
    tree = logit_attribution(llama, text(CLEAN), 12, 20)
    found: list[torch.Tensor] = []
    projection = llama.module.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _m, arguments: found.append(arguments[0].detach()[0, -1]))
    final = hidden_states(llama, CLEAN)[-1][-1].double()
    hook.remove()
    rms = final.pow(2).mean().add(llama.module.config.rms_norm_eps).sqrt()
    head = llama.module.lm_head.weight.detach().double()
    direction = (head[12] - head[20]) * llama.module.model.norm.weight.detach().double() / rms
    size = WIDTH // 4
    part = slice(2 * size, 3 * size)
    written = projection.weight.detach().double()[:, part] @ found[0].double()[part]
    assert float(tree["attribution/z"]["contribution"].sel(prompt=0, layer=1, head=2)) == pytest.approx(
        float(written @ direction), abs=1e-4
    )


def test_a_frozen_norm_is_the_norm_at_its_point() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (32, 33):
        value = torch.randn(width, generator=generator) * 3 + 1
        layer, rms = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-5)
        for norm in (layer, rms):
            for parameter in norm.parameters():
                parameter.data = torch.randn(width, generator=generator)
            found = frozen_norm(norm, value)
            assert found.centred == (norm is layer)
            weights = torch.randn(width, generator=generator, dtype=torch.float64)
            whole = float(weights @ norm(value).detach().double())
            assert float(found.direction(weights) @ value.double() + found.bias @ weights) == pytest.approx(
                whole, abs=1e-3
            )
    with pytest.raises(InputError, match="neither a layer norm nor an RMS norm"):
        frozen_norm(nn.Sequential(nn.Linear(32, 32), nn.Tanh()), torch.randn(32))


def test_answers_that_cannot_be_told_apart_are_errors(llama: nsp.Model) -> None:
    with pytest.raises(InputError, match="same token"):
        logit_attribution(llama, text(CLEAN), 12, 12)
