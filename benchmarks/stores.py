"""What a store costs: capture of mlp_neurons of every layer of smollm2 over 64 prompts, and three reads of it.

`python benchmarks/stores.py [--prompts 64] [--positions 32] [--store-dtype bfloat16]`

Each row is the median of the repeats, interleaved so that a noisy machine hurts all rows alike: the forward pass alone;
plain hooks and `numpy.save` with fsync; hooks and a run store, one unit of work for 8 prompts. `raw disk` is the same
bytes written and synced. A warm-up comes first and is thrown away.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import nsp
from nsp.stores import create_run, open_run, open_writer

BATCH = 8
PLAN = "00" * 32
GROUP = "activations/mlp_neurons"


@dataclass(frozen=True)
class Unit:
    index: int
    regions: dict[str, dict[str, slice]]


def captures(module: Any, buffer: np.ndarray[Any, Any]) -> Callable[[torch.Tensor], np.ndarray[Any, Any]]:
    """A function that runs a batch and gives the inputs of every down projection, (prompt, layer, position, neuron).

    They are copied into `buffer`, which is used again and again: fresh memory for each batch costs more than the copy.
    """
    target = torch.from_numpy(buffer)

    def run(ids: torch.Tensor) -> np.ndarray[Any, Any]:
        def keep(layer: int, inputs: tuple[torch.Tensor, ...]) -> None:
            target[:, layer].copy_(inputs[0])

        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, number=number: keep(number, inputs))
            for number, layer in enumerate(module.model.layers)
        ]
        try:
            with torch.inference_mode():
                module(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return buffer

    return run


def template(prompts: int, layers: int, positions: int, neurons: int) -> tuple[xr.DataTree, list[Unit], dict[str, Any]]:
    sizes = {"prompt": prompts, "layer": layers, "position": positions, "neuron": neurons}
    fill = np.broadcast_to(np.float32(np.nan), tuple(sizes.values()))
    attrs = {"long_name": "input of the down projection", "units": "activation", "method": "one forward pass, hooked"}
    dataset = xr.Dataset(
        {"value": (tuple(sizes), fill, attrs)}, coords={dim: np.arange(size) for dim, size in sizes.items()}
    )
    units = [Unit(at // BATCH, {GROUP: {"prompt": slice(at, at + BATCH)}}) for at in range(0, prompts, BATCH)]
    model = dict.fromkeys(("revision", "weights_hash", "tokenizer_hash"), "") | {"dtype": "float32", "device": "cpu"}
    header = {
        "kind": "capture",
        "plan_hash": PLAN,
        "recipe_given": {},
        "recipe_resolved": {},
        "model": model | {"name": "smollm2"},
        "seeds": {},
        "versions": {},
    }
    return xr.DataTree.from_dict({GROUP: dataset}), units, header


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and seconds of processor time of this process."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store-dtype", default=None)
    parser.add_argument("--directory", type=Path, default=None, help="where to write; default: a temporary directory")
    options = parser.parse_args()
    module = nsp.load("smollm2").module
    config = module.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, config.vocab_size, (options.prompts, options.positions), generator=generator)
    batches = ids.split(BATCH)
    shape = (options.prompts, config.num_hidden_layers, options.positions, config.intermediate_size)
    tree, units, header = template(*shape)
    place = Path(tempfile.mkdtemp(prefix="nsp-bench-", dir=options.directory))
    path = place / "run.zarr"
    megabytes = int(np.prod(shape)) * 4 / 1e6
    captures_by_turns = [captures(module, np.zeros((BATCH, *shape[1:]), np.float32)) for _ in range(2)]
    capture = captures_by_turns[0]
    sample = capture(batches[0]).copy()

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                module(input_ids=batch, use_cache=False)

    def hooks_and_save() -> None:
        for number, batch in enumerate(batches):
            values = capture(batch)
            with (place / f"{number}.npy").open("wb") as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())

    def hooks_and_store() -> None:
        create_run(path, tree, units, header=header, force=True, store_dtype=options.store_dtype)
        with open_writer(path, PLAN) as writer:
            for index in writer.work():
                # The batch before is being written while this one runs, so each has its own buffer.
                writer.write_behind(index, {GROUP: {"value": captures_by_turns[index % 2](batches[index])}})
            writer.mark("complete")

    def raw_disk() -> None:
        for number in range(len(batches)):
            with (place / f"{number}.raw").open("wb") as file:
                file.write(sample.data)
                file.flush()
                os.fsync(file.fileno())

    def store_alone() -> None:
        create_run(path, tree, units, header=header, force=True, store_dtype=options.store_dtype)
        with open_writer(path, PLAN) as writer:
            for index in writer.work():
                writer.write(index, {GROUP: {"value": sample}})
            writer.mark("complete")

    ways = {
        "forward alone": forward,
        "hooks + numpy.save": hooks_and_save,
        "store alone": store_alone,
        "raw disk": raw_disk,
        "hooks + store": hooks_and_store,
    }
    try:
        forward()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, work in ways.items():
                times[name].append(timed(work))
        tokens = options.prompts * options.positions
        base, base_used = (statistics.median(column) for column in zip(*times["forward alone"], strict=True))
        print(f"{options.prompts} prompts of {options.positions} tokens, {megabytes:.0f} MB of float32 activations\n")
        columns = ("what", "seconds", "tokens/s", "MB/s", "against forward", "processor s", "against forward")
        print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
        for name, found in times.items():
            seconds, used = (statistics.median(column) for column in zip(*found, strict=True))
            moved = "-" if name == "forward alone" else f"{megabytes / seconds:.0f}"
            ran = "-" if name in ("raw disk", "store alone") else f"{tokens / seconds:.0f}"
            print(
                f"| {name} | {seconds:.2f} | {ran} | {moved} | {seconds / base:.3f} "
                f"| {used:.2f} | {used / base_used:.3f} |"
            )
        stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        print(f"\non disk: {stored:.0f} MB, {stored / megabytes:.2f} of the float32 bytes")
        value = open_run(path).tree[GROUP]["value"]
        middle = config.num_hidden_layers // 2
        reads = {
            "one layer, all prompts": {"layer": middle},
            "one neuron, all prompts": {"layer": middle, "neuron": 700},
            "one prompt, all layers": {"prompt": options.prompts // 2},
        }
        for name, selection in reads.items():
            value.sel(selection).values  # noqa: B018  (warm)
            took = statistics.median(timed(lambda chosen=selection: value.sel(chosen).values)[0] for _ in range(5))
            print(f"read {name}: {1000 * took:.1f} ms")
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
