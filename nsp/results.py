"""From the engine's arrays to labelled xarray objects: dims from the closed vocabulary, coordinates, units and
provenance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.engine.engine import Tokens
from nsp.engine.lowering import Resolved
from nsp.engine.measured import Measured
from nsp.engine.site_recordings import Recorded
from nsp.html import Table, shown
from nsp.interventions import Intervention
from nsp.metrics import METRICS, Metric

# A donor and a base run closer than this make no scale to normalise by.
_TINY = 1e-6


def sweep_dataset(
    measured: Measured,
    metrics: Sequence[Metric],
    prompts: Sequence[Prompt],
    *,
    outer: str | None,
    interventions: Sequence[Intervention] = (),
) -> xr.Dataset:
    """A sweep as a Dataset.

    One variable a metric with dims (outer, layer, position, head | neuron), of which only the swept axes are there;
    ``effect`` (and ``effect_<metric>`` for further metrics) where a donor run gives the scale; ``change_norm``, the
    L2 norm of what the interventions changed. ``outer`` is ``pair`` or ``prompt``, or None for one prompt.
    """
    item = measured.swept[0] if measured.swept else None
    swept = measured.cells.swept
    names = {"layer": "layer", "position": "position", "unit": item.site.spec.dim if item else "neuron"}
    dims = ([outer] if outer else []) + [names[axis] for axis in ("layer", "position", "unit") if axis in swept]
    keep = tuple(
        [slice(None) if outer else 0] + [slice(None) if axis in swept else 0 for axis in ("layer", "position", "unit")]
    )
    how = "; ".join(f"{one.op} {one.site}" for one in interventions) or "no intervention"
    method = f"one exact counterfactual a cell ({how}); {measured.path} path"
    variables: dict[str, tuple[list[str], np.ndarray, dict[str, str]]] = {}
    for number, metric in enumerate(metrics):
        kind = METRICS[metric.kind]
        values = measured.values[number]
        attrs = {"long_name": kind.long_name, "units": kind.units, "method": method}
        variables[metric.name] = (dims, values[keep], attrs)
        if measured.reference is not None:
            name = "effect" if number == 0 else f"effect_{metric.name}"
            variables[name] = (dims, normalised(measured, number)[keep], effect_attrs(metric, method))
    variables["change_norm"] = (
        dims,
        measured.change[keep],
        {"long_name": "L2 norm of what the intervention changed at the site", "units": "activation", "method": method},
    )
    dataset = xr.Dataset({name: (d, v, a) for name, (d, v, a) in variables.items()})
    if item is not None:
        dataset = dataset.assign_coords(axis_coords(item, swept, prompts, outer, names["unit"]))
    return dataset.assign(baseline_variables(measured, metrics, outer))


def effect_attrs(metric: Metric, method: str) -> dict[str, str]:
    """Attributes of the normalised form of a metric."""
    return {
        "long_name": f"normalised effect on {metric.name}: 0 at the base run, 1 at the donor run",
        "units": "1",
        "method": f"(patched - base) / (donor - base) of {metric.name}; {method}",
    }


def normalised(measured: Measured, number: int) -> np.ndarray:
    """The effect of metric ``number``, axes of the measured values (see `normalised_effect`)."""
    assert measured.reference is not None
    return normalised_effect(measured.values[number], measured.base[number], measured.reference[number])


def normalised_effect(values: np.ndarray, base: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """(patched - base) / (donor - base), float32, NaN where donor and base agree; the first axis is that of the base runs."""
    start = base.astype(np.float64)
    scale = donor.astype(np.float64) - start
    scale = np.where(np.abs(scale) < _TINY, np.nan, scale)
    shape = (-1, *(1,) * (values.ndim - 1))
    effect = (values.astype(np.float64) - start.reshape(shape)) / scale.reshape(shape)
    return np.asarray(effect.astype(np.float32))


def baseline_variables(measured: Measured, metrics: Sequence[Metric], outer: str | None) -> dict[str, xr.DataArray]:
    """``<metric>_base`` and, where there is a donor run, ``<metric>_donor``: the runs without interventions."""
    found = {}
    for number, metric in enumerate(metrics):
        kind = METRICS[metric.kind]
        for name, values in (("base", measured.base), ("donor", measured.reference)):
            if values is None:
                continue
            data = values[number] if outer else values[number][0]
            found[f"{metric.name}_{name}"] = xr.DataArray(
                data,
                dims=[outer] if outer else [],
                attrs={
                    "long_name": f"{kind.long_name}, {name} run",
                    "units": kind.units,
                    "method": "ordinary forward pass",
                },
            )
    return found


def axis_coords(
    item: Resolved, swept: Sequence[str], prompts: Sequence[Prompt], outer: str | None, unit_name: str
) -> dict[str, xr.DataArray | xr.Variable]:
    """Coordinates of the swept axes: layer, position (with token texts), head or neuron."""
    coords: dict[str, xr.DataArray | xr.Variable] = {}
    if "layer" in swept:
        coords["layer"] = xr.Variable(("layer",), np.asarray(item.layers, dtype=np.int64), {"long_name": "layer"})
    if "unit" in swept and item.units is not None:
        coords[unit_name] = xr.Variable((unit_name,), np.asarray(item.units, dtype=np.int64), {"long_name": unit_name})
    if "position" in swept:
        coords |= position_coords([list(positions) for positions in item.positions], prompts, outer)
    return coords


def position_coords(
    positions: Sequence[Sequence[int]], prompts: Sequence[Prompt], outer: str | None
) -> dict[str, xr.DataArray | xr.Variable]:
    """The position axis.

    ``position`` is the token's index where every prompt selects the same indices (or a run of them from 0), else the
    ordinal in the selection; ``token_position`` always is the index (-1: none), and ``token_text`` what stands there.
    """
    longest = max(len(one) for one in positions)
    widest = max(positions, key=len)
    agree = all(list(one) == list(widest[: len(one)]) for one in positions)
    index = np.full((len(positions), longest), -1, dtype=np.int64)
    texts = np.full((len(positions), longest), "", dtype=object)
    for row, (one, prompt) in enumerate(zip(positions, prompts, strict=True)):
        index[row, : len(one)] = one
        texts[row, : len(one)] = [prompt.token_texts[position] for position in one]
    dims = ([outer] if outer else []) + ["position"]
    if not outer:
        index, texts = index[0], texts[0]
    place = np.asarray(widest if agree else np.arange(longest), dtype=np.int64)
    return {
        "position": xr.Variable(("position",), place, {"long_name": "position" if agree else "place in the selection"}),
        "token_position": xr.Variable(dims, index, {"long_name": "index of the token in its prompt (-1: none)"}),
        "token_text": xr.Variable(dims, texts, {"long_name": "token of the base prompt"}),
    }


def recorded_array(recorded: Recorded, prompts: Sequence[Prompt], outer: str | None, has_units: bool) -> xr.DataArray:
    """A recorded site as a DataArray.

    Dims (outer, layer, position, neuron) for streams and neurons, (outer, layer, position, head, neuron) for q, k, v
    and z, (outer, layer, position, head, sender) for the attention pattern (``sender``: the position attended to),
    (outer, position, token) for logits. Components without layers have no ``layer``.
    """
    item = recorded.resolved
    component = item.site.component
    values = recorded.values
    dims = ["prompt", "layer", "position"]
    coords = axis_coords(item, ("layer", "position"), prompts, outer, "head")
    if component == "pattern" or has_units:
        units = item.units if item.units is not None else tuple(range(values.shape[3]))
        dims += ["head", "sender" if component == "pattern" else "neuron"]
        coords["head"] = xr.Variable(("head",), np.asarray(units, dtype=np.int64), {"long_name": "head"})
    else:
        values = values.reshape(*values.shape[:3], -1)
        last = "token" if component == "logits" else "neuron"
        dims.append(last)
        if item.units is not None:
            coords["neuron"] = xr.Variable(("neuron",), np.asarray(item.units, dtype=np.int64), {"long_name": "neuron"})
    if not item.site.spec.layered:
        values, dims = values[:, 0], [dim for dim in dims if dim != "layer"]
        coords.pop("layer", None)
    if outer is None:
        values, dims = values[0], dims[1:]
    else:
        dims[0] = outer
    known = item.site.spec
    meaning = "output of a submodule" if known.is_module else known.meaning
    attrs = {
        "long_name": meaning,
        "units": "logits" if component == "logits" else "activation",
        "method": f"recorded at {item.site}",
    }
    return xr.DataArray(values, dims=dims, coords=coords, name=component, attrs=attrs)


def generated_dataset(
    generated: Tokens, prompts: Sequence[Prompt], tokenizer: Any, method: str, *, outer: str | None
) -> xr.Dataset:
    """Generated tokens as ``token_id`` and ``text`` over the swept axes."""
    item = next((site for _, site, moving in generated.of.stated if moving), None)
    assert generated.of.cells is not None
    swept, tokens = generated.of.cells.swept, generated.ids
    unit = item.site.spec.dim if item is not None else "neuron"
    names = {"layer": "layer", "position": "position", "unit": unit}
    dims = ([outer] if outer else []) + [names[axis] for axis in ("layer", "position", "unit") if axis in swept]
    keep = (slice(None) if outer else 0, *(slice(None) if axis in swept else 0 for axis in ("layer", "position", "unit")))
    ids = tokens[keep]
    flat = [[int(token) for token in row if token >= 0] for row in ids.reshape(-1, ids.shape[-1])]
    texts = [tokenizer.decode(row) if tokenizer is not None else " ".join(map(str, row)) for row in flat]
    text = np.empty(len(texts), dtype=object)
    text[:] = texts
    variables = {
        "token_id": ([*dims, "step"], ids, {"long_name": "generated token ids (-1: the text has ended)", "units": "1", "method": method}),
        "text": (dims, text.reshape(ids.shape[:-1]), {"long_name": "generated text", "units": "1", "method": method}),
    }
    dataset = xr.Dataset({name: (d, v, a) for name, (d, v, a) in variables.items()})
    step = xr.Variable(("step",), np.arange(ids.shape[-1]), {"long_name": "generated token, from 0"})
    coords = axis_coords(item, swept, prompts, outer, unit) if item is not None else {}
    return dataset.assign_coords({**coords, "step": step})


def overview(results: xr.Dataset | xr.DataTree) -> Table:
    """A trace's results in a table: of each variable its value or range, where it is largest, its dims and its meaning."""
    nodes = results.subtree if isinstance(results, xr.DataTree) else [results]
    rows = [_overview_row(array) for node in nodes for array in node.data_vars.values()]
    return Table("results", ("variable", "value", "largest at", "dims", "what it is"), rows)


def _overview_row(array: xr.DataArray) -> tuple[str, str, str | None, str, str]:
    dims = " x ".join(f"{dim} {size}" for dim, size in array.sizes.items())
    units = array.attrs.get("units", "1")
    meaning = str(array.attrs.get("long_name", "")) + ("" if units == "1" else f" ({units})")
    name, size = str(array.name), array.size
    if array.dtype.kind != "f":
        value = shown(str(array.values.item())) if size == 1 else f"{size} values, the first {shown(str(array.values.flat[0]))}"
        return name, value, None, dims, meaning
    values = array.values
    finite = np.isfinite(values)
    missing = "" if finite.all() else f", {size - int(finite.sum())} of {size} without a finite value"
    if not finite.any():
        return name, missing.removeprefix(", "), None, dims, meaning
    if size == 1:
        return name, f"{values.item():.4g}", None, dims, meaning
    place = np.unravel_index(np.where(finite, np.abs(values), -1).argmax(), values.shape)
    at = [f"{dim} {array[dim].values[i] if dim in array.coords else i}" for dim, i in zip(array.dims, place, strict=True)]
    if "token_text" in array.coords:
        text = array["token_text"].isel({dim: i for dim, i in zip(array.dims, place, strict=True) if dim in array["token_text"].dims})
        at.append(shown(repr(text.item())))
    return name, f"{values[finite].min():.4g} to {values[finite].max():.4g}{missing}", ", ".join(at), dims, meaning
