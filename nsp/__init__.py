"""nsp: which internal part of a language model caused this output? Patch, inject and ablate, exactly and fast.

    import nsp

    model = nsp.load("smollm2")
    with model.trace(corrupt) as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor=clean))
        t.measure(nsp.logit_diff(" Mary", " John"))
    t.results["effect"]

Names are imported when they are first used, so that ``import nsp`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsp import experiments as experiments
    from nsp.datasets.pairs import Pair as Pair
    from nsp.datasets.pairs import pair as pair
    from nsp.engine.plan import Plan as Plan
    from nsp.errors import InputError as InputError
    from nsp.errors import NspError as NspError
    from nsp.experiments.features import find_feature as find_feature
    from nsp.experiments.features import steer as steer
    from nsp.interventions import Noise as Noise
    from nsp.interventions import ablate as ablate
    from nsp.interventions import apply as apply
    from nsp.interventions import inject as inject
    from nsp.interventions import patch as patch
    from nsp.interventions import scale as scale
    from nsp.metrics import Metric as Metric
    from nsp.metrics import cosine as cosine
    from nsp.metrics import cross_entropy as cross_entropy
    from nsp.metrics import entropy as entropy
    from nsp.metrics import from_function as from_function
    from nsp.metrics import js as js
    from nsp.metrics import kl as kl
    from nsp.metrics import kl_reverse as kl_reverse
    from nsp.metrics import l2 as l2
    from nsp.metrics import log_odds as log_odds
    from nsp.metrics import logit as logit
    from nsp.metrics import logit_diff as logit_diff
    from nsp.metrics import logprob as logprob
    from nsp.metrics import mse as mse
    from nsp.metrics import prob as prob
    from nsp.metrics import projection as projection
    from nsp.metrics import rank as rank
    from nsp.metrics import rank_change as rank_change
    from nsp.metrics import top1 as top1
    from nsp.metrics import top1_change as top1_change
    from nsp.model import Model as Model
    from nsp.model import load as load
    from nsp.sites import Site as Site
    from nsp.stores import open_run as open_run
    from nsp.trace import Trace as Trace

__version__ = "0.1.0"

_HOMES = {
    "nsp.datasets.pairs": ("Pair", "pair"),
    "nsp.engine.plan": ("Plan",),
    "nsp.errors": ("InputError", "NspError"),
    "nsp.experiments.features": ("find_feature", "steer"),
    "nsp.interventions": ("Noise", "ablate", "apply", "inject", "patch", "scale"),
    "nsp.metrics": (
        "Metric", "cosine", "cross_entropy", "entropy", "from_function", "js", "kl", "kl_reverse", "l2", "log_odds", "logit",
        "logit_diff", "logprob", "mse", "prob", "projection", "rank", "rank_change", "top1", "top1_change",
    ),
    "nsp.model": ("Model", "load"),
    "nsp.sites": ("Site",),
    "nsp.stores": ("open_run",),
    "nsp.trace": ("Trace",),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
# What comes through these names makes results, which answer to ``.nsp``.
_MAKE_RESULTS = ("nsp.model", "nsp.stores", "nsp.trace")
__all__ = sorted([*_HOME_OF, "__version__", "experiments"])


def __getattr__(name: str) -> Any:
    if name == "experiments":
        return importlib.import_module("nsp.experiments")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'nsp' has no attribute {name!r}")
    found = getattr(importlib.import_module(home), name)
    if home in _MAKE_RESULTS:
        _attach()
    return found


def _attach() -> None:
    """Give xarray's datasets and trees the attribute ``nsp``; its first use imports `nsp.experiments`, which takes a while."""
    import xarray as xr

    if not hasattr(xr.Dataset, "nsp"):
        xr.register_datatree_accessor("nsp")(_results)  # type: ignore[no-untyped-call]
        xr.register_dataset_accessor("nsp")(_results)  # type: ignore[no-untyped-call]


def _results(given: Any) -> Any:
    return importlib.import_module("nsp.experiments.accessor").Results(given)


def __dir__() -> list[str]:
    return __all__
