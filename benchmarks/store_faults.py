"""Kill -9 trials of the stores, as a table. `python benchmarks/store_faults.py --trials 200`

Every figure in the columns after `acknowledged` must be 0. Kill -9 is not power loss: it says nothing about what a
disk loses of what was not synced. Trials run one at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import store_trials

COLUMNS = (
    "trials",
    "killed",
    "acknowledged",
    "unopenable",
    "lost",
    "uncommitted_returned",
    "wrong_after_resume",
    "left_behind",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="nsp-kill-"))
    tallies: dict[tuple[str, str, int], store_trials.Tally] = {}
    started = time.monotonic()
    icechunk = importlib.util.find_spec("icechunk") is not None
    trials = store_trials.plan(options.trials, directory, icechunk=icechunk, seed=options.seed)
    for number, (backend, phase, writers, location, seed) in enumerate(trials):
        found = store_trials.trial(location, phase, writers, seed, store_trials.longest(backend, phase))
        tallies.setdefault((backend, phase, writers), store_trials.Tally()).add(found)
        if found.failures:
            print(f"FAILED, kept at {location} (seed {seed}): {found}", flush=True)
        else:
            path = Path(location.removeprefix("icechunk://"))
            shutil.rmtree(path, ignore_errors=True)
        if (number + 1) % 20 == 0:
            print(f"{number + 1} trials, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    total = store_trials.Tally()
    print("| backend | phase | writers | " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * (3 + len(COLUMNS)))
    for (backend, phase, writers), tally in sorted(tallies.items()):
        total.add(tally)
        print(
            f"| {backend} | {phase} | {writers} | " + " | ".join(str(getattr(tally, name)) for name in COLUMNS) + " |"
        )
    print("| all | | | " + " | ".join(str(getattr(total, name)) for name in COLUMNS) + " |")
    if not total.failures:
        shutil.rmtree(directory, ignore_errors=True)
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
