"""A synthetic run: a template, its units and their values, without a model. Shared by the tests of stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

PLAN = "5e" * 32
ATTRS = {"long_name": "a synthetic number", "units": "1", "method": "made up by the tests"}
MODULE = "module:model.layers.3.mlp.gate_proj"


@dataclass(frozen=True)
class Unit:
    index: int
    regions: Mapping[str, Mapping[str, slice]]


@dataclass(frozen=True)
class Case:
    tree: xr.DataTree
    units: tuple[Unit, ...]

    def values(self, index: int) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """What unit `index` writes: numbers that depend on the cell alone, so that every writer gives the same."""
        found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        for path, region in self.units[index].regions.items():
            dataset = self.tree[path].to_dataset()
            found[path] = {}
            for seed, name in enumerate(dataset.data_vars):
                variable = dataset[name]
                spans = [region.get(str(dim), slice(None)) for dim in variable.dims]
                places = np.ogrid[
                    tuple(slice(*span.indices(size)) for span, size in zip(spans, variable.shape, strict=True))
                ]
                number = np.zeros([place.size for place in places])
                for weight, place in zip((1, 37, 1009, 7919), places, strict=False):
                    number = number + weight * place
                number = np.round(np.sin(number + seed + len(path)) * 1000)
                found[path][str(name)] = (
                    number.astype(variable.dtype) if variable.dtype.kind == "i" else (number / 7).astype(variable.dtype)
                )
        return found


def header(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "kind": "activation-patching",
        "plan_hash": PLAN,
        "recipe_given": {"kind": "activation-patching", "model": "smollm2"},
        "recipe_resolved": {"kind": "activation-patching", "model": "smollm2", "layers": "all"},
        "model": {
            "name": "smollm2",
            "revision": None,
            "weights_hash": "00",
            "tokenizer_hash": "11",
            "dtype": "float32",
            "device": "cpu",
        },
        "seeds": {"seed": 0},
        "versions": {"nsp": "0.1.0"},
    }
    return made | changes


def empty(dims: tuple[str, ...], sizes: Mapping[str, int], dtype: str = "float32") -> Any:
    fill = np.nan if np.dtype(dtype).kind == "f" else -1
    return (dims, np.full([sizes[dim] for dim in dims], fill, dtype), ATTRS)


def sweep(
    pairs: int = 3,
    layers: int = 5,
    positions: int = 6,
    step: int = 2,
    texts: list[str] | None = None,
    components: tuple[str, ...] = ("resid_post", MODULE),
) -> Case:
    """effects of two components split by pair and layers, their receipts, and a baseline by pair."""
    sizes = {"pair": pairs, "layer": layers, "position": positions}
    coords: dict[str, Any] = {dim: np.arange(size) for dim, size in sizes.items()}
    words = np.empty((pairs, positions), dtype=object)
    words[...] = " tök"
    labelled = coords | {"token_text": (("pair", "position"), words)}
    clean = np.empty(pairs, dtype=object)
    clean[...] = [(texts or ['When Mary, "John"\nand'])[at % len(texts or [1])] for at in range(pairs)]
    groups: dict[str, xr.Dataset] = {
        "inputs": xr.Dataset(
            {
                "clean": ("pair", clean, ATTRS),
                "token_id": (("pair", "position"), np.arange(pairs * positions).reshape(pairs, positions), ATTRS),
            },
            coords={"pair": coords["pair"], "position": coords["position"]},
        ),
        "baseline": xr.Dataset({"logit_diff": empty(("pair",), sizes)}, coords={"pair": coords["pair"]}),
    }
    dims = ("pair", "layer", "position")
    for component in components:
        groups[f"effects/{component}"] = xr.Dataset(
            {"logit_diff": empty(dims, sizes), "effect": empty(dims, sizes)}, coords=labelled
        )
        groups[f"receipts/{component}"] = xr.Dataset({"fired": empty(dims, sizes, "int32")}, coords=coords)
    units = [Unit(pair, {"baseline": {"pair": slice(pair, pair + 1)}}) for pair in range(pairs)]
    for component in components:
        for pair in range(pairs):
            for layer in range(0, layers, step):
                region = {"pair": slice(pair, pair + 1), "layer": slice(layer, min(layer + step, layers))}
                units.append(Unit(len(units), {f"{top}/{component}": region for top in ("effects", "receipts")}))
    return Case(xr.DataTree.from_dict(groups), tuple(units))


def capture(prompts: int = 16, layers: int = 4, positions: int = 16, neurons: int = 512, step: int = 4) -> Case:
    """activations of mlp_neurons, split by prompt."""
    sizes = {"prompt": prompts, "layer": layers, "position": positions, "neuron": neurons}
    coords = {dim: np.arange(size) for dim, size in sizes.items()}
    groups = {
        "activations/mlp_neurons": xr.Dataset({"value": empty(tuple(sizes), sizes)}, coords=coords),
        "inputs": xr.Dataset(
            {"n_tokens": ("prompt", np.full(prompts, positions), ATTRS)}, coords={"prompt": coords["prompt"]}
        ),
    }
    regions = [{"prompt": slice(at, min(at + step, prompts))} for at in range(0, prompts, step)]
    units = tuple(Unit(index, {"activations/mlp_neurons": region}) for index, region in enumerate(regions))
    return Case(xr.DataTree.from_dict(groups), units)


def fill(location: Any, case: Case, count: int | None = None, **options: Any) -> str:
    """Write `count` units (all of them by default) of a store that exists; returns its state."""
    from nsp.stores import open_writer

    with open_writer(location, PLAN, **options) as writer:
        for index in writer.pending()[:count]:
            with writer.claim(index) as claimed:
                assert claimed
                writer.write(index, case.values(index))
        return writer.mark("complete")


def expected(case: Case, done: Any = None) -> dict[str, xr.Dataset]:
    """The groups that units fill, as a run must return them when the units in `done` are committed (None: all)."""
    groups: dict[str, xr.Dataset] = {}
    for unit in case.units:
        for path, region in unit.regions.items():
            if path not in groups:
                groups[path] = case.tree[path].to_dataset().copy(deep=True)
            if done is None or unit.index in done:
                for name, values in case.values(unit.index)[path].items():
                    dims = groups[path][name].dims
                    groups[path][name].values[tuple(region.get(str(dim), slice(None)) for dim in dims)] = values
    return groups


def assert_holds(run: Any, case: Case, done: Any = None) -> None:
    """The run's values are exactly those of the units in `done`, and nothing else."""
    for path, dataset in expected(case, done).items():
        node = next(node for node in run.tree.subtree if node.path.strip("/") == path)
        found = node.to_dataset()
        for name in dataset.data_vars:
            np.testing.assert_array_equal(found[name].values, dataset[name].values, err_msg=f"{path}/{name}")
