"""Sites, metrics and doors of activation patching beyond the plain sweep, each against raw hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, LAYERS, Both, both, one_thread, text  # noqa: F401
from hooks_reference import Edit, replacing

import nsp
from nsp import metrics
from nsp.experiments import activation_patching, layer_recovery
from nsp.experiments.activation_patching.recipe import ActivationPatchingRecipe

PAIR = {"clean": text(CLEAN), "corrupt": text(CORRUPT), "answer": "w4", "distractor": "w9"}
LENGTH = len(CLEAN)


def patched(which: Both, component: str, layers: list[int], positions: list[int], units: list[int] | None = None) -> Any:
    """Logits (position, token) of the corrupt run with the clean run's values at these sites, by raw hooks."""
    kept = which.reference.values(CLEAN, [(component, layer) for layer in layers])
    edits = [Edit(component, layer, replacing(kept[component, layer], positions, units)) for layer in layers]
    return which.reference.logits(CORRUPT, edits)


def difference(logits: torch.Tensor) -> float:
    return float(logits[-1, 4] - logits[-1, 9])


@pytest.fixture(params=["llama", "gpt2"])
def which(request: pytest.FixtureRequest) -> Both:
    return both(request.param)


# Sites


@pytest.mark.parametrize("component", ["attn_out", "mlp_out", "z", "resid_post"])
def test_cumulative_layers(which: Both, component: str) -> None:
    """The cell of a layer patches layers 0 to it together."""
    units = {"z": {"heads": [1, 3]}}.get(component, {})
    found = activation_patching(which.model, PAIR, components=component, positions="2:", cumulative=True, **units)
    values = found[f"effects/{component}"]["logit_diff"].isel(pair=0)
    assert found["effects"][component].attrs["cumulative"]
    for layer in range(LAYERS):
        for position in (2, 5, LENGTH - 1):
            for unit in units.get("heads", [None]):
                logits = patched(which, component, list(range(layer + 1)), [position], None if unit is None else [unit])
                cell = values.sel(layer=layer, position=position, **({} if unit is None else {"head": unit}))
                assert float(cell) == pytest.approx(difference(logits), abs=1e-4), (layer, position, unit)


def test_cumulative_layers_of_a_selection(which: Both) -> None:
    """The chosen layers up to each, at all positions at once, by the plain path as by the branch path."""
    keys: dict[str, Any] = {"components": "mlp_out", "layers": [0, 2], "together": ["position"], "cumulative": True}
    found = activation_patching(which.model, PAIR, **keys)["effects/mlp_out"]["logit_diff"].isel(pair=0)
    for number, layers in enumerate([[0], [0, 2]]):
        logits = patched(which, "mlp_out", layers, list(range(LENGTH)))
        assert float(found[number]) == pytest.approx(difference(logits), abs=1e-4)


@pytest.mark.usefixtures("which")
def test_cumulative_units_of_work_are_whole(which: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = activation_patching(which.model, PAIR, components="attn_out", cumulative=True)
    monkeypatch.setattr("nsp.experiments.activation_patching.experiment._UNIT_FLOP", 1e4)
    parts = activation_patching(which.model, PAIR, components="attn_out", cumulative=True)
    xr.testing.assert_allclose(parts["effects/attn_out"].to_dataset(), whole["effects/attn_out"].to_dataset(), atol=1e-5)


@pytest.mark.parametrize("component", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_whole_layers(which: Both, component: str) -> None:
    found = activation_patching(which.model, PAIR, components=component, together=["position"])
    dataset = found[f"effects/{component}"].to_dataset()
    for layer in range(LAYERS):
        logits = patched(which, component, [layer], list(range(LENGTH)))
        assert float(dataset["logit_diff"].sel(layer=layer).squeeze()) == pytest.approx(difference(logits), abs=1e-4)
    if component.startswith("resid"):
        assert "always a full recovery" in dataset.attrs["note"]
        np.testing.assert_allclose(dataset["recovery_logit_diff"], 100, atol=1e-2)
    else:
        assert "note" not in dataset.attrs


def test_explicit_sites_and_submodules(which: Both) -> None:
    """Several selectors of one recipe, two of one component among them, and a submodule by its path."""
    module = which.submodule(1)
    sites = ["z[0,2][1] @ last", "z[1][0,3] @ 5", f"{module} @ 2,5,8", f"{module}[3] @ last"]
    found = activation_patching(which.model, PAIR, sites=sites)
    assert set(found["effects"].children) == {"z", "z-2", module, f"{module}-2"}
    for layer in (0, 2):
        cell = found["effects/z"]["logit_diff"].sel(layer=layer, head=1).squeeze()
        assert float(cell) == pytest.approx(difference(patched(which, "z", [layer], [LENGTH - 1], [1])), abs=1e-4)
    for head in (0, 3):
        cell = found["effects/z-2"]["logit_diff"].sel(layer=1, head=head).squeeze()
        assert float(cell) == pytest.approx(difference(patched(which, "z", [1], [5], [head])), abs=1e-4)
    for position in (2, 5, 8):
        cell = found[f"effects/{module}"]["logit_diff"].sel(position=position).squeeze()
        assert float(cell) == pytest.approx(difference(patched(which, module, [1], [position])), abs=1e-4)
    cell = found[f"effects/{module}-2"]["logit_diff"].squeeze()
    assert float(cell) == pytest.approx(difference(patched(which, module, [1], [8], [3])), abs=1e-4)


def test_a_submodule_goes_into_a_store(which: Both, tmp_path: Path) -> None:
    activation_patching(which.model, PAIR, sites=f"{which.submodule(1)} @ last", out=tmp_path / "x.zarr")
    tree = nsp.open_run(tmp_path / "x.zarr").tree
    ((name, node),) = tree["effects"].children.items()
    assert name == which.submodule(1)
    logits = patched(which, name, [1], [LENGTH - 1])
    assert float(node["logit_diff"].squeeze()) == pytest.approx(difference(logits), abs=1e-4)
    assert name in nsp.experiments.report(tree)


def test_an_interchange_is_both_directions_of_any_two_prompts(which: Both) -> None:
    """No clean or corrupt: each of two unrelated prompts gets the other's value."""
    found = activation_patching(which.model, PAIR, components="attn_out", mode="interchange", metric="logit_diff")
    values = found["effects/attn_out"].to_dataset()
    back = which.reference.values(CORRUPT, [("attn_out", 1)])["attn_out", 1]
    logits = which.reference.logits(CLEAN, [Edit("attn_out", 1, replacing(back, [4], None))])
    assert found["inputs"]["base"].values.tolist() == ["corrupt", "clean"]
    there = patched(which, "attn_out", [1], [4])
    for pair, exact in ((0, there), (1, logits)):
        assert float(values["logit_diff"].sel(pair=pair, layer=1, position=4)) == pytest.approx(difference(exact), abs=1e-4)


# Metrics of a recipe


def by_hand(logits: torch.Tensor, token: int) -> float:
    return float(torch.log_softmax(logits.double(), -1)[token])


def test_recovery_in_percent(which: Both) -> None:
    """(d_base - d_patched) / d_base x 100 for every distance, and the same normalisation for the rest, in float64."""
    kinds = ["kl", "kl_reverse", "js", "l2", "mse", "cosine", "logit_diff", "entropy"]
    found = activation_patching(which.model, PAIR, components="mlp_out", positions="last", metric=kinds)
    dataset = found["effects/mlp_out"].to_dataset()
    base, donor = (which.reference.logits(ids)[-1].numpy() for ids in (CORRUPT, CLEAN))
    for layer in range(LAYERS):
        logits = patched(which, "mlp_out", [layer], [LENGTH - 1])[-1].numpy()
        p, q, r = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (logits, base, donor))
        distances = {
            "kl": ((r * np.log(r / p)).sum(), (r * np.log(r / q)).sum()),
            "kl_reverse": ((p * np.log(p / r)).sum(), (q * np.log(q / r)).sum()),
            "js": tuple(
                ((x * np.log(2 * x / (x + r))).sum() + (r * np.log(2 * r / (x + r))).sum()) / 2 for x in (p, q)
            ),
            "l2": tuple(np.sqrt(((x - donor) ** 2).sum()) for x in (logits, base)),
            "mse": tuple(((x - donor) ** 2).mean() for x in (logits, base)),
            "cosine": tuple(1 - x @ donor / np.sqrt((x @ x) * (donor @ donor)) for x in (logits, base)),
        }
        for kind, (here, before) in distances.items():
            cell = dataset[f"recovery_{kind}"].sel(layer=layer).squeeze()
            assert float(cell) == pytest.approx(float((before - here) / before * 100), abs=0.02), kind
        difference_recovery = (logits[4] - logits[9] - base[4] + base[9]) / (donor[4] - donor[9] - base[4] + base[9])
        cell = dataset["recovery_logit_diff"].sel(layer=layer).squeeze()
        assert float(cell) == pytest.approx(100 * difference_recovery, abs=0.02)
    assert dataset["recovery_kl"].attrs["units"] == "%"
    assert "(base - patched) / base" in dataset["recovery_kl"].attrs["method"]
    assert "(patched - base) / (donor - base)" in dataset["recovery_entropy"].attrs["method"]


def test_answers_of_several_tokens(which: Both) -> None:
    """A continuation takes each pair's answer, of one token or more; each pair is measured over its own."""
    pairs = [{**PAIR, "answer": "w4 w9 w33", "distractor": None}, {**PAIR, "answer": "w7"}]
    found = activation_patching(which.model, pairs, components="z", positions="4:", metric="cross_entropy")
    values = found["effects/z"]["cross_entropy"]
    kept = which.reference.values(CLEAN, [("z", 1)])["z", 1]
    edit = Edit("z", 1, replacing(kept, [5], None))
    for pair, tokens in enumerate([[4, 9, 33], [7]]):
        for run, edits in ((values.sel(pair=pair, layer=1, position=5), [edit]), (found["baseline"]["cross_entropy_corrupt"][pair], [])):
            logits = which.reference.logits([*CORRUPT, *tokens[:-1]], edits)
            exact = -np.mean([by_hand(logits[LENGTH - 1 + step], token) for step, token in enumerate(tokens)])
            assert float(run) == pytest.approx(float(exact), abs=1e-4)


def mean_logit(logits: torch.Tensor) -> torch.Tensor:
    """A metric of one's own."""
    return logits.mean(dim=1)


@pytest.mark.parametrize("form", ["npy", "safetensors", "pt", "numbers", "metric"])
def test_projections_and_functions_in_a_recipe(form: str, tmp_path: Path) -> None:
    which = both("llama")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    direction: Any = str(tmp_path / f"d.{form}")
    if form == "npy":
        np.save(direction, vector.numpy())
    elif form == "pt":
        torch.save({"refusal": vector, "other": vector[:3]}, direction)
        direction = {"path": direction, "key": "refusal"}
    elif form == "safetensors":
        from safetensors.torch import save_file

        save_file({"direction": vector}, direction)
    else:
        direction = vector.tolist()
    chosen: Any = {"kind": "projection", "layer": 2, "direction": direction, "position": 7}
    if form == "metric":
        chosen = metrics.projection(vector, 2, position="7")
    found = activation_patching(
        which.model, PAIR, components="attn_out", metric=[chosen, f"{__name__}:mean_logit"], out=tmp_path / "x.zarr"
    )
    dataset = found["effects/attn_out"].to_dataset()
    kept = which.reference.values(CLEAN, [("attn_out", 1)])["attn_out", 1]
    for position in (4, 7, 8):
        edit = Edit("attn_out", 1, replacing(kept, [position], None))
        state = which.reference.values(CORRUPT, [("resid_post", 2)], [edit])["resid_post", 2][7].reshape(-1)
        exact = float(state @ vector.double() / vector.double().norm())
        cell = dataset.sel(layer=1, position=position)
        assert float(cell["projection"].squeeze()) == pytest.approx(exact, abs=1e-4)
        logits = which.reference.logits(CORRUPT, [edit])
        assert float(cell["mean_logit"].squeeze()) == pytest.approx(float(logits[-1].mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"kind": "projection", "layer": 1, "direction": "nowhere.npy"}, "does not exist"),
        ({"kind": "projection", "layer": 1, "direction": "two.pt"}, "name one with key"),
        ({"kind": "projection", "layer": 1, "direction": {"path": "two.pt", "key": "c"}}, "no tensor 'c'"),
        ({"kind": "projection", "layer": 1, "direction": {"path": "two.pt", "key": "b"}}, "shape"),
        ({"kind": "projection", "layer": 1, "direction": "wrong.npy"}, "cannot read"),
        ({"kind": "projection", "layer": 1, "direction": "text.txt"}, "npy"),
        ({"kind": "projection", "direction": [1.0]}, "needs a layer"),
        ({"kind": "projection", "layer": -1, "direction": [1.0]}, "greater than or equal to 0"),
        ({"kind": "function", "function": "spread"}, "module:function"),
        ({"kind": "kl", "name": "effect_kl"}, "is taken"),
    ],
    ids=str,
)
def test_metrics_that_cannot_be_meant(
    metric: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 3)}, "two.pt")
    Path("wrong.npy").write_bytes(b"no array")
    Path("text.txt").write_text("1 2 3")
    with pytest.raises((nsp.InputError, ValueError), match=message):
        ActivationPatchingRecipe.model_validate({"kind": "activation-patching", "pairs": [PAIR], "metric": metric})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"together": ["layer"]}, "all layers are patched together"),
        ({"components": ["embed"]}, "no layers to add up"),
        ({"sites": ["module:model.layers.1.mlp @ last"]}, "no layers to add up"),
    ],
)
def test_cumulative_recipes_that_cannot_be_meant(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationPatchingRecipe.model_validate({"kind": "activation-patching", "pairs": [PAIR], "cumulative": True, **keys})


# Files of pairs


ROWS = [
    {"good": "w1 w2 w3", "bad": "w1 w5 w3", "right": "w7", "wrong": "w8", "who": "w2", "whom": "w5", "id": "first"},
    {"good": "w4 w2 w6", "bad": "w4 w9 w6", "right": "w7", "wrong": "w10", "who": "w2", "whom": "w9", "id": "second"},
]
COLUMNS = {"clean": "good", "corrupt": "bad", "answer": "right", "distractor": "wrong", "name": "id"}
COLUMNS |= {"span_subject_clean": "who", "span_subject_corrupt": "whom"}


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_files_with_columns_of_other_names(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        mark = {"csv": ",", "tsv": "\t"}[ending]
        path.write_text("\n".join([mark.join(ROWS[0]), *(mark.join(row.values()) for row in ROWS)]))
    of = both("llama").model
    found = activation_patching(of, {"path": str(path), "columns": COLUMNS}, positions="subject")
    given = [
        {
            "clean": row["good"],
            "corrupt": row["bad"],
            "answer": row["right"],
            "distractor": row["wrong"],
            "spans": {"subject": {"clean": row["who"], "corrupt": row["whom"]}},
        }
        for row in ROWS
    ]
    same = activation_patching(of, given, positions="subject")
    np.testing.assert_array_equal(found["effects/resid_post"]["effect"], same["effects/resid_post"]["effect"])
    assert found["effects/resid_post"]["token_position"].values.tolist() == [[1], [1]]
    assert found["inputs"]["pair_name"].values.tolist() == ["first", "second"]


def test_a_column_that_pairs_do_not_have(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("a,b\nw1,w2\n")
    file = {"path": str(tmp_path / "p.csv"), "columns": {"cleen": "a"}}
    with pytest.raises(ValueError, match="'cleen' is no column of pairs; there are clean, corrupt"):
        ActivationPatchingRecipe.model_validate({"kind": "activation-patching", "pairs": file})


def test_failing_items_of_a_file_can_be_left_out(tmp_path: Path) -> None:
    """By default the first one stops the run; left out, they are counted and named."""
    path = tmp_path / "pairs.csv"
    path.write_text("clean,corrupt,answer,distractor\nw1 w2,w1 w3,w4,w5\nw1 w2,w1 w3,w4 w6,w5\nw7 w2,w7 w3,w4,w4\n")
    of = both("llama").model
    with pytest.raises(nsp.InputError, match=r"pairs.csv:3: answer 'w4 w6' is 2 tokens"):
        activation_patching(of, str(path))
    found = activation_patching(of, {"path": str(path), "failing": "leave-out"})
    assert found["inputs"].sizes["pair"] == 1
    assert found["inputs"].attrs["left_out"] == 2
    said = nsp.experiments.report(found)
    assert "2 item(s) failed the token checks and were left out: 'w1 w2': " in said
    assert "pairs.csv:4: answer and distractor are the same token" in said
    path.write_text("clean,corrupt,answer\nw1 w2,w1 w3,w4 w6\n")
    with pytest.raises(nsp.InputError, match="no pair is left"):
        activation_patching(of, {"path": str(path), "failing": "leave-out"}, metric="logit")


# The one call


def test_recovery_of_each_layer(which: Both, tmp_path: Path) -> None:
    found = layer_recovery(which.model, text(CLEAN), text(CORRUPT), component="mlp_out", plot=tmp_path / "x.png")
    assert found.dims == ("layer",)
    assert found.attrs["units"] == "%"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    base, donor = (which.reference.logits(ids)[-1] for ids in (CORRUPT, CLEAN))
    log_r = torch.log_softmax(donor, -1)

    def kl(logits: torch.Tensor) -> float:
        return float((log_r.exp() * (log_r - torch.log_softmax(logits, -1))).sum())

    for layer in range(LAYERS):
        here = kl(patched(which, "mlp_out", [layer], [LENGTH - 1])[-1])
        assert float(found.sel(layer=layer)) == pytest.approx((kl(base) - here) / kl(base) * 100, abs=0.02)
    whole = layer_recovery(which.model, text(CLEAN), text(CORRUPT), positions="all")
    np.testing.assert_allclose(whole, 100, atol=1e-2)
    layers = layer_recovery(
        which.model, text(CLEAN), text(CORRUPT), component="attn_out", metric="logit_diff", answer="w4", distractor="w9",
        cumulative=True, mode="noising",
    )  # fmt: skip
    kept = which.reference.values(CORRUPT, [("attn_out", layer) for layer in range(LAYERS)])
    edits = [Edit("attn_out", layer, replacing(kept["attn_out", layer], [LENGTH - 1], None)) for layer in range(LAYERS)]
    start, goal = difference(which.reference.logits(CLEAN)), difference(which.reference.logits(CORRUPT))
    exact = (difference(which.reference.logits(CLEAN, edits)) - start) / (goal - start) * 100
    assert float(layers[-1]) == pytest.approx(exact, abs=0.02)


def test_the_report_of_layers_is_their_recovery() -> None:
    found = activation_patching(
        both("llama").model, PAIR, components=["attn_out", "mlp_out"], together=["position"], metric="kl"
    )
    said = nsp.experiments.report(found)
    assert "recovery of kl by layer, in percent" in said
    value = float(found["effects/mlp_out"]["recovery_kl"].sel(layer=1).squeeze())
    assert f"{value:.1f}" in said.partition("in percent")[2].splitlines()[3]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"plot": "x.bmp"}, "does not end in"),
        ({"plot": True}, "needs a notebook or a display"),
        ({"metric": ["kl", "js"]}, "one metric"),
        ({"mode": "interchange"}, "denoising or noising"),
    ],
)
def test_calls_that_cannot_be_meant(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(nsp.InputError, match=message):
        layer_recovery(both("llama").model, text(CLEAN), text(CORRUPT), **keys)


def test_a_notebook_shows_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    shown: list[Any] = []
    display = SimpleNamespace(display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object, display=display, version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    activation_patching(both("llama").model, [PAIR, PAIR], components="z", heads="all", positions="last", plot=True)
    (figure,) = shown
    assert figure._repr_png_().startswith(b"\x89PNG")
