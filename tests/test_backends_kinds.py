"""Every kind of experiment on a server that has no nsp: its store is that of a local run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import engine_models as tiny
import numpy as np
import pytest
import torch
from direction_models import OPTIONS as DIRECTION
from direction_models import prompts as direction_prompts
from engine_models import one_thread  # noqa: F401
from ndif_server import Double, without_self_check

from nsp.cli.app import main
from nsp.experiments import EXPERIMENTS
from nsp.stores import diff, open_run

LONG, SHORT = [tiny.text(ids) for ids in (tiny.CLEAN, tiny.CORRUPT)], [tiny.text([3, 1, 4, 1]), tiny.text([3, 9, 4, 2])]
TEXTS = [*LONG, *SHORT, tiny.text([7, 8, 20, 33, 2, 41]), tiny.text([12, 30, 9, 9, 5])]
PAIR = {"clean": LONG[0], "corrupt": LONG[1], "answer": "w7", "distractor": "w9"}
SETS = {"positive": TEXTS[:3], "negative": TEXTS[3:]}

# Recipes by kind, each by what it tries. `base` and `aligned` stand for two sets of weights.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "activation-patching": {
        "sites": {"pairs": [PAIR], "components": ["resid_post", "attn_out"], "metric": ["logit_diff", "kl"]},
        "heads": {"pairs": [PAIR], "components": ["z"], "heads": "all", "positions": "last", "mode": "interchange"},
    },
    "alignment-scan": {"own prompts": {"harmful_txt": TEXTS[:3] * 3, "normal_txt": TEXTS[3:] * 3, "sigma": 0.5}},
    "attribution": {
        "neurons": {
            "prompts": [{"prompt": LONG[0], "answer": "w7", "distractor": "w9"}],
            "methods": ["atp", "atp_ig", "eap_ig", "grad_x_act", "relp"],
            "donor": "mean",
            "reference": LONG,
            "reference_over": "end",
            "select": {"method": "relp", "top_k": 5},
            "verify": {"exact": "all", "ablations": ["mean", "resample"], "draws": 2, "curve_draws": 1},
        },
        "heads and edges": {
            "prompts": [{"prompt": LONG[0], "answer": "w7", "distractor": "w9", "donor": LONG[1]}],
            "components": ["z"],
            "methods": ["relp", "edge"],
            "positions": "all",
            "donor": "counterfactual",
        },
    },
    "bias-scan": {
        "an ablation": {"ablate": ["mlp_neurons[1] @ *"], "ablation": "mean", "neurons": {"top": 3}},
        "two models": {"models": {"aligned": "aligned", "base": "base"}, "neurons": {"top": 3}, "patch": "single"},
    },
    "capture": {
        "values": {"prompts": TEXTS},
        "summary": {"prompts": TEXTS, "components": ["z", "resid_post"], "keep": "summary"},
    },
    "causal-tracing": {
        "facts": {
            "facts": [{"prompt": "w5 w11 w23 w7 w40 w31 w3", "subject": "w23 w7", "answer": "w4"}],
            "known_only": False,
            "noise": {"scale": 1.5, "of": "subjects", "draws": 2},
            "window": 2,
        }
    },
    "contrast": {"sets": {**SETS, "resamples": 20}, "pca": {**SETS, "paired": True, "vectors": "pca", "resamples": 20}},
    "direction": {
        "replies": {
            "positive": direction_prompts(8, 50, 1),
            "negative": direction_prompts(8, None, 2),
            "behaviour": {"name": "refusal", "openings": ["w51"]},
            **DIRECTION,
            "select": {"max_kl": 100.0, "below": 1.0},
            "patch": {"components": ["resid_post", "z"], "heads": True, "pairs": 2},
        }
    },
    "lens": {
        "logit": {"prompts": LONG, "method": "logit", "tokens": ["w7"]},
        "tuned": {
            "prompts": SHORT,
            "method": "tuned",
            "train": {"text": "text.txt", "sequence": 8, "tokens": 64, "steps": 2},
        },
    },
    "logit-attribution": {
        "parts": {
            "prompts": [{"prompt": LONG[0], "answer": "w7", "distractor": "w9"}],
            "by": ["component", "head", "neuron"],
        }
    },
    "mean-activations": {"tokens": {"prompts": TEXTS}, "prompts": {"prompts": LONG, "over": "prompts"}},
    "patchscope": {
        "texts": {
            "sources": [{"prompt": LONG[0], "strong": ["w1*"]}, {"prompt": LONG[1], "strong": ["w2*"]}],
            "templates": [{"name": "tiny", "prompt": "w7 w8 w9 w3 w10", "expects": "name", "answer": " w12 w13"}],
            "placeholder": "w3",
            "generation": {"max_new_tokens": 3, "stop": False},
        },
        "two models": {
            "sources": [{"prompt": LONG[0], "strong": ["w1*"]}],
            "templates": [{"name": "tiny", "prompt": "w7 w8 w9 w3 w10", "expects": "name", "answer": " w12"}],
            "placeholder": "w3",
            "generation": {"max_new_tokens": 2, "stop": False},
            "source_model": "aligned",
            "map": {"prompts": TEXTS},
        },
    },
    "path-patching": {
        "heads": {
            "pairs": [PAIR],
            "senders": ["z[*][*]", "mlp_out[*]"],
            "receivers": ["logits", "q[2][*]"],
            "metric": "logit_diff",
        }
    },
    "steering": {
        "vector": {"prompts": TEXTS[:2], "vector": {**SETS, "layers": 1}, "decoding": {"max_new_tokens": 4}},
        "neurons": {
            "prompts": SHORT,
            "neurons": ["L1/N3", "L2/N7"],
            "tokens": ["w7"],
            "decoding": {"max_new_tokens": 3},
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny checkpoints, the one a little changed, and pairs of sentences in their words."""
    made = tmp_path_factory.mktemp("kinds")
    base = tiny.module("llama")
    aligned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    for name, module in (("base", base), ("aligned", aligned)):
        module.save_pretrained(made / name)
        tiny.tokenizer().save_pretrained(made / name)
    rng = np.random.default_rng(0)
    rows = [[tiny.text(rng.integers(0, 58, int(size)).tolist()) for size in rng.integers(4, 8, 2)] for _ in range(3)]
    sides = [
        (number, side, one) for number, row in enumerate(rows) for side, one in zip(("more", "less"), row, strict=True)
    ]
    table = ["pair\tlabel\ttext", *(f"{number}\tmade_{side}\t{one}" for number, side, one in sides)]
    (made / "pairs.tsv").write_text("\n".join(table) + "\n")
    (made / "text.txt").write_text(tiny.text(rng.integers(0, 58, 64).tolist()))
    return made


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    without_self_check(monkeypatch.setattr)


def recipe_of(kind: str, case: dict[str, Any], folder: Path) -> Path:
    """The case as a recipe file."""
    keys = copy.deepcopy(case)
    if "models" in keys:
        keys["models"] = {key: str(folder / name) for key, name in keys["models"].items()}
        keys["model"] = {"dtype": "float32"}
    else:
        keys["model"] = {"name": str(folder / "base"), "dtype": "float32"}
    if "source_model" in keys:
        keys["source_model"] = {"name": str(folder / keys["source_model"]), "dtype": "float32"}
    if "train" in keys:
        keys["train"]["text"] = str(folder / keys["train"]["text"])
    if kind == "bias-scan":
        keys["pairs"] = {"path": str(folder / "pairs.tsv")}
    place = folder / f"{kind}.yaml"
    place.write_text(json.dumps({"kind": kind, **keys}))
    return place


def backend(folder: Path, double: Double, **options: Any) -> str:
    names = {str(folder / name): str(folder / name) for name in ("base", "aligned")}
    return json.dumps({"kind": "ndif", "host": double.address, "models": names, **options})


def assert_same(expected: Path, found: Path) -> None:
    compared = diff(str(expected), str(found))
    assert not compared.only_a
    assert not compared.only_b
    for variable in compared.variables:
        # A recovery is in percent; a text counts 1 where it differs.
        limit = 1e-3 if "recovery_" in variable.where else 1e-5
        assert variable.largest <= limit, variable
        assert variable.unmatched == variable.only_a == variable.only_b == 0, variable


@pytest.mark.parametrize("kind", list(EXPERIMENTS))
def test_a_kind_gives_the_local_store(kind: str, folder: Path, double: Double, tmp_path: Path) -> None:
    assert CASES.get(kind), f"{kind}: state a recipe in CASES"
    for name, case in CASES[kind].items():
        recipe = str(recipe_of(kind, case, folder))
        here, there = tmp_path / f"{name} here.zarr", tmp_path / f"{name} there.zarr"
        assert main(["run", recipe, "--out", str(here), "--no-progress"]) == 0
        assert main(["run", recipe, "--out", str(there), "--no-progress", "--backend", backend(folder, double)]) == 0
        assert_same(here, there)
        jobs = open_run(str(there)).header["extra"]["jobs"]
        assert all(job["id"] and job["state"] == "done" for job in jobs)
        assert all(0 < job["sent"] < 200_000 and 0 < job["received"] < 200_000 for job in jobs)
