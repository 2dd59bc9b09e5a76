"""Control vectors: the direction from one set of prompts to another, at each layer.

``mean_difference`` is the mean over the positive set minus the mean over the negative one (Turner et al. 2023;
Rimsky et al. 2024), with its own length, so that a multiplier of 1 adds as much as separates the sets. ``pca`` is the
first principal direction of the differences of paired prompts, through the origin (Zou et al. 2023), signed and scaled
so that its length is the mean difference along it.

Separation is measured on held-out prompts: each prompt (or pair) is scored by the vector of all the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr

from nsp.errors import InputError
from nsp.experiments.contrast.statistics import cohen_d
from nsp.interventions import Inject, array_from_dict, array_to_dict, inject
from nsp.sites import Site

VectorMethod: TypeAlias = Literal["mean_difference", "pca"]
VECTOR_METHODS: tuple[str, ...] = get_args(VectorMethod)
# Components whose tensor holds nothing else, so that a vector of their width is a vector at the site.
VECTOR_COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_neurons")


@dataclass(frozen=True, eq=False)
class ControlVectors:
    """One vector per layer.

    Attributes:
        component: what the vectors are added to; ``layers`` the layers they belong to.
        values: float32 with dims (layer, neuron).
        method: how they were made; ``name`` what they are called.
    """

    component: str
    layers: tuple[int, ...]
    values: np.ndarray
    method: str = "given"
    name: str = "control vector"

    def __post_init__(self) -> None:
        if self.component not in VECTOR_COMPONENTS:
            raise InputError(f"control vectors are of {', '.join(VECTOR_COMPONENTS)}, not {self.component!r}")
        if self.values.ndim != 2 or len(self.values) != len(self.layers):
            raise InputError(
                f"control vectors of {len(self.layers)} layers have dims (layer, neuron), not the shape {self.values.shape}"
            )
        if not np.isfinite(self.values).all():
            raise InputError("the control vectors hold NaN or infinity")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ControlVectors):
            return NotImplemented
        mine, theirs = (replace(vectors, values=np.zeros((len(vectors.layers), 0))) for vectors in (self, other))
        same = (mine.component, mine.layers, mine.method, mine.name) == (
            theirs.component, theirs.layers, theirs.method, theirs.name,
        )  # fmt: skip
        return same and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.component, self.layers, self.method, self.name, self.values.tobytes()))

    def at(self, layer: int) -> np.ndarray:
        """The vector of one layer, dim (neuron)."""
        if layer not in self.layers:
            raise InputError(f"no control vector for layer {layer}; layers: {', '.join(map(str, self.layers))}")
        return np.asarray(self.values[self.layers.index(layer)])

    def select(self, layers: Sequence[int]) -> ControlVectors:
        """The vectors of some layers alone."""
        return replace(self, layers=tuple(layers), values=np.stack([self.at(layer) for layer in layers]))

    def interventions(self, positions: str = "*") -> tuple[Inject, ...]:
        """Adding each vector at its layer, with coefficient 1, at the selected positions."""
        return tuple(
            inject(Site.of(self.component, layer, positions=positions), torch.tensor(vector))
            for layer, vector in zip(self.layers, self.values, strict=True)
        )

    def to_dataset(self) -> xr.Dataset:
        """``vector`` with dims (layer, neuron)."""
        attrs = {"long_name": f"{self.name}: control vector of {self.component}", "units": "activation", "method": self.method}
        return xr.Dataset({"vector": (("layer", "neuron"), self.values, attrs)}, _coords(self.layers, self.values.shape[1]))

    def to_dict(self) -> dict[str, Any]:
        """The vectors as plain data that JSON can hold."""
        return {
            "component": self.component,
            "layers": list(self.layers),
            "values": array_to_dict(torch.tensor(self.values)),
            "method": self.method,
            "name": self.name,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ControlVectors:
        """The vectors that `to_dict` wrote."""
        values = array_from_dict(data["values"]).numpy()
        return cls(data["component"], tuple(data["layers"]), values, data["method"], data["name"])


def control_vectors(
    tree: xr.DataTree, component: str = "resid_post", layers: Sequence[int] | None = None
) -> ControlVectors:
    """The control vectors of a contrast's results (from `nsp.experiments.contrast`, or `nsp.open_run(...).tree`).

    Raises:
        InputError: the results hold no vectors of the component, or of one of the layers.
    """
    compared = tree["attribution"].children if "attribution" in tree.children else {}
    known = [name for name in compared if not name.endswith("-neurons")]
    if component not in known:
        raise InputError(f"these results hold no control vectors of {component}; they have {', '.join(known) or 'none'}")
    vector = compared[component].to_dataset()["vector"].load()
    recipe = tree.attrs.get("recipe_resolved", {})
    name = str((recipe.get("name") if isinstance(recipe, Mapping) else None) or "contrast")
    values, method = np.asarray(vector.values, dtype=np.float32), str(vector.attrs["method"])
    vectors = ControlVectors(component, tuple(map(int, vector["layer"].values)), values, method, name)
    return vectors if layers is None else vectors.select(layers)


def _coords(layers: Sequence[int], width: int) -> dict[str, xr.Variable]:
    return {
        "layer": xr.Variable(("layer",), np.asarray(layers, dtype=np.int64), {"long_name": "layer"}),
        "neuron": xr.Variable(("neuron",), np.arange(width), {"long_name": "column of the component"}),
    }


def vectors_of(
    positive: np.ndarray, negative: np.ndarray, method: VectorMethod = "mean_difference"
) -> tuple[np.ndarray, np.ndarray]:
    """Control vectors of two sets of activations with dims (prompt, layer, neuron).

    Returns the vectors (layer, neuron), float32, and the share of the differences' squared length that lies along each
    (layer,): for ``pca`` the explained variance about the origin; NaN for sets that are not paired.
    """
    high, low = positive.astype(np.float64), negative.astype(np.float64)
    mean = high.mean(axis=0) - low.mean(axis=0)
    paired = len(high) == len(low)
    if method == "pca":
        if not paired or len(high) < 2:
            raise InputError(
                f"pca takes the differences of paired prompts, so two or more in each set and equally many; there are {len(high)} "
                f"and {len(low)} (mean_difference has no such need)"
            )
        directions = [_first_direction(high[:, layer] - low[:, layer], mean[layer]) for layer in range(high.shape[1])]
        vectors = np.stack([direction * (direction @ mean[layer]) for layer, direction in enumerate(directions)])
    elif method == "mean_difference":
        vectors = mean
    else:
        raise InputError(f"a control vector's method is one of {', '.join(VECTOR_METHODS)}, not {method!r}")
    share = np.full(high.shape[1], np.nan)
    if paired:
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
        differences = high - low
        along = np.einsum("pln,ln->pl", differences, unit) ** 2
        total = (differences**2).sum(axis=(0, 2))
        share = np.divide(along.sum(axis=0), total, out=share, where=total > 0)
    return vectors.astype(np.float32), share


def _first_direction(differences: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The unit direction with the largest mean square of (pair, neuron) differences, pointing along their mean."""
    _, _, right = np.linalg.svd(differences, full_matrices=False)
    return np.asarray(right[0] if right[0] @ mean >= 0 else -right[0])


def separation(positive: np.ndarray, negative: np.ndarray, *, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """How well mean-difference vectors tell held-out prompts apart, at each layer.

    Each prompt (with its partner, where they are paired) is projected on the unit vector of all the other prompts and
    measured from the midpoint of their means. Returns Cohen's d of these scores (layer,) and the share of prompts on
    the right side (layer,); NaN with fewer than three prompts in a set.
    """
    high, low = positive.astype(np.float64), negative.astype(np.float64)
    layers = high.shape[1]
    if min(len(high), len(low)) < 3:
        return np.full(layers, np.nan), np.full(layers, np.nan)
    scores_high = np.stack([_held_out(high, low, row, None if not paired else row, high[row]) for row in range(len(high))])
    scores_low = np.stack([_held_out(high, low, None if not paired else row, row, low[row]) for row in range(len(low))])
    right = (scores_high > 0).mean(axis=0) * len(high) + (scores_low < 0).mean(axis=0) * len(low)
    return cohen_d(scores_high, scores_low), right / (len(high) + len(low))


def _held_out(high: np.ndarray, low: np.ndarray, without_high: int | None, without_low: int | None, held_out: np.ndarray) -> np.ndarray:
    """The score (layer,) of one prompt's activations by the vectors of the others."""
    above, below = _mean_without(high, without_high), _mean_without(low, without_low)
    vector = above - below
    length = np.linalg.norm(vector, axis=1)
    score = ((held_out - (above + below) / 2) * vector).sum(axis=1)
    return np.asarray(np.divide(score, length, out=np.zeros_like(score), where=length > 0))


def _mean_without(values: np.ndarray, row: int | None) -> np.ndarray:
    return np.asarray(values.mean(axis=0) if row is None else (values.sum(axis=0) - values[row]) / (len(values) - 1))
