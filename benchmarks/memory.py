"""The planner's memory estimate against what a run really takes, one fresh process a sweep.

    python benchmarks/memory.py

Prints, for several sweeps, the estimate that ``--dry-run`` shows and the growth of the process's peak resident memory
over the loaded model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

from rich.console import Console
from rich.table import Table

SWEEPS = {
    "resid_post, 14 tokens": ("resid_post[*] @ *", 1, 0, None),
    "z by head, 14 tokens": ("z[*][*] @ *", 1, 0, None),
    "mlp_neurons, 6 layers": ("mlp_neurons[:6][*] @ -1", 1, 0, None),
    "mlp_neurons, 6 layers, budget 200 MB": ("mlp_neurons[:6][*] @ -1", 1, 0, "200MB"),
    "resid_post, 512 tokens, last 32": ("resid_post[::3] @ -32:", 1, 498, None),
    "attn_out, 16 pairs": ("attn_out[*] @ *", 16, 0, None),
    "resid_post, 14 tokens, plain path": ("resid_post[::10] @ *", 1, 0, "plain"),
}


def measure(name: str) -> dict[str, float]:
    """Run one sweep in this process: its estimate and the growth of peak memory, in bytes."""
    import torch

    import nsp
    from nsp.engine.selfcheck import ensure_checked
    from nsp.trace import Trace

    site, count, filler, memory = SWEEPS[name]
    path = "plain" if memory == "plain" else "auto"
    model = nsp.load("smollm2")
    ensure_checked(model.runtime)
    base = model.encode("Then Mary and John went to the store, Mary gave a drink to").token_ids
    donor = model.encode("When Mary and John went to the store, John gave a drink to").token_ids
    extra = [100 + place % 5000 for place in range(filler)]
    prompts = [[200 + number, *extra, *base] for number in range(count)]
    donors = [[200 + number, *extra, *donor] for number in range(count)]

    def trace() -> Trace:
        made = model.trace(prompts, path=path, memory=None if memory == "plain" else memory)
        made.sweep(nsp.patch(site, donor=donors))
        made.measure(nsp.logit_diff(" Mary", " John"))
        return made

    schedule = trace().dry_run().schedule
    assert schedule is not None
    with torch.no_grad():  # the loaded model's pages, and the allocator's first blocks
        model.module(torch.tensor([base]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trace().run()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"estimate": schedule.bytes, "measured": after - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    table = Table("sweep", "estimate MB", "measured MB", "estimate / measured")
    for name in SWEEPS:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        ratio = found["estimate"] / max(1.0, found["measured"])
        table.add_row(name, f"{found['estimate'] / 1e6:.0f}", f"{found['measured'] / 1e6:.0f}", f"{ratio:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
