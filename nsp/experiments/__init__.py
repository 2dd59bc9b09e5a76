"""Experiments: a package each. What is named here is imported when it is first used.

The package of a kind can be called, which runs the experiment: ``nsp.experiments.contrast(model, ...)``. What type checkers
and editors see is the stub beside this file, made from the recipe classes (``python tests/door_stubs.py --write``).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_HOMES = {
    "accessor": ("report",),
    "activation_patching.layer_recovery": ("layer_recovery",),
    "attribution.discovery": ("discover",),
    "capture.summary": ("top_examples", "unit_statistics"),
    "contrast.vectors": ("control_vectors",),
    "feature_store": ("FeatureStore",),
    "html_report": ("report_page",),
    "lens.tuned": ("load_tuned_lens", "train_tuned_lens"),
    "experiment": ("Experiment",),
    "registry": ("EXPERIMENTS",),
    "runner": ("run",),
}
# Doors that are not named like their kind, each with that kind.
_DOORS = {
    "find_direction": "direction", "logit_lens": "lens", "patchscope_lens": "lens", "tuned_lens": "lens",
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
# Modules and packages that are named here themselves; most of them are kinds, and can be called.
_MODULES = (
    "activation_patching", "alignment_scan", "attribution", "bias_scan", "capture", "causal_tracing", "contrast",
    "logit_attribution", "mean_activations", "pairs", "patchscope", "path_patching", "steering",
)  # fmt: skip
__all__ = sorted([*_DOORS, *_HOME_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"nsp.experiments.{name}")
    if name in _DOORS:
        return importlib.import_module("nsp.experiments.functions").door(name, _DOORS[name])
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"nsp.experiments.{_HOME_OF[name]}"), name)
    registry = sys.modules.get("nsp.experiments.registry")  # a kind that is no part of nsp is known once it is imported
    if registry is not None and name.replace("_", "-") in registry.EXPERIMENTS:
        return importlib.import_module("nsp.experiments.functions").door(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if "xarray" in sys.modules:  # results that are opened by xarray itself answer to ``.nsp``
    importlib.import_module("nsp.experiments.accessor")
