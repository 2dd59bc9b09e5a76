"""The bias scan on tiny models: divergences against raw forwards, planted layers and neurons, ties, resume, exports."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import LAYERS, NEURONS, module, one_thread, text, tokenizer  # noqa: F401
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

import nsp
from nsp.cli.app import main
from nsp.datasets.bias_pairs import BiasPair
from nsp.engine.output_directions import output_directions
from nsp.engine.token_pairing import pair_prompts
from nsp.errors import InputError
from nsp.experiments import EXPERIMENTS, pairs, runner
from nsp.experiments.bias_scan.layer_profile import layer_profile
from nsp.experiments.bias_scan.recipe import BiasScanRecipe
from nsp.experiments.bias_scan.tables import ScanResult
from nsp.experiments.experiment import Unit
from nsp.experiments.pairs import bias_scan, crows_score

FAMILIES = ("llama", "gpt2")


def made_pairs(count: int = 6, seed: int = 0) -> list[BiasPair]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 10, (count, 2))
    texts = [[text(rng.integers(0, 58, int(length)).tolist()) for length in row] for row in lengths]
    return [BiasPair(f"p{n}", "ab"[n % 2], more, less, origin=f"made:{n}") for n, (more, less) in enumerate(texts)]


def mlp_down(of: Any, layer: int) -> torch.nn.Parameter:
    inner = of.model.layers[layer].mlp.down_proj if hasattr(of, "model") else of.transformer.h[layer].mlp.c_proj
    weight: torch.nn.Parameter = inner.weight
    return weight


def two_models(family: str, change: Callable[[Any], None]) -> tuple[nsp.Model, nsp.Model]:
    aligned = module(family)
    base = copy.deepcopy(aligned)
    with torch.no_grad():
        change(base)
    return nsp.load(aligned, tokenizer=tokenizer()), nsp.load(base, tokenizer=tokenizer())


def noised(layer: int, size: float = 0.1) -> Callable[[Any], None]:
    def change(of: Any) -> None:
        weight = mlp_down(of, layer)
        weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer))

    return change


def everything_noised(of: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in of.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def logits(of: nsp.Model, ids: Sequence[int], hooks: Sequence[tuple[Any, Callable[..., Any]]] = ()) -> torch.Tensor:
    handles = [inner.register_forward_hook(hook) for inner, hook in hooks]
    try:
        with torch.no_grad():
            found: torch.Tensor = of.module(torch.tensor([list(ids)])).logits[0].double()
    finally:
        for handle in handles:
            handle.remove()
    return found


def kl(aligned: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    log_p, log_q = aligned.log_softmax(-1), base.log_softmax(-1)
    return np.asarray((log_p.exp() * (log_p - log_q)).sum(-1).numpy())


def layers_of(of: nsp.Model) -> Any:
    return of.module.model.layers if hasattr(of.module, "model") else of.module.transformer.h


def mlp_outputs(of: nsp.Model, ids: Sequence[int]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    logits(of, ids, [(layer.mlp, lambda _m, _a, out: kept.append(out.clone())) for layer in layers_of(of)])
    return kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patch", ["cumulative", "single"])
def test_divergences_are_those_of_hooks(family: str, patch: str) -> None:
    aligned, base = two_models(family, everything_noised)
    tree = bias_scan(
        aligned, base, made_pairs(2), components=["mlp_out"], patch=patch, neurons=None, mean_over_positions=True
    )
    found = tree["effects/mlp_out"]
    for row in range(4):
        ids = [int(token) for token in tree["inputs"]["token_id"].values[row] if token >= 0]
        there, want = logits(aligned, ids), mlp_outputs(aligned, ids)
        before = kl(there, logits(base, ids))
        assert tree["baseline"]["kl"].values[row] == pytest.approx(before[-1], rel=1e-4)
        assert tree["baseline"]["kl_mean"].values[row] == pytest.approx(before.mean(), rel=1e-4)
        for layer in range(LAYERS):
            chosen = range(layer + 1) if patch == "cumulative" else [layer]
            hooks = [(layers_of(base)[at].mlp, lambda _m, _a, _out, value=want[at]: value) for at in chosen]
            after = kl(there, logits(base, ids, hooks))
            assert found["kl"].values[row, layer] == pytest.approx(after[-1], rel=1e-3, abs=1e-6)
            assert found["kl_mean"].values[row, layer] == pytest.approx(after.mean(), rel=1e-3, abs=1e-6)
            assert found["delta_kl"].values[row, layer] == pytest.approx(after[-1] - before[-1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_neurons_are_those_of_hooks(family: str) -> None:
    aligned, base = two_models(family, everything_noised)
    tree = bias_scan(
        aligned, base, made_pairs(1), components=["mlp_out"], neurons={"layer": 1, "positions": "all", "top": 3}
    )
    for row in range(2):
        ids = [int(token) for token in tree["inputs"]["token_id"].values[row] if token >= 0]
        there, before = logits(aligned, ids), tree["baseline"]["kl"].values[row]
        acts: dict[str, torch.Tensor] = {}
        for name, of in (("aligned", aligned), ("base", base)):
            inner = layers_of(of)[1].mlp
            inner = inner.down_proj if family == "llama" else inner.c_proj
            logits(
                of, ids, [(inner, lambda _m, args, _out, kept=acts, name=name: kept.update({name: args[0][0].clone()}))]
            )
        columns = [output_directions(of.runtime, "mlp_neurons", 1) for of in (aligned, base)]
        for neuron in (0, 7, NEURONS - 1):
            change = acts["aligned"][:, [neuron]] * columns[0][neuron] - acts["base"][:, [neuron]] * columns[1][neuron]
            after = kl(
                there, logits(base, ids, [(layers_of(base)[1].mlp, lambda _m, _a, out, change=change: out + change)])
            )
            assert tree["effects/mlp_neurons"]["delta_kl"].values[row, neuron] == pytest.approx(
                after[-1] - before, rel=2e-3, abs=1e-6
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patch", ["cumulative", "single", "together"])
def test_equal_models_have_no_divergence_anywhere(family: str, patch: str) -> None:
    aligned, base = two_models(family, lambda _of: None)
    neurons = None if patch == "together" else {"top": 3}
    for receiver in (None, base):
        tree = bias_scan(aligned, receiver, made_pairs(), patch=patch, neurons=neurons, mean_over_positions=True)
        assert (tree["baseline"]["kl"].values == 0).all()
        for component in ("mlp_out", "resid_post"):
            for name in ("delta_kl", "delta_kl_mean"):
                assert (tree[f"effects/{component}"][name].values == 0).all()
            assert (tree[f"receipts/{component}"]["fired"].values == 0).all()
        scan = ScanResult(tree)
        assert all(star.layer is None for stars in scan.stars.values() for star in stars)
        assert scan.found() == []
        assert "no star layer in any prompt" in str(EXPERIMENTS["bias-scan"].summary(tree))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_noised_layer_is_the_star_layer(family: str, layer: int) -> None:
    aligned, base = two_models(family, noised(layer))
    scan = ScanResult(bias_scan(aligned, base, made_pairs(10), neurons=None))
    named = [star.layer == layer for star in scan.stars["mlp_out"]]
    assert np.mean(named) >= 0.95
    # Layers below are untouched by construction, and what they say is exactly nothing.
    assert (scan.scan("mlp_out")["delta_kl"].values[:, :layer] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_planted_neurons_are_found(family: str) -> None:
    planted = [1, 4, 9, 16, 20, 25, 30, 36, 41, 47]

    def change(of: Any) -> None:
        weight = mlp_down(of, 1)
        columns = weight.T if family == "llama" else weight  # a view of (neuron, width)
        columns[planted] = 0.5 * torch.randn(10, columns.shape[1], generator=torch.Generator().manual_seed(0))

    aligned, base = two_models(family, change)
    scan = ScanResult(bias_scan(aligned, base, made_pairs(10), neurons={"top": 10}))
    assert all(star.layer == 1 for star in scan.stars["mlp_out"])
    assert len({neuron for layer, neuron, _ in scan.found() if layer == 1} & set(planted)) >= 9


def test_a_model_against_its_own_ablation() -> None:
    of = nsp.load(module("llama"), tokenizer=tokenizer())
    site = "mlp_neurons[1][2,5,11] @ *"
    tree = bias_scan(of, None, made_pairs(), ablate=[site], neurons={"top": 3}, mean_over_positions=True)
    edited = copy.deepcopy(of.module)
    with torch.no_grad():
        mlp_down(edited, 1)[:, [2, 5, 11]] = 0.0
    other = bias_scan(
        of, nsp.load(edited, tokenizer=tokenizer()), made_pairs(), neurons={"top": 3}, mean_over_positions=True
    )
    for group in ("baseline", "effects/mlp_out", "effects/resid_post", "effects/mlp_neurons", "effects/ablation"):
        for name, values in tree[group].data_vars.items():
            np.testing.assert_allclose(values, other[group][name], atol=2e-5, rtol=1e-4, err_msg=f"{group}/{name}")
    scan = ScanResult(tree)
    assert {(1, 2), (1, 5), (1, 11)} >= {(layer, neuron) for layer, neuron, _ in scan.found()}
    assert scan.found()


def test_the_plain_path_says_the_same() -> None:
    aligned, base = two_models("gpt2", everything_noised)
    first = bias_scan(aligned, base, made_pairs(3), ablate=["mlp_neurons[0][1:9] @ *"], neurons={"layer": 1, "top": 2})
    base.runtime.branch_refusal = "asked for by a test"
    second = bias_scan(aligned, base, made_pairs(3), ablate=["mlp_neurons[0][1:9] @ *"], neurons={"layer": 1, "top": 2})
    for group in ("effects/mlp_out", "effects/resid_post", "effects/mlp_neurons"):
        for name in second[group].data_vars:
            np.testing.assert_allclose(first[group][name], second[group][name], atol=2e-5, err_msg=f"{group}/{name}")


def test_neurons_of_a_sample_of_the_prompts() -> None:
    aligned, base = two_models("llama", noised(1))
    tree = bias_scan(aligned, base, made_pairs(6), components=["mlp_out"], neurons={"top": 3, "prompts": 5})
    at, delta = (tree["effects/mlp_neurons"][name].values for name in ("neuron_layer", "delta_kl"))
    drawn = {int(number) for number, layer in zip(tree["inputs"]["pair_number"].values, at, strict=True) if layer == 1}
    assert len(drawn) == 2
    assert (at[np.isnan(delta).all(axis=1)] == -3).all()
    found = ScanResult(tree).found()[0]
    assert found[2] == pytest.approx(-np.nansum(delta[:, found[1]]) / 4, rel=1e-5)


def test_ties_and_flat_profiles_are_said() -> None:
    layers = [3, 4, 5, 6]
    assert layer_profile(1.0, np.array([0.1, 0.8, 0.0, 0.1]), layers).layer == 4
    tie = layer_profile(1.0, np.array([0.0, 0.48, 0.0, 0.49]), layers)
    assert (tie.layer, tie.ties, tie.status) == (4, (6,), "tie")
    flat = layer_profile(1.0, np.array([0.2, 0.3, 0.25, 0.25]), layers)
    assert (flat.layer, flat.flat, flat.status) == (4, True, "flat")
    assert layer_profile(1.0, np.array([-0.1, 0.0, -0.2, 1e-9]), layers).layer is None
    assert layer_profile(1.0, np.array([np.nan, 1.0, 0.0, 0.0]), layers).layer is None


GROUPS = ("baseline", "effects/mlp_out", "effects/mlp_neurons", "effects/ablation", "circuit/found", "effects/neutral")


@pytest.mark.parametrize("after", [2, 3, 4])
def test_an_interrupted_scan_goes_on_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed while prompts are scanned, before the neurons are named, and before they are ablated."""
    aligned, base = two_models("llama", noised(1))
    kind = EXPERIMENTS["bias-scan"]
    recipe = BiasScanRecipe.model_validate(
        {"kind": "bias-scan", "model": "tiny", "pairs": made_pairs(10), "neurons": {"top": 4}}
    )

    def scan() -> Any:
        return kind(base, recipe, {"aligned": aligned})

    whole = runner.run(scan(), out=tmp_path / "whole.zarr", progress=False).tree
    compute, computed = kind.compute, []

    def counted(self: Any, unit: Unit, *rest: Any) -> Any:
        if len(computed) == after:
            raise KeyboardInterrupt
        computed.append(unit.index)
        return compute(self, unit, *rest)

    monkeypatch.setattr(kind, "compute", counted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(scan(), out=tmp_path / "part.zarr", progress=False)
    first = list(computed)
    after = 100
    rest = runner.run(scan(), out=tmp_path / "part.zarr", progress=False).tree
    assert first == [*range(len(first))]
    assert sorted(computed) == [*range(5)]  # three blocks of prompts, what was found, and its ablation: each once
    for group in GROUPS:
        pair = (
            tree[group].to_dataset().drop_vars(["done", "unit", "sha256"], errors="ignore").load()
            for tree in (whole, rest)
        )
        xr.testing.assert_equal(*pair)


def test_export_writes_every_table_with_its_columns(tmp_path: Path) -> None:
    aligned, base = two_models("llama", noised(1))
    out = tmp_path / "scan.zarr"
    bias_scan(
        aligned, base, made_pairs(6), neurons={"top": 3}, alignment={"auto": "pairs", "min_precision": 0.5}, out=out
    )
    assert main(["export", str(out), "--csv", str(tmp_path / "tables")]) == 0
    files = {path.name: list(csv.DictReader(path.read_text().splitlines())) for path in (tmp_path / "tables").iterdir()}
    assert files.keys() >= {
        "prompt_results.csv", "layer_stats.csv", "neuron_stats.csv", "pairgap_a.csv", "pairgap_b.csv", "alignment_neurons.csv",
        "intersection.csv", "crows_score.csv", "neutral_text.csv",
    }  # fmt: skip
    assert len(files["prompt_results.csv"]) == 12
    assert len(files["layer_stats.csv"]) == 2 * LAYERS
    assert len(files["neuron_stats.csv"]) == NEURONS
    row = files["pairgap_a.csv"][0]
    assert float(row["kl_gap"]) == pytest.approx(float(row["kl_more"]) - float(row["kl_less"]))
    documented = (Path(__file__).parents[1] / "docs" / "bias-scans.md").read_text()
    for name, rows in files.items():
        for column in rows[0]:
            plain = column.replace("_mlp_out", "_<component>").replace("_resid_post", "_<component>")
            assert f"`{plain}`" in documented, (name, column)
    assert main(["export", str(out), "--csv", str(tmp_path), "--zip"]) == 2


def test_a_gap_is_the_sum_of_the_sentences_log_probabilities() -> None:
    aligned, base = two_models("gpt2", everything_noised)
    tree = bias_scan(aligned, base, made_pairs(3), components=[], neurons=None)
    start = base.tokenizer.eos_token_id  # this tokenizer has no token for the beginning of text
    for row in range(6):
        ids = [int(token) for token in tree["inputs"]["token_id"].values[row] if token >= 0]
        for of, name in ((aligned, "aligned"), (base, "base")):
            log_p = logits(of, [start, *ids])[:-1].log_softmax(-1)
            total = float(log_p.gather(1, torch.tensor(ids)[:, None]).sum())
            assert tree["baseline"][f"logprob_{name}"].values[row] == pytest.approx(total, rel=1e-5)
    found = pairs.pair_gap(base, made_pairs(3))
    tables = [table for table in pairs.csv_tables(tree) if table.title.startswith("pairgap")]
    gaps = [row[table.columns.index("gap_base")] for table in tables for row in table.rows]
    assert sorted(gaps) == pytest.approx(sorted(found["gap"].values.tolist()))


def test_the_score_counts_preferences_and_names_ties() -> None:
    score = crows_score(np.array([1.0, 2.0, -1.0, 0.0]))
    assert (score.pairs, score.percent, score.ties) == (4, 50.0, 1)
    assert score.low < 50 < score.high
    assert np.isnan(crows_score(np.array([])).percent)


def test_positions_are_matched_by_where_tokens_end(tokenizer: Any) -> None:
    one = nsp.datasets.prompts.encode(tokenizer, "The doctor came late")
    begun = nsp.datasets.prompts.encode(tokenizer, [tokenizer.bos_token_id, *one.token_ids])
    assert pair_prompts(one, one).where.tolist() == list(range(len(one)))
    other = nsp.datasets.prompts.Prompt(one.text, begun.token_ids, begun.token_texts, ((0, 0), *one.offsets))
    assert pair_prompts(other, one).where.tolist() == list(range(1, len(one) + 1))
    assert pair_prompts(one, other).where.tolist() == [-1, *range(len(one))]
    with pytest.raises(InputError, match="no way to match"):
        pair_prompts(nsp.datasets.prompts.Prompt.from_ids([1, 2]), one)


def test_a_model_whose_tokenizer_adds_a_token_is_patched_where_the_text_is_the_same() -> None:
    aligned, base = two_models("llama", everything_noised)
    begins = tokenizer()
    end = begins.convert_tokens_to_ids("<end>")
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", end)]
    )
    aligned = nsp.load(aligned.module, tokenizer=begins)
    tree = bias_scan(aligned, base, made_pairs(2), components=["mlp_out"], neurons=None, mean_over_positions=True)
    for row in range(4):
        ids = [int(token) for token in tree["inputs"]["token_id"].values[row] if token >= 0]
        there, want = logits(aligned, [end, *ids])[1:], [value[:, 1:] for value in mlp_outputs(aligned, [end, *ids])]
        assert tree["baseline"]["kl_mean"].values[row] == pytest.approx(kl(there, logits(base, ids)).mean(), rel=1e-4)
        for layer in range(LAYERS):
            hooks = [(layers_of(base)[at].mlp, lambda _m, _a, _out, value=want[at]: value) for at in range(layer + 1)]
            after = kl(there, logits(base, ids, hooks))
            assert tree["effects/mlp_out"]["kl"].values[row, layer] == pytest.approx(after[-1], rel=1e-3, abs=1e-6)


def wider(seed: int, **options: Any) -> nsp.Model:
    torch.manual_seed(seed)
    given = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": LAYERS, "vocab_size": 61}
    given |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,
    }
    return nsp.load(LlamaForCausalLM(LlamaConfig(**{**given, **options})).eval(), tokenizer=tokenizer())


def test_models_that_do_not_fit_are_refused_and_maps_are_fitted() -> None:
    base = nsp.load(module("llama"), tokenizer=tokenizer())
    with pytest.raises(InputError, match=r"24 wide .* 32; fit a map"):
        bias_scan(wider(0), base, made_pairs(2), neurons=None)
    with pytest.raises(InputError, match="no neuron of"):
        bias_scan(wider(0), base, made_pairs(2), map="linear")
    with pytest.raises(InputError, match=r"4 layers and .* 3"):
        bias_scan(wider(0, num_hidden_layers=4), base, made_pairs(2), neurons=None)
    with pytest.raises(InputError, match="different vocabularies"):
        bias_scan(wider(0, vocab_size=80), base, made_pairs(2), neurons=None)
    tree = bias_scan(wider(0), base, made_pairs(2), neurons=None, map="linear")
    assert len(tree["effects/mlp_out"].attrs["map_r2"]) == LAYERS
    assert np.isfinite(tree["effects/mlp_out"]["kl"].values).all()


def test_recipes_say_what_does_not_go_together() -> None:
    check = BiasScanRecipe.model_validate
    with pytest.raises(ValueError, match="star layer"):
        check({"kind": "bias-scan", "patch": "together"})
    with pytest.raises(ValueError, match="star layer"):
        check({"kind": "bias-scan", "components": []})
    with pytest.raises(ValueError, match="patched whole"):
        check({"kind": "bias-scan", "components": ["z"]})
    with pytest.raises(ValueError, match="models names the models"):
        check({"kind": "bias-scan", "model": "gpt2", "models": {"aligned": "smollm2"}})
    recipe = check({"kind": "bias-scan", "model": {"dtype": "float32"}, "models": {"aligned": "a", "base": "b"}})
    assert (recipe.model.name, recipe.aligned.name, recipe.aligned.dtype) == ("b", "a", "float32")
    assert check(recipe.model_dump(mode="json")) == recipe
