"""Sweeps by nsp against one hooked transformers forward per site, measured side by side in one process.

    python benchmarks/sweeps.py                      # every row
    python benchmarks/sweeps.py --rows resid,neurons --json rows.json

Each row runs nsp after a warm-up on a small sweep (a sweep of less than two seconds five times, of which the median
counts), then the naive way on a random sample of sites where all of them would take too long, and compares the logit
differences of the sample. ``peak`` is a 2048 x 2048 x 2048 float32 matrix product in the same run. Where TransformerLens
and pyvene are installed (``requirements-peers.txt``), the rows of resid_post have their seconds too, scaled up from a
smaller sample.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from rich.console import Console
from rich.table import Table

import nsp
from nsp.engine.measured import Measured
from nsp.engine.request import Request
from nsp.engine.selfcheck import ensure_checked

ANSWER, DISTRACTOR = " Mary", " John"
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
SAMPLE = 100
PEER_SAMPLE = 10
SHORT, REPEATS = 2.0, 5  # seconds below which a sweep is timed several times


@dataclass
class Row:
    """One measured row: seconds of nsp, of the naive loop over all sites (scaled up from its sample), and what they
    differ by.
    """

    row: str
    branches: int
    nsp_s: float
    naive_s: float
    ratio: float
    max_abs_diff: float
    gflops: float
    peak_share: float
    required: float
    sampled: int
    bound: float  # seconds that the least floating-point work would take at the peak's speed, over nsp_s
    peers: dict[str, dict[str, float]] = field(default_factory=dict)  # library -> seconds, ratio, max_abs_diff


class Bench:
    """A model, its peak, and the two ways of running a sweep."""

    def __init__(self, model: nsp.Model) -> None:
        self.model = model
        self.module = model.module
        ensure_checked(model.runtime)
        self.tokens = [model.tokenizer(text, add_special_tokens=False).input_ids[0] for text in (ANSWER, DISTRACTOR)]
        self.peak = measure_peak(model.loaded.device)
        self.peers = peers.installed() if model.loaded.device.type == "cpu" else {}

    def ids(self, text: str) -> list[int]:
        return list(self.model.encode(text).token_ids)

    def sync(self) -> None:
        if self.model.loaded.device.type == "cuda":
            torch.cuda.synchronize()

    # --- nsp ---

    def sweep(self, name: str, site: str, pairs: Sequence[tuple[list[int], list[int]]], required: float, *, units: bool = False,
              also: Sequence[str] = (), naive: Callable[..., float]) -> Row:  # fmt: skip
        sites = [site, *also]
        requests = [self._request(one, pairs, units) for one in sites]
        engine = self.model.engine
        flop = sum(engine.estimate(engine.plan(request)).flop for request in requests)
        times: list[float] = []
        while not times or (max(times) < SHORT and len(times) < REPEATS):
            self.sync()
            begin = time.perf_counter()
            outcomes = [engine.measure(engine.plan(request)) for request in requests]
            self.sync()
            times.append(time.perf_counter() - begin)
        seconds = float(np.median(times))
        cells = sum(int(np.isfinite(outcome.values[0]).sum()) for outcome in outcomes)
        generator = np.random.default_rng(0)
        count = min(SAMPLE, cells)
        differences, spent = [], 0.0
        for _ in range(count):
            number = int(generator.integers(len(sites)))
            outcome = outcomes[number]
            finite = np.argwhere(np.isfinite(outcome.values[0]))
            base, layer, place, unit = (int(x) for x in finite[generator.integers(len(finite))])
            item = outcome.swept[0]
            at = (item.layers[layer], item.positions[base][place], item.units[unit] if item.units else None)
            self.sync()
            begin = time.perf_counter()
            value = naive(self, sites[number], pairs[base], *at)
            self.sync()
            spent += time.perf_counter() - begin
            differences.append(abs(value - float(outcome.values[0][base, layer, place, unit])))
        each = spent / count
        others = self._peers(outcomes[0], pairs, seconds) if site.startswith("resid_post") else {}
        return Row(name, cells, seconds, each * cells, each * cells / seconds, max(differences), flop / seconds / 1e9,
                   flop / seconds / self.peak, required, count, flop / self.peak / seconds, others)  # fmt: skip

    def _peers(
        self, outcome: Measured, pairs: Sequence[tuple[list[int], list[int]]], nsp_s: float
    ) -> dict[str, dict[str, float]]:
        """The same sweep by other libraries, one site at a time, scaled up from a sample."""
        found = {}
        cells = np.argwhere(np.isfinite(outcome.values[0]))
        for name, make in self.peers.items():
            patch, generator = make(self.module, self.model.tokenizer), np.random.default_rng(1)
            spent, worst = 0.0, 0.0
            for number in range(PEER_SAMPLE + 1):
                base, layer, place, unit = (int(x) for x in cells[generator.integers(len(cells))])
                at = (outcome.swept[0].layers[layer], outcome.swept[0].positions[base][place])
                begin = time.perf_counter()
                logits = patch(*pairs[base], *at)
                if number:  # the first one warms up
                    spent += time.perf_counter() - begin
                value = float(logits[self.tokens[0]] - logits[self.tokens[1]])
                worst = max(worst, abs(value - float(outcome.values[0][base, layer, place, unit])))
            seconds = spent / PEER_SAMPLE * len(cells)
            found[name] = {"seconds": seconds, "ratio": seconds / nsp_s, "max_abs_diff": worst}
        return found

    def _request(self, site: str, pairs: Sequence[tuple[list[int], list[int]]], units: bool) -> Request:
        bases = tuple(self.model.encode(base) for base, _ in pairs)
        donors = tuple(self.model.encode(donor) for _, donor in pairs)
        return Request(
            bases=bases,
            swept=(nsp.patch(site, donor=donors),),
            axes=("layer", "position", "unit") if units else ("layer", "position"),
            reference=donors,
            metrics=(nsp.logit_diff(ANSWER, DISTRACTOR),),
            tokens=(torch.tensor([self.tokens] * len(pairs)),),
        )


def measure_peak(device: torch.device) -> float:
    """FLOP/s of a 2048 x 2048 x 2048 float32 matrix product: the best of five."""
    left, right = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    best = 0.0
    for _ in range(6):
        begin = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - begin))
    return best


# --- the naive way: plain transformers, one hook, one forward per site
# --------------------------------------------------

_KEPT: dict[tuple[Any, ...], torch.Tensor] = {}


def donor_value(bench: Bench, site: str, ids: Sequence[int], layer: int) -> torch.Tensor:
    """The donor's value, run once a prompt and kept (a fair naive loop caches it too)."""
    key = (site.split("[")[0], tuple(ids), layer)
    if key not in _KEPT:
        found: dict[int, torch.Tensor] = {}
        hooks = []
        for number, block in enumerate(bench.module.model.layers):
            module, kind = hooked(block, key[0])

            def keep(_module: Any, arguments: Any, output: Any = None, number: int = number) -> None:
                found[number] = (arguments[0] if output is None else output).detach()

            hooks.append(
                module.register_forward_pre_hook(keep) if kind == "input" else module.register_forward_hook(keep)
            )
        bench.module(torch.tensor([list(ids)], device=bench.model.loaded.device))
        for hook in hooks:
            hook.remove()
        for number, value in found.items():
            _KEPT[(key[0], key[1], number)] = value
    return _KEPT[key]


def hooked(block: Any, component: str) -> tuple[Any, str]:
    return {
        "resid_post": (block, "output"),
        "attn_out": (block.self_attn.o_proj, "output"),
        "mlp_out": (block.mlp, "output"),
        "z": (block.self_attn.o_proj, "input"),
        "mlp_neurons": (block.mlp.down_proj, "input"),
    }[component]


def naive_patch(
    bench: Bench, site: str, pair: tuple[list[int], list[int]], layer: int, position: int, unit: int | None
) -> float:
    """One full forward with one hook."""
    component = site.split("[")[0]
    value = donor_value(bench, site, pair[1], layer)
    module, kind = hooked(bench.module.model.layers[layer], component)
    width = {"z": bench.model.geometry.head_dim, "mlp_neurons": 1}.get(component, 0)
    columns = slice(None) if unit is None else slice(unit * width, (unit + 1) * width)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[0, position, columns] = value[0, position, columns]
        return tensor

    if kind == "input":
        hook = module.register_forward_pre_hook(lambda _module, arguments: (change(arguments[0]), *arguments[1:]))
    else:
        hook = module.register_forward_hook(lambda _module, _arguments, output: change(output))
    try:
        logits = bench.module(torch.tensor([pair[0]], device=bench.model.loaded.device)).logits[0, -1]
    finally:
        hook.remove()
    return float(logits[bench.tokens[0]].float() - logits[bench.tokens[1]].float())


# --- rows
# ---------------------------------------------------------------------------------------------------------------


def pair_of(bench: Bench) -> tuple[list[int], list[int]]:
    return bench.ids(CORRUPT), bench.ids(CLEAN)


def first_token_pair(bench: Bench) -> tuple[list[int], list[int]]:
    """A pair of 14 tokens that differs at its first token (and at the name)."""
    base, donor = pair_of(bench)
    changed = bench.ids("Then Mary and John went to the store, John gave a drink to")
    assert len(changed) == len(donor) == len(base)
    return base, changed


def long_pair(bench: Bench, *, first: bool) -> tuple[list[int], list[int]]:
    """512 random tokens that end in the prompt of the pair; they differ at the name, or already at the first token."""
    generator = random.Random(0)
    filler = [generator.randrange(1000, 20000) for _ in range(512 - len(pair_of(bench)[0]))]
    base, donor = pair_of(bench)
    changed = [filler[0] + 1, *filler[1:]] if first else filler
    return filler + base, changed + donor


def many_pairs(bench: Bench, count: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of one task, prompts of one length: names, a place and a thing vary."""
    generator = random.Random(1)
    names = [
        n
        for n in ("Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "David", "Kate", "Mark")
        if len(bench.ids(f" {n}")) == 1
    ]
    places = [p for p in ("store", "park", "school", "office", "station", "market") if len(bench.ids(f" {p}")) == 1]
    things = [t for t in ("drink", "book", "ring", "ball", "pen") if len(bench.ids(f" {t}")) == 1]
    pairs = []
    for _ in range(count):
        one, two = generator.sample(names, 2)
        rest = f"When {one} and {two} went to the {generator.choice(places)}, {{}} gave a {generator.choice(things)} to"
        pairs.append((bench.ids(rest.format(one)), bench.ids(rest.format(two))))
    return pairs


def generation_row(bench: Bench, required: float, tokens: int = 20) -> Row:
    """Greedy text for every (source layer, target layer), against transformers' own generate with one hook a cell."""
    source, target = "The Eiffel Tower is in the city of Paris", "cat -> cat; 1135 -> 1135; hello -> hello; ?"
    ids, place = bench.ids(target), len(bench.ids(target)) - 1
    source_ids = bench.ids(source)
    layers = list(range(bench.model.geometry.n_layers))
    bench.sync()
    begin = time.perf_counter()
    with bench.model.trace(source_ids) as t:
        t.record("resid_post[*] @ last")
    states = torch.tensor(t.results["resid_post"].values).reshape(len(layers), 1, -1)
    with bench.model.trace([ids] * len(layers)) as t:  # one base prompt for each layer that is read
        t.sweep(nsp.inject(f"resid_post[*] @ {place}", states, mode="set"), axes="layer")
        t.generate(tokens, stop=False)
    grid = t.results["token_id"].values
    bench.sync()
    seconds = time.perf_counter() - begin
    generator = np.random.default_rng(0)
    count, spent, wrong = 24, 0.0, 0
    hidden = [donor_value(bench, "resid_post", source_ids, layer)[0, -1] for layer in layers]
    for _ in range(count):
        here, there = (int(x) for x in generator.integers(len(layers), size=2))
        done = []

        def change(
            _module: Any, _arguments: Any, output: torch.Tensor, here: int = here, done: list[int] = done
        ) -> torch.Tensor:
            if done:
                return output
            done.append(1)
            output = output.clone()
            output[0, place] = hidden[here]
            return output

        bench.sync()
        begin = time.perf_counter()
        hook = bench.module.model.layers[there].register_forward_hook(change)
        given = torch.tensor([ids], device=bench.model.loaded.device)
        text = bench.module.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, min_new_tokens=tokens,
                                     do_sample=False, pad_token_id=0)[0, len(ids):]  # fmt: skip
        hook.remove()
        bench.sync()
        spent += time.perf_counter() - begin
        wrong += int(text.tolist() != grid[here, there].tolist())
    cells, each = len(layers) ** 2, spent / count
    cost, n_layers = bench.model.runtime.cost, bench.model.geometry.n_layers
    flop = (
        cells
        * tokens
        * (cost.per_token * n_layers + 2 * bench.model.geometry.d_model * bench.model.geometry.vocab_size)
    )
    return Row("generate 20 tokens, 30 x 30 grid (diff: share of texts that differ)", cells, seconds, each * cells, each * cells / seconds,
              wrong / count, flop / seconds / 1e9, flop / seconds / bench.peak, required, count, flop / bench.peak / seconds)  # fmt: skip


def rows_of(bench: Bench) -> dict[str, Callable[[], Row]]:
    """Every row by its short name."""
    last32 = "resid_post[*] @ -32:"
    spread = "resid_post[*] @ " + ",".join(str(int(x)) for x in np.linspace(0, 511, 32).round())

    def sweep(name: str, site: str, pairs: Sequence[tuple[list[int], list[int]]], required: float, **more: Any) -> Row:
        return bench.sweep(name, site, pairs, required, naive=naive_patch, **more)

    return {
        "resid": lambda: sweep("resid_post, all layers x positions, shared prefix", "resid_post[*] @ *", [pair_of(bench)], 80),
        "resid-first": lambda: sweep("resid_post, all layers x positions, first token differs", "resid_post[*] @ *", [first_token_pair(bench)], 15),
        "heads": lambda: sweep("z, layers x heads x positions, first token differs", "z[*][*] @ *", [first_token_pair(bench)], 12, units=True),
        "neurons": lambda: sweep("mlp_neurons, all, last position", "mlp_neurons[*][*] @ -1", [pair_of(bench)], 100, units=True),
        "pairs": lambda: sweep("attn_out and mlp_out, 64 pairs", "attn_out[*] @ *", many_pairs(bench, 64), 40, also=["mlp_out[*] @ *"]),
        "long-last": lambda: sweep("resid_post, 512 tokens, last 32 positions", last32, [long_pair(bench, first=False)], 25),
        "long-spread": lambda: sweep("resid_post, 512 tokens, 32 positions spread, first token differs", spread, [long_pair(bench, first=True)], 3.5),
        "generation": lambda: generation_row(bench, 15),
    }  # fmt: skip


def show(rows: Sequence[Row], bench: Bench) -> None:
    """Print the table."""
    table = Table(title=f"{bench.model.name}, {bench.model.loaded.dtype}, {bench.model.loaded.device}, {torch.get_num_threads()} threads; "
                        f"peak {bench.peak / 1e9:.0f} GFLOP/s (2048^3 float32)", title_justify="left")  # fmt: skip
    others = list(bench.peers)
    columns = ("row", "sites", "nsp s", "naive s", "ratio", "needed", "max diff", "GFLOP/s", "of peak", "sample")
    for column in (*columns, *others):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in rows:
        table.add_row(row.row, f"{row.branches:,}", f"{row.nsp_s:.2f}", f"{row.naive_s:.0f}", f"{row.ratio:.1f}x", f"{row.required:g}x",
                      f"{row.max_abs_diff:.1e}", f"{row.gflops:.0f}", f"{100 * row.peak_share:.0f} %", str(row.sampled),
                      *(f"{row.peers[name]['ratio']:.0f}x" if name in row.peers else "-" for name in others))  # fmt: skip
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="short names, comma-separated; by default all")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    bench = Bench(nsp.load(options.model, device=options.device, dtype=options.dtype))
    known = rows_of(bench)
    chosen = options.rows.split(",") if options.rows else list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"no row {name!r}; there are {', '.join(known)}")
    known["resid"]()  # warm-up: thread pools, allocator, first traces
    rows = []
    for name in chosen:
        rows.append(known[name]())
        show(rows[-1:], bench)
        _KEPT.clear()
    show(rows, bench)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
