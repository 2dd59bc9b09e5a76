"""A bias scan on Ray workers: its last stages take what the store holds, whoever computed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine_models as tiny
import numpy as np
import pytest
from ndif_server import checkpoint

import nsp
from nsp.backends.options import backend_options
from nsp.experiments import EXPERIMENTS, ray_workers, runner
from nsp.experiments.experiment import Unit
from nsp.experiments.kinds import RECIPES
from nsp.recipe import load_recipe_file
from nsp.stores import open_run

pytest.importorskip("ray")

KIND, NEURON, REMOVED = "bias-scan", 7, 100.0
PROMPTS = 2 * 6


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two blocks of prompts, what was found in them, and its ablation."""
    monkeypatch.chdir(tmp_path)  # workers look for modules in the driver's directory first
    rng = np.random.default_rng(0)
    texts = [tiny.text(rng.integers(0, 58, 5).tolist()) for _ in range(PROMPTS)]
    keys = {
        "kind": KIND,
        "models": {"aligned": {"name": str(checkpoint(tmp_path / "weights")), "device": "cpu", "dtype": "float32"}},
        "ablate": "mlp_neurons[1][2,5,11] @ *",
        "pairs": [{"more": more, "less": less} for more, less in zip(texts[::2], texts[1::2], strict=True)],
        "components": "mlp_out",
        "neurons": {"top": 3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(keys))
    return path


def test_two_workers_go_on_from_what_is_stored(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored scan says of one neuron what no model would; so whoever computed the scan again would not find it."""
    (item,) = load_recipe_file(recipe, ["backend=ray"], kinds=RECIPES)
    options = item.recipe.model
    model = nsp.load(options.name, **options.model_dump(exclude={"name"}))
    kind, out = EXPERIMENTS[KIND], tmp_path / "scan.zarr"
    compute = kind.compute

    def doctored(self: Any, unit: Unit, *rest: Any) -> Any:
        values = compute(self, unit, *rest)
        if "circuit/found" in values:
            raise KeyboardInterrupt
        if "effects/mlp_neurons" in values:
            values["effects/mlp_neurons"]["delta_kl"][:, NEURON] = -REMOVED
        return values

    monkeypatch.setattr(kind, "compute", doctored)
    with pytest.raises(KeyboardInterrupt):
        runner.run(kind(model, item.recipe), out=out, progress=False)
    monkeypatch.setattr(kind, "compute", compute)
    assert np.isnan(open_run(str(out)).tree["circuit/found"]["removed"]).all()

    spread = ray_workers.spread_over(item.resolved, backend_options({"kind": "ray", "workers": 2}))
    tree = runner.run(kind(model, item.recipe), out=out, progress=False, spread=spread).tree
    assert open_run(str(out)).state == "complete"
    found = tree["circuit/found"]
    patched = int((tree["effects/mlp_neurons"]["neuron_layer"] >= 0).sum())
    assert (int(found["layer_of"][0]), int(found["neuron_of"][0])) == (1, NEURON)
    assert float(found["removed"][0]) == pytest.approx(REMOVED * patched / PROMPTS)
    assert np.isfinite(tree["effects/ablation"]["kl"]).all()
