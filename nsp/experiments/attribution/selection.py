"""From attributions to circuits: which units are kept. Selecting reads what is stored and computes no attribution.

A unit's contribution is minus its score (see `nsp.experiments.circuits`). Filters come first, then the thresholds that are given,
in this order: ``percent`` of the metric, ``share`` of the total, ``per_layer``, ``top_k``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from nsp.errors import InputError
from nsp.experiments.attribution.recipe import Selection, UnitAt
from nsp.experiments.circuits import Circuit, CircuitUnit
from nsp.recipe_errors import checked
from nsp.sites import Selection as SiteSelection

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Scores:
    """Contributions of one component by one method, with the labels that filters need.

    Attributes:
        values: (prompt, layer, position, unit), NaN where a prompt has no such position.
        layers: their labels; ``places`` token positions (prompt, position), -1 where there is none.
        lengths: tokens of each prompt; ``metric`` its value in the ordinary run, by prompt.
    """

    values: Floats
    layers: Sequence[int]
    places: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    metric: Floats

    @classmethod
    def stored(cls, attributed: xr.Dataset, method: str, lengths: Any, metric: xr.Dataset) -> Scores:
        """From the groups ``attribution/<component>`` and ``baseline`` of a run, and its prompts' lengths."""
        scores = attributed[method]
        unit = "neuron" if "neuron" in scores.dims else "head"
        values = -np.asarray(scores.transpose("prompt", "layer", "position", unit).values, dtype=np.float64)
        base = np.asarray(metric[str(next(iter(metric.data_vars)))].values, dtype=np.float64)
        places = np.asarray(attributed["token_position"].values)
        return cls(values, attributed["layer"].values.tolist(), places, np.asarray(lengths), base)

    @classmethod
    def of(cls, tree: xr.DataTree, component: str, method: str) -> Scores:
        """From a run's tree. InputError where it has no such attributions, or where they are not finished."""
        known = tree["attribution"].children if "attribution" in tree.children else {}
        if component not in known:
            raise InputError(f"this run attributes {', '.join(map(str, known)) or 'nothing'}, not {component}")
        attributed = known[component].to_dataset(inherit=False)
        if method not in attributed:
            raise InputError(f"this run has no scores of {method}; it has {', '.join(map(str, attributed.data_vars))}")
        if "layer" not in attributed.dims or not {"neuron", "head"} & set(attributed.dims):
            raise InputError(f"{component} has no heads or neurons, so no circuit can be made of it")
        scores = cls.stored(attributed, method, tree["inputs"]["n_tokens"].values, tree["baseline"].to_dataset())
        if np.isnan(scores.values.transpose(0, 2, 1, 3)[~scores.absent]).any():
            raise InputError(f"the attributions of {component} by {method} are not finished, or are not numbers")
        return scores

    @property
    def absent(self) -> Mask:
        return self.places < 0

    def shared_places(self) -> list[int] | None:
        """One label for each position that means the same in every prompt: from 0, or from the end; None where there is none."""
        alike = bool((self.places == self.places[:1]).all())
        if alike and (len(set(self.lengths.tolist())) == 1 or not self._from_end()):
            return [int(place) for place in self.places[0]]
        return [int(place) for place in (self.places - self.lengths[:, None])[0]] if self._from_end() else None

    def _from_end(self) -> bool:
        back = self.places - self.lengths[:, None]
        return bool((back == back[:1]).all()) and not self.absent.any()


def select_mask(scores: Scores, selection: Selection, n_layers: int | None = None) -> Mask:
    """Which units are kept, (prompt, layer, position, unit); for ``mean`` and ``any`` the same in every prompt."""
    allowed = _allowed(scores, selection, n_layers)
    size = np.where(np.isnan(scores.values), 0.0, scores.values)
    if selection.sign != "both":
        allowed &= (size > 0) if selection.sign == "positive" else (size < 0)
    prompts = range(len(size))
    if selection.over == "prompt":
        return np.stack([_kept(size[row], allowed[row], scores.metric[row], selection) for row in prompts])
    if scores.shared_places() is None:
        raise InputError(
            f"over: {selection.over} needs positions that correspond in all prompts; select positions: last, or prompts of one length, "
            "or over: prompt"
        )
    if selection.over == "any":
        each = np.stack([_kept(size[row], allowed[row], scores.metric[row], selection) for row in prompts])
        kept = np.asarray(each.any(axis=0))
    else:
        mean = size.mean(axis=0)
        possible: Mask = np.asarray(_allowed(scores, selection, n_layers).all(axis=0))
        if selection.sign != "both":
            possible &= (mean > 0) if selection.sign == "positive" else (mean < 0)
        kept = _kept(mean, possible, float(np.abs(scores.metric).mean()), selection)
    return np.broadcast_to(kept, size.shape).copy()


def _allowed(scores: Scores, selection: Selection, n_layers: int | None) -> Mask:
    """Units that pass the filters, (prompt, layer, position, unit)."""
    allowed = ~np.isnan(scores.values)
    if selection.layers != "all":
        size = max(scores.layers) + 1 if n_layers is None else n_layers
        wanted = set(SiteSelection.of(selection.layers).resolve(size, what="layer"))
        allowed[:, [layer not in wanted for layer in scores.layers]] = False
    if selection.drop_first:
        allowed &= (scores.places != 0)[:, None, :, None]
    if selection.drop_last:
        allowed &= (scores.places < scores.lengths[:, None] - selection.drop_last)[:, None, :, None]
    barred = set(selection.barred())
    if selection.universal is not None:
        barred |= universal_units(scores, selection.universal_top, selection.universal)
    for layer, unit in barred:
        if layer in scores.layers and unit < allowed.shape[-1]:
            allowed[:, scores.layers.index(layer), :, unit] = False
    return allowed


def _kept(values: Floats, allowed: Mask, metric: float, selection: Selection) -> Mask:
    """One prompt's (or the mean's) units, (layer, position, unit)."""
    size = np.where(allowed, np.abs(values), 0.0)
    kept = allowed & (size > 0)
    if selection.percent is not None:
        kept &= size >= selection.percent / 100 * abs(metric)
    if selection.share is not None:
        order = ranking(np.where(kept, size, 0.0))
        reached = np.cumsum(size.reshape(-1)[order]) / max(size.sum(), 1e-300)
        count = min(int(np.searchsorted(reached, selection.share - 1e-12)) + 1, len(order))
        kept &= _of_order(order[:count], kept.shape)
    if selection.per_layer is not None:
        for number in range(len(kept)):
            chosen = ranking(np.where(kept[number], size[number], 0.0))[: selection.per_layer]
            kept[number] &= _of_order(chosen, kept[number].shape)
    if selection.top_k is not None:
        kept &= _of_order(ranking(np.where(kept, size, 0.0))[: selection.top_k], kept.shape)
    return kept


def ranking(size: Floats) -> npt.NDArray[np.int64]:
    """Flat indices of the largest values first; equal ones in the order of their indices."""
    return np.argsort(-size.reshape(-1), kind="stable")


def _of_order(chosen: npt.NDArray[np.int64], shape: tuple[int, ...]) -> Mask:
    mask = np.zeros(int(np.prod(shape)), dtype=bool)
    mask[chosen] = True
    return mask.reshape(shape)


def universal_units(scores: Scores, top: int, share: float) -> set[UnitAt]:
    """Units, (layer, unit), among the ``top`` strongest (whatever the position) in at least ``share`` of the prompts."""
    strongest = np.nan_to_num(np.abs(scores.values)).max(axis=2)
    counts = np.zeros(strongest.shape[1:], dtype=np.int64)
    for row in strongest:
        counts += _of_order(ranking(row)[:top], row.shape) & (row > 0)
    often = np.argwhere(counts >= share * len(strongest) - 1e-9)
    return {(scores.layers[layer], int(unit)) for layer, unit in often}


def universal_neurons(
    tree: xr.DataTree, *, method: str = "relp", component: str = "mlp_neurons", top_k: int = 100, share: float = 0.5
) -> tuple[UnitAt, ...]:
    """(layer, unit) that are among the ``top_k`` strongest in at least ``share`` of a run's prompts: a blacklist to be."""
    return tuple(sorted(universal_units(Scores.of(tree, component, method), top_k, share)))


def select(
    tree: xr.DataTree,
    selection: Selection | None = None,
    *,
    component: str = "mlp_neurons",
    prompt: int | None = None,
    **changes: Any,
) -> Circuit:
    """A circuit from a run's stored attributions.

    Args:
        tree: what `nsp.experiments.attribution` returned, or the tree of an opened run.
        selection: how units are chosen; ``changes`` are its fields, put on top (``top_k=50``).
        prompt: whose circuit, where each prompt has its own; by default the only prompt.

    Positions of a prompt's own circuit count from 0, those of a circuit of many prompts from the end where that is what they share.
    """
    given = {} if selection is None else selection.model_dump(exclude_unset=True)
    chosen = checked(Selection, {**given, **changes}, "select")
    scores = Scores.of(tree, component, chosen.method)
    count = len(scores.values)
    if chosen.over == "prompt" and prompt is None and count > 1:
        raise InputError(f"this run has {count} prompts; say which one's circuit (prompt=0), or over='mean' or 'any'")
    row = 0 if prompt is None else prompt
    if not 0 <= row < count:
        raise InputError(f"prompt {row}: this run has prompts 0 to {count - 1}")
    mask = select_mask(scores, chosen)[row]
    if chosen.over == "prompt":
        values, places = scores.values[row], [int(place) for place in scores.places[row]]
    else:
        values, places = np.nan_to_num(scores.values).mean(axis=0), scores.shared_places() or []
    units = tuple(
        CircuitUnit(scores.layers[layer], places[place], int(unit), float(values[layer, place, unit]))
        for layer, place, unit in np.argwhere(mask)
    )
    return Circuit(units, component, **_labels(tree, chosen, row, scores))


def _labels(tree: xr.DataTree, chosen: Selection, row: int, scores: Scores) -> dict[str, Any]:
    inputs, baseline = tree["inputs"].to_dataset(), tree["baseline"].to_dataset()
    own = chosen.over == "prompt" or len(scores.values) == 1
    metric = str(next(iter(baseline.data_vars)))
    attrs = tree.attrs
    resolved = attrs.get("recipe_resolved") or {}
    provenance = {
        "method": chosen.method,
        "donor": resolved.get("donor"),
        "selection": chosen.model_dump(mode="json"),
        "prompts": len(scores.values),
        "plan_hash": attrs.get("plan_hash"),
        "model": {
            key: value for key, value in (attrs.get("model") or {}).items() if key in ("name", "weights_hash", "dtype")
        },
    }
    return {
        "prompt": str(inputs["text"].values[row]) if own else "",
        "target": str(inputs["target"].values[row]) if own else "",
        "counterfactual": str(inputs["counterfactual"].values[row]) if own else "",
        "metric": metric,
        "metric_value": float(scores.metric[row] if own else scores.metric.mean()),
        "provenance": provenance,
    }
