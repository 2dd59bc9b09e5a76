"""Issue 6 on smollm2: 50 IOI pairs, what is significant, and the shipped recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import one_thread  # noqa: F401
from hooks_reference import Edit, HookedReference, replacing

import nsp
from nsp.experiments import EXPERIMENTS, activation_patching, report, run
from nsp.experiments.activation_patching.statistics import judge
from nsp.recipe import find_recipe, load_recipe_file

KIND = "activation-patching"
STRONG = {(23, 3), (20, 0), (24, 4), (29, 1)}  # by mean effect over the 50 pairs of ioi-set.yaml


def shipped(name: str, out: Path, *settings: str) -> Any:
    (item,) = load_recipe_file(find_recipe(name), [f"out={out}", *settings], kinds={KIND: EXPERIMENTS[KIND].recipe_class})
    return item


def test_the_strongest_heads_are_significant(smollm2: nsp.Model) -> None:
    """On 50 pairs, in the layers that hold them and a few others; all layers are in the slow test below."""
    tree = activation_patching(
        smollm2,
        {"set": "ioi", "size": 50},
        components="z",
        heads="all",
        layers=[14, 16, 18, 20, 23, 24, 27, 29],
        positions="last",
    )
    found = judge(tree)
    significant = found.sites["z"]["significant"].squeeze("position")
    assert all(bool(significant.sel(layer=layer, head=head)) for layer, head in STRONG)
    assert found.null is not None
    assert float(found.null["p"]) < 0.05
    assert int(found.null["controls_significant"]) == 0
    assert "control sets: 0 of 20" in report(tree)


@pytest.mark.slow
def test_ioi_set_as_shipped(smollm2: nsp.Model, tmp_path: Path) -> None:
    item = shipped("ioi-set", tmp_path / "x.zarr")
    tree = run(EXPERIMENTS[KIND](smollm2, item.recipe), out=item.out, progress=False).tree
    found = judge(tree, split=0.5)
    assert found.tested == 270
    significant = found.sites["z"]["significant"].squeeze("position")
    assert all(bool(significant.sel(layer=layer, head=head)) for layer, head in STRONG)
    held = found.held_out["z"].squeeze("position")
    assert all(bool(held["significant"].sel(layer=layer, head=head)) for layer, head in STRONG)
    assert found.null is not None
    assert float(found.null["p"]) < 0.01
    assert int(found.null["controls_significant"]) == 0


def test_layer_recovery_as_shipped(smollm2: nsp.Model, tmp_path: Path) -> None:
    """Three pairs of it, a sample against raw hooks: KL's recovery of a layer's MLP at the last token."""
    item = shipped("layer-recovery", tmp_path / "x.zarr", "pairs.size=3")
    tree = run(EXPERIMENTS[KIND](smollm2, item.recipe), out=item.out, progress=False).tree
    said = report(tree)
    assert "recovery of kl by layer, in percent" in said
    np.testing.assert_allclose(tree["effects/resid_post"]["recovery_kl"].sel(layer=29), 100, atol=0.1)
    hooks = HookedReference(smollm2.module)
    inputs = tree["inputs"].to_dataset().isel(pair=1)
    ids = {run: [int(t) for t in inputs[f"token_id_{run}"].values if t >= 0] for run in ("clean", "corrupt")}
    kept = hooks.values(ids["clean"], [("mlp_out", 25)])["mlp_out", 25]
    edit = Edit("mlp_out", 25, replacing(kept, [len(ids["corrupt"]) - 1], None))
    donor, base, patched = (
        hooks.logits(prompt, edits)[-1].log_softmax(-1)
        for prompt, edits in ((ids["clean"], []), (ids["corrupt"], []), (ids["corrupt"], [edit]))
    )
    distances = [float((donor.exp() * (donor - one)).sum()) for one in (base, patched)]
    exact = (distances[0] - distances[1]) / distances[0] * 100
    found = float(tree["effects/mlp_out"]["recovery_kl"].isel(pair=1).sel(layer=25).squeeze())
    assert found == pytest.approx(exact, abs=0.05)
