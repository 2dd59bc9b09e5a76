"""On a model's first use: the branch path against the plain one, on a short prompt.

A model whose branch path differs by more than its dtype explains falls back to the plain path, with a warning that
says so. One whose shared pass does (see `nsp.engine.shared_pass`) runs bases and donors before their branches.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine import shared_pass
from nsp.engine.budget import Budget
from nsp.engine.measuring import measure, pass_plan
from nsp.engine.pack import Pass
from nsp.engine.planning import plan
from nsp.engine.readout import readout_at
from nsp.engine.recording import record
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.errors import BackendError, InputError
from nsp.interventions import patch
from nsp.metrics import Metric
from nsp.models.geometry import text_config
from nsp.models.tables import INFERRED

# Allowed difference of a logit, relative to the spread of the logits, by dtype.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 0.1, torch.float16: 0.02}
_LENGTH = 7


def ensure_checked(runtime: Runtime) -> None:
    """Run the check once for a model; afterwards ``runtime.branch_refusal`` says whether the branch path may be used,
    and ``runtime.shares_pass`` whether one pass may hold everything.
    """
    if runtime.branch_checked or runtime.branch_refusal:
        return
    runtime.branch_checked = True
    before, runtime.shares_pass = runtime.shares_pass, False
    try:
        plain, branch = _small_sweeps(runtime, "plain"), _small_sweeps(runtime, "branch")
    except BackendError:
        runtime.branch_checked, runtime.shares_pass = False, before
        raise
    except Exception as error:
        # Whatever a model's code refuses (a mask of four axes, a cache that is filled from outside) is a reason, not
        # a failure.
        runtime.branch_refusal = (
            f"the branch path does not run on this model ({type(error).__name__}: {_first_line(error)})"
        )
    else:
        difference = float(np.nanmax(np.abs(branch - plain)))
        allowed = _TOLERANCE.get(runtime.dtype, 1e-2) * max(float(np.nanstd(plain)), 1.0)
        if not difference <= allowed:
            runtime.branch_refusal = (
                f"the self-check found a difference of {difference:.2g} logits between the branch path and the plain path "
                f"(allowed {allowed:.2g} in {str(runtime.dtype).removeprefix('torch.')})"
            )
        elif before:
            runtime.shares_pass = _shared_agrees(runtime, plain, allowed)
    if runtime.branch_refusal:
        warnings.warn(f"sweeps take the plain path: {runtime.branch_refusal}", RuntimeWarning, stacklevel=2)


def check_head(runtime: Runtime) -> None:
    """Compare the logits that nsp computes after the head with those of the model's own forward, on a short prompt.

    A scale that the configuration names is used by some families, divided by in others and left alone in yet others: where
    the site table was inferred, the one that gives the model's own logits is taken.

    Raises InputError where none does: something follows the head that nsp does not know, and no number made of logits
    would be the model's.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, runtime.vocabulary, (_LENGTH,), generator=generator).tolist()
    # Without a cache, as the engine's own whole passes run.
    options = {"use_cache": False} if "use_cache" in inspect.signature(runtime.module.forward).parameters else {}
    with torch.no_grad():
        output = runtime.module(input_ids=torch.tensor([ids], device=runtime.device), **options)
    own = getattr(output, "logits", output[0])[0, -1].float().cpu()
    at = torch.tensor([_LENGTH - 1], device=runtime.device)
    computed = record(runtime, [ids], readout=readout_at(runtime, torch.zeros_like(at), at, logits=True)).logits
    assert computed is not None
    used, allowed = runtime.geometry.logit_scale, _TOLERANCE.get(runtime.dtype, 1e-2) * max(float(own.std()), 1e-3)
    config = text_config(runtime.module.config)
    named = [getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "lm_head_multiplier")]
    scales = [used, 1.0, *(scale for value in named if isinstance(value, int | float) and value for scale in (value, 1 / value))]
    differences = [float((computed[0].cpu() * (scale / used) - own).abs().max()) for scale in scales]
    best = int(np.argmin(differences))
    inferred = runtime.geometry.table.variant == INFERRED and runtime.geometry.softcap is None
    if differences[0] > allowed and inferred and differences[best] <= allowed:
        runtime.geometry = replace(runtime.geometry, logit_scale=float(scales[best]))
    elif differences[0] > allowed:
        raise InputError(
            f"the logits that nsp computes are not the model's own: they differ by up to {differences[0]:.3g} where the model's "
            f"spread is {float(own.std()):.3g}. Something follows the head of {type(runtime.module).__name__} that nsp does not know"
        )


def _shared_agrees(runtime: Runtime, plain: np.ndarray, allowed: float) -> bool:
    """Whether the shared pass runs on this model and gives what the plain path gives; the other passes do without it."""
    runtime.shares_pass = True
    try:
        return float(np.nanmax(np.abs(_small_sweeps(runtime, "shared") - plain))) <= allowed
    except Exception:  # whatever a model's code refuses
        return False


def _small_sweeps(runtime: Runtime, path: str) -> np.ndarray:
    """The logits of a few small sweeps by one path (``shared``: the branch path, all in one pass), in one order; NaN where
    a sweep has no such cell.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = runtime.geometry.vocab_size
    base, donor = (
        torch.randint(vocabulary // 4, vocabulary // 2, (_LENGTH,), generator=generator).tolist() for _ in "ab"
    )
    layers = sorted({0, runtime.geometry.n_layers // 2, runtime.geometry.n_layers - 1})
    # Branches of several lengths, so that some share a row: biases and windows that count columns then show.
    sites = [f"resid_pre[{','.join(map(str, layers))}] @ 0,3,4,5", f"k[{layers[0]}] @ 2"]
    had = runtime.geometry.components()
    values = [_values(runtime, site, base, donor, path) for site in sites if site.split("[")[0] in had]
    return np.concatenate([value.reshape(-1) for value in values])


def _values(runtime: Runtime, site: str, base: list[int], donor: list[int], path: str) -> np.ndarray:
    prompts = [Prompt.from_ids(ids) for ids in (base, donor)]
    request = Request(
        bases=(prompts[0],),
        swept=(patch(site, donor=prompts[1]),),
        axes=("layer", "position"),
        metrics=(Metric("logit", (base[0],)),),
        tokens=(torch.tensor([[base[0]]]),),
        path="branch" if path == "shared" else path,
    )
    branches, budget = plan(runtime, request), Budget.of(None, runtime.device)
    if path != "shared":
        return measure(runtime, branches, budget).values[0]
    (packed,) = pass_plan(runtime, branches, budget)  # a sweep of so few tokens fits one pass
    assert isinstance(packed, Pass)
    pieces = shared_pass.Pieces.of(runtime, branches.bases.run_ids, packed.width)
    return shared_pass.run_pieces(runtime, branches, pieces, packed).measured(1).values[0]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[-1][:160] if text else "no message"
