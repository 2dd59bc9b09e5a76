"""On a model's first use: the branch path against the plain one, on a short prompt.

A model whose branch path differs by more than its dtype explains falls back to the plain path, with a warning that
says so.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.budget import Budget
from nsp.engine.runtime import Runtime
from nsp.engine.sweep import PromptDonors, Request, run_request
from nsp.errors import BackendError
from nsp.interventions import patch
from nsp.metrics import Metric

# Allowed difference of a logit, relative to the spread of the logits, by dtype.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 0.1, torch.float16: 0.02}
_LENGTH = 7


def ensure_checked(runtime: Runtime) -> None:
    """Run the check once for a model; afterwards ``runtime.branch_refusal`` says whether the branch path may be used.
    """
    if runtime.branch_checked or runtime.branch_refusal:
        return
    runtime.branch_checked = True
    try:
        difference, spread = compare_paths(runtime)
    except BackendError:
        runtime.branch_checked = False
        raise
    except Exception as error:
        # Whatever a model's code refuses (a mask of four axes, a cache that is filled from outside) is a reason, not
        # a failure.
        runtime.branch_refusal = (
            f"the branch path does not run on this model ({type(error).__name__}: {_first_line(error)})"
        )
    else:
        allowed = _TOLERANCE.get(runtime.dtype, 1e-2) * max(spread, 1.0)
        if not difference <= allowed:
            runtime.branch_refusal = (
                f"the self-check found a difference of {difference:.2g} logits between the branch path and the plain path "
                f"(allowed {allowed:.2g} in {str(runtime.dtype).removeprefix('torch.')})"
            )
    if runtime.branch_refusal:
        warnings.warn(f"sweeps take the plain path: {runtime.branch_refusal}", RuntimeWarning, stacklevel=2)


def compare_paths(runtime: Runtime) -> tuple[float, float]:
    """Largest difference of a logit over a small sweep, and the spread of the plain path's values."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = runtime.geometry.vocab_size
    base, donor = (
        torch.randint(vocabulary // 4, vocabulary // 2, (_LENGTH,), generator=generator).tolist() for _ in "ab"
    )
    layers = sorted({0, runtime.geometry.n_layers // 2, runtime.geometry.n_layers - 1})
    # Branches of several lengths, so that some share a row: biases and windows that count columns then show.
    sites = [f"resid_pre[{','.join(map(str, layers))}] @ 0,3,4,5", f"k[{layers[0]}] @ 2"]
    differences, values = [], []
    for site in sites:
        if site.split("[")[0] not in runtime.geometry.components():
            continue
        found = [_values(runtime, site, base, donor, path) for path in ("branch", "plain")]
        differences.append(float(np.nanmax(np.abs(found[0] - found[1]))))
        values.append(found[1])
    stacked = np.concatenate([value[np.isfinite(value)] for value in values])
    return max(differences), float(stacked.std())


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
        path=path,
    )
    return run_request(runtime, request, Budget.of(None, runtime.device)).values[0]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[-1][:160] if text else "no message"
