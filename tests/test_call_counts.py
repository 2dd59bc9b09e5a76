"""How much Python one counterfactual takes inside nsp: small sweeps are bound by it, not by arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import nsp

INSIDE = str(Path(nsp.__file__).parent)
# Half of the 1,485 calls that it took before requests were planned into branches.
MOST = 742


@pytest.mark.parametrize("site", ["resid_post[3] @ 2", "resid_post[3] @ 9", "resid_post[3] @ last"])
def test_a_sweep_of_one_cell_takes_few_calls(smollm2: nsp.Model, site: str) -> None:
    """Calls of functions, generators and comprehensions whose code lies under nsp, once everything is loaded and checked."""

    def sweep() -> None:
        with smollm2.trace("When Mary and John went to the store, Mary gave a drink to") as t:
            t.sweep(nsp.patch(site, donor="When Mary and John went to the store, John gave a drink to"))
            t.measure(nsp.logit_diff(" Mary", " John"))

    sweep()
    calls = 0

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(INSIDE)

    sys.setprofile(count)
    try:
        sweep()
    finally:
        sys.setprofile(None)
    assert calls <= MOST
