"""On a model's first use: the branch path against the plain one, on a short prompt.

A model whose branch path differs by more than its dtype explains falls back to the plain path, with a warning that
says so. One whose joint pass does (see `nsp.engine.joint`) runs bases and donors before their branches.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.budget import Budget
from nsp.engine.joint import run_joint
from nsp.engine.runtime import Runtime
from nsp.engine.sweep import PromptDonors, Request, run_request
from nsp.errors import BackendError
from nsp.interventions import patch
from nsp.metrics import Metric

# Allowed difference of a logit, relative to the spread of the logits, by dtype.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 0.1, torch.float16: 0.02}
_LENGTH = 7


def ensure_checked(runtime: Runtime) -> None:
    """Run the check once for a model; afterwards ``runtime.branch_refusal`` says whether the branch path may be used,
    and ``runtime.joint`` whether one pass may hold everything.
    """
    if runtime.branch_checked or runtime.branch_refusal:
        return
    runtime.branch_checked = True
    joint, runtime.joint = runtime.joint, False
    try:
        plain, branch = _small_sweeps(runtime, "plain"), _small_sweeps(runtime, "branch")
    except BackendError:
        runtime.branch_checked, runtime.joint = False, joint
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
        elif joint:
            runtime.joint = _joint_agrees(runtime, plain, allowed)
    if runtime.branch_refusal:
        warnings.warn(f"sweeps take the plain path: {runtime.branch_refusal}", RuntimeWarning, stacklevel=2)


def _joint_agrees(runtime: Runtime, plain: np.ndarray, allowed: float) -> bool:
    """Whether the joint pass runs on this model and gives what the plain path gives; the other passes do without it."""
    runtime.joint = True
    try:
        return float(np.nanmax(np.abs(_small_sweeps(runtime, "joint") - plain))) <= allowed
    except Exception:  # whatever a model's code refuses
        return False


def _small_sweeps(runtime: Runtime, path: str) -> np.ndarray:
    """The logits of a few small sweeps by one path (``joint``: the branch path, all in one pass), in one order; NaN where
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
    token = torch.tensor([[base[0]]])
    request = Request(
        bases=(prompts[0],),
        swept=(patch(site, donor=prompts[1]),),
        axes=("layer", "position"),
        donors=(PromptDonors((prompts[1],)),),
        metrics=(Metric("logit", (base[0],)),),
        tokens=(token,),
        path="branch" if path == "joint" else path,
    )
    budget = Budget.of(None, runtime.device)
    if path == "joint":
        outcome = run_joint(runtime, request, budget, "", at_any_cost=True)
        assert outcome is not None, "a sweep of so few tokens fits one pass"
        return outcome.values[0]
    return run_request(runtime, request, budget).values[0]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[-1][:160] if text else "no message"
