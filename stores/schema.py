"""What a run store may hold: its groups, dims, header and attributes, stated once.

A store is a zarr v3 hierarchy that plain xarray opens. The root group's attributes are the *header* (`HEADER`): they
identify the run without any array being read. Below it stand the groups of `GROUPS`; those marked `by_component` hold
one subgroup per component (`effects/resid_post`). Every data variable has dims out of `DIMS`, an index coordinate for
each of its dims, and the attributes of `VARIABLE_ATTRS`.

A group that units of work fill carries three more coordinates (`BOOKKEEPING`), over the dims along which units split
it: `done`, 1 where a unit is committed; `unit`, the index of the unit that writes there; `sha256`, the digests of what
that unit wrote, in the first cell of its region.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsp.errors import NspError

SCHEMA_VERSION = 1

DIMS: dict[str, str] = {
    "pair": "a clean and a corrupt prompt",
    "prompt": "one prompt",
    "layer": "layer of the site",
    "target_layer": "layer that a value is written to, where it differs from the layer read",
    "position": "token position in a prompt, from 0",
    "head": "attention head",
    "neuron": "MLP neuron, or column of a module's output",
    "component": "component by name",
    "sender": "component an edge starts from",
    "receiver": "component an edge ends at",
    "direction": "a named direction or probe",
    "step": "step of a generation or an optimisation",
    "token": "vocabulary entry, or token of a ragged layout",
}


@dataclass(frozen=True)
class GroupSpec:
    """One group of a store: what it holds, and whether components have subgroups of their own."""

    meaning: str
    by_component: bool = False


GROUPS: dict[str, GroupSpec] = {
    "inputs": GroupSpec("prompts, token ids and texts, spans, pairs"),
    "baseline": GroupSpec("each metric for the base and the donor run"),
    "effects": GroupSpec("each metric for every counterfactual", by_component=True),
    "activations": GroupSpec("recorded activations", by_component=True),
    "attribution": GroupSpec("gradient-based scores", by_component=True),
    "circuit": GroupSpec("selected units and edges", by_component=True),
    "generations": GroupSpec("generated tokens and texts"),
    "receipts": GroupSpec("what each intervention did", by_component=True),
}

VARIABLE_ATTRS: dict[str, str] = {
    "long_name": "what the number means, for people",
    "units": "its unit; '1' where it has none",
    "method": "how it was made",
}

BOOKKEEPING: dict[str, str] = {
    "done": "1 where the unit of work is committed; values elsewhere are not results",
    "unit": "index of the unit of work that writes this cell",
    "sha256": "SHA-256 of the values a unit wrote, 'variable=digest', in the first cell of its region",
}

STATES = ("running", "complete", "failed")

JSON_VALUE = (dict, list, str, int, float, bool, type(None))
HEADER: dict[str, tuple[tuple[type, ...], str]] = {
    "nsp_schema": ((int,), "version of this schema"),
    "kind": ((str,), "kind of experiment"),
    "plan_hash": ((str,), "SHA-256 of the plan: equal plans give equal numbers"),
    "recipe_given": (JSON_VALUE, "the recipe as the user wrote it"),
    "recipe_resolved": (JSON_VALUE, "the recipe with every default filled in"),
    "model": ((dict,), "name, revision, weights_hash, tokenizer_hash, dtype, device"),
    "seeds": (JSON_VALUE, "every seed used"),
    "versions": ((dict,), "versions of nsp and of the libraries under it"),
    "created_at": ((str,), "ISO 8601 time of creation, UTC; nothing depends on it"),
    "state": ((str,), " | ".join(STATES)),
    "units": ((int,), "number of units of work"),
    "extra": ((dict,), "anything further that an experiment wants kept"),
}
FILLED_BY_STORE = ("nsp_schema", "created_at", "state", "units", "extra")
MODEL_KEYS = ("name", "revision", "weights_hash", "tokenizer_hash", "dtype", "device")


def check_header(header: Mapping[str, Any]) -> list[str]:
    """What is wrong with a header, one sentence each; empty if it follows the schema."""
    problems = [f"header: unknown key {key!r}; known keys: {', '.join(HEADER)}" for key in header if key not in HEADER]
    for key, (types, meaning) in HEADER.items():
        if key not in header:
            problems.append(f"header: {key!r} ({meaning}) is missing")
        elif not isinstance(header[key], types):
            problems.append(f"header: {key!r} is a {type(header[key]).__name__}; expected {_names(types)}")
    model = header.get("model")
    if isinstance(model, dict):
        problems += [f"header: model.{key} is missing" for key in MODEL_KEYS if key not in model]
    version = header.get("nsp_schema")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        problems.append(f"header: schema {version} is newer than this nsp knows ({SCHEMA_VERSION}); update nsp")
    if isinstance(header.get("state"), str) and header["state"] not in STATES:
        problems.append(f"header: state {header['state']!r} is not one of {', '.join(STATES)}")
    return problems


def check_tree(tree: xr.DataTree) -> list[str]:
    """What is wrong with the groups and variables of `tree`, one sentence each."""
    problems: list[str] = []
    if tree.data_vars:
        problems.append(f"root: variables stand in groups, not in the root: {', '.join(map(str, tree.data_vars))}")
    for path, node in groups(tree):
        problems += check_group_path(path)
        dataset = node.to_dataset(inherit=True)
        problems += _check_attrs(path, dataset.attrs)
        for name, variable in dataset.variables.items():
            problems += _check_variable(path, str(name), variable, dataset)
    return problems


def groups(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataTree]]:
    """(path without the leading slash, node) of every group below the root, parents first."""
    for node in tree.subtree:
        path = node.path.strip("/")
        if path:
            yield path, node


def check_group_path(path: str) -> list[str]:
    """Whether `path` is one of the closed list of groups, or a component's subgroup of one."""
    top, _, rest = path.partition("/")
    if top not in GROUPS:
        return [f"{path}: {top!r} is not a group of a run; groups: {', '.join(GROUPS)}"]
    if rest and not GROUPS[top].by_component:
        return [f"{path}: {top!r} has no subgroups"]
    if "/" in rest:
        return [f"{path}: subgroups are one level deep ({top}/<component>)"]
    return []


def require(problems: list[str], what: str) -> None:
    """Raise NspError listing `problems`, if there are any."""
    if problems:
        raise NspError(f"{what} does not follow the store's schema:\n  " + "\n  ".join(problems))


def _check_variable(path: str, name: str, variable: xr.Variable, dataset: xr.Dataset) -> list[str]:
    where = f"{path}/{name}"
    problems = [f"{where}: dim {dim!r} is not one of {', '.join(DIMS)}" for dim in variable.dims if dim not in DIMS]
    problems += _check_attrs(where, variable.attrs)
    if variable.dtype.kind not in "biufOUT":
        problems.append(f"{where}: dtype {variable.dtype} cannot be stored; use numbers or text")
    if name in BOOKKEEPING or name in dataset.coords:
        return problems
    missing = [attr for attr in VARIABLE_ATTRS if not str(variable.attrs.get(attr, "")).strip()]
    if missing:
        problems.append(f"{where}: attribute {', '.join(missing)} is missing")
    bare = [str(dim) for dim in variable.dims if dim not in dataset.coords]
    if bare:
        problems.append(f"{where}: dim {', '.join(bare)} has no coordinate")
    return problems


def _check_attrs(where: str, attrs: Mapping[Any, Any]) -> list[str]:
    try:
        json.dumps(plain(attrs), allow_nan=False)
    except (TypeError, ValueError) as error:
        return [f"{where}: attributes are not strict JSON: {error}"]
    return []


def plain(value: Any) -> Any:
    """`value` with numpy scalars and arrays, tuples and sets turned into plain JSON types."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    return value


def _names(types: tuple[type, ...]) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
