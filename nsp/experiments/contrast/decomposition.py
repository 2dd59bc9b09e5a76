"""A control vector in terms of MLP neurons: how much of it the neurons' output directions make up.

Neuron ``n`` of layer ``l`` adds its activation times column ``n`` of the down projection to the residual stream. A
vector of the stream is compared with those columns: by cosine, by the coefficient that each would have alone, and by
orthogonal matching pursuit (Pati et al. 1993), which takes the best-fitting neuron, fits all taken so far by least
squares, and goes on with what is left.

Limits: a layer has more neurons than the stream has dims, so least squares on all columns fits every vector exactly
and says nothing; what speaks is how much *few* neurons explain, beside ``by_chance``, as many columns drawn at random.
Where a family puts a norm after its MLP (Gemma 2 and 3, OLMo 2), columns are directions before that norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from nsp.engine.output_directions import output_directions
from nsp.errors import InputError
from nsp.experiments.circuits import Circuit
from nsp.experiments.contrast.vectors import ControlVectors
from nsp.experiments.labels import Group, Variable, index_coord
from nsp.model import Model

# Random draws of columns that chance is estimated from.
_DRAWS = 20


def down_columns(model: Model, layer: int) -> np.ndarray:
    """The output direction of every neuron of a layer, float32 with dims (neuron, width of the residual stream)."""
    directions = output_directions(model.runtime, "mlp_neurons", layer).float().cpu().numpy()
    return np.asarray(directions * np.float32(model.geometry.residual_multiplier))


@dataclass(frozen=True)
class Pursuit:
    """Neurons in the order in which orthogonal matching pursuit took them.

    Attributes:
        neurons: (step,); ``explained`` (step,) the share of the vector's squared length that the first so many explain;
        coefficients: (step,) least-squares activations of all of them together.
    """

    neurons: np.ndarray
    explained: np.ndarray
    coefficients: np.ndarray


def pursue(vector: np.ndarray, columns: np.ndarray, steps: int) -> Pursuit:
    """Orthogonal matching pursuit of a vector (width,) on columns (neuron, width)."""
    steps = min(steps, *columns.shape)
    target = vector.astype(np.float64)
    length = float(target @ target)
    norms = np.linalg.norm(columns, axis=1)
    unit = np.divide(columns, norms[:, None], out=np.zeros_like(columns), where=norms[:, None] > 0)
    taken: list[int] = []
    explained = np.full(steps, np.nan)
    coefficients: np.ndarray = np.zeros(steps)
    basis = np.zeros((steps, len(target)))
    residual = target.copy()
    for step in range(steps):
        score = np.abs(unit @ residual)
        score[taken] = -1.0
        taken.append(int(score.argmax()))
        # One Gram-Schmidt step (twice, for rounding) is the least-squares fit of all columns taken so far.
        new = unit[taken[-1]].astype(np.float64)
        for _ in range(2):
            new = new - basis[:step].T @ (basis[:step] @ new)
        size = np.linalg.norm(new)
        basis[step] = new / size if size > 1e-9 else 0.0
        residual = residual - basis[step] * (basis[step] @ residual)
        explained[step] = 1.0 - float(residual @ residual) / length if length > 0 else np.nan
    if taken:
        coefficients, *_ = np.linalg.lstsq(columns[taken].astype(np.float64).T, target, rcond=None)
    return Pursuit(np.array(taken, dtype=np.int64), explained, coefficients)


def explained_by(vector: np.ndarray, columns: np.ndarray) -> float:
    """The share of a vector's squared length that lies in the span of some columns (neuron, width)."""
    target = vector.astype(np.float64)
    if not len(columns) or not target @ target > 0:
        return 0.0
    fitted, *_ = np.linalg.lstsq(columns.astype(np.float64).T, target, rcond=None)
    residual = target - columns.astype(np.float64).T @ fitted
    return 1.0 - float(residual @ residual) / float(target @ target)


def decompose(model: Model, vectors: ControlVectors, *, steps: int = 50) -> xr.Dataset:
    """Each layer's control vector on the down projection's columns of that layer.

    ``cosine`` and ``coefficient`` (what the neuron's activation would be, were it alone) with dims (layer, neuron);
    ``pursuit_neuron``, ``explained`` and ``by_chance`` with dims (layer, step). InputError where the vectors are not of
    the residual stream's width.
    """
    geometry, layers = model.geometry, vectors.layers
    check_stream(model, vectors)
    steps = min(steps, geometry.d_model, geometry.d_mlp)
    values: dict[str, list[np.ndarray]] = {"cosine": [], "coefficient": [], "pursuit_neuron": [], "explained": [], "by_chance": []}
    for layer in layers:
        columns, vector = down_columns(model, layer), vectors.at(layer)
        projected = columns @ vector
        norms = np.linalg.norm(columns, axis=1)
        length = np.linalg.norm(vector)
        pursuit = pursue(vector, columns, steps)
        values["cosine"].append(np.divide(projected, norms * length, out=np.zeros_like(projected), where=norms * length > 0))
        values["coefficient"].append(np.divide(projected, norms**2, out=np.zeros_like(projected), where=norms > 0))
        values["pursuit_neuron"].append(pursuit.neurons)
        values["explained"].append(pursuit.explained)
        values["by_chance"].append(_chance(vector, columns, steps, layer))
    return decomposition_group(layers, geometry.d_mlp, steps).filled(values)


def decomposition_group(layers: Sequence[int], neurons: int, steps: int) -> Group:
    """The labels of `decompose`."""
    way = "orthogonal matching pursuit on the down projection's columns"
    both, path = ("layer", "neuron"), ("layer", "step")
    share = "share of the control vector's squared length that the first neurons explain"
    alone = "activation that the neuron would have, were it alone"
    chance = f"{share}, for as many neurons drawn at random"
    variables = {
        "cosine": Variable(both, "cosine of the control vector with the neuron's output direction", "1", "projection"),
        "coefficient": Variable(both, alone, "activation", "projection"),
        "pursuit_neuron": Variable(path, "neuron taken at each step", "1", way, np.int64),
        "explained": Variable(path, share, "1", way),
        "by_chance": Variable(path, chance, "1", f"mean of {_DRAWS} draws, seed of the layer"),
    }
    coords = {
        "layer": index_coord("layer", list(layers), "layer"),
        "neuron": index_coord("neuron", neurons, "neuron"),
        "step": index_coord("step", steps, "neurons taken, less one"),
    }
    return Group(variables, coords)


def _chance(vector: np.ndarray, columns: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Mean share explained by random columns, (step,)."""
    generator = np.random.default_rng(seed)
    total = np.zeros(steps)
    target = vector.astype(np.float64)
    length = float(target @ target)
    for _ in range(_DRAWS):
        chosen = generator.choice(len(columns), steps, replace=False)
        basis, _ = np.linalg.qr(columns[chosen].astype(np.float64).T)
        total += np.cumsum((basis.T @ target) ** 2)
    return total / _DRAWS / length if length > 0 else np.full(steps, np.nan)


def check_stream(model: Model, vectors: ControlVectors) -> None:
    """InputError where vectors are not of the residual stream."""
    if vectors.component == "mlp_neurons" or vectors.values.shape[1] != model.geometry.d_model:
        raise InputError(f"vectors of {vectors.component} are no directions of the residual stream; take resid_post or mlp_out")


def compare(model: Model, circuit: Circuit, vectors: ControlVectors, *, top: int = 50) -> xr.Dataset:
    """A circuit of MLP neurons beside control vectors of the same layers.

    With dim (layer,), for every layer of the vectors: ``circuit_neurons``; ``shared``, of the layer's circuit neurons
    those among as many neurons with the largest |projection| on the vector; ``overlap`` their share; ``explained``, the
    share of the vector's squared length in the span of the circuit's neurons, beside ``by_chance``. Attributes:
    ``top_overlap`` (share of the circuit's ``top`` strongest neurons among the ``top`` with the largest |projection|
    anywhere) and ``rank_correlation`` (Spearman, |value| in the circuit against |projection|, with its p).

    Neurons are counted once whatever their positions. A vector of neuron activations is compared entry by entry, each
    times the length of the neuron's output direction.
    """
    if circuit.component != "mlp_neurons":
        raise InputError(f"a circuit of {circuit.component} has no neurons to compare with a control vector")
    merged = circuit.everywhere()
    by_layer = merged.by_layer()
    layers = vectors.layers
    known = [layer for layer in by_layer if layer in layers]
    if not known:
        raise InputError(f"circuit and control vectors share no layer: {sorted(by_layer)} and {list(layers)}")
    projection, rows = {}, []
    for layer in layers:
        columns, vector = down_columns(model, layer), vectors.at(layer)
        norms = np.linalg.norm(columns, axis=1)
        entries = vectors.component == "mlp_neurons"
        direct = vector * norms if entries else np.divide(columns @ vector, norms, out=np.zeros(len(columns)), where=norms > 0)
        projection[layer] = np.abs(direct)
        own = [unit.unit for unit in by_layer.get(layer, ())]
        best = set(np.argsort(-projection[layer], kind="stable")[: len(own)].tolist())
        stream = vector @ columns if entries else vector
        chance = float(_chance(stream, columns, len(own), layer)[-1]) if own else 0.0
        rows.append((len(own), len(best & set(own)), explained_by(stream, columns[own]), chance))
    strongest = {(unit.layer, unit.unit) for unit in merged.top(top)}
    size = len(strongest)
    ranked = sorted(((-float(value), layer, n) for layer in layers for n, value in enumerate(projection[layer])))[:size]
    inside = [unit for unit in merged if unit.layer in projection]
    correlation, p = _rank([abs(unit.value) for unit in inside], [projection[unit.layer][unit.unit] for unit in inside])
    attrs = {
        "top": size,
        "top_overlap": len(strongest & {(layer, n) for _, layer, n in ranked}) / max(1, size),
        "rank_correlation": correlation,
        "rank_correlation_p": p,
    }
    counts, shared, explained, by_chance = np.array(rows, dtype=np.float64).T
    overlap = np.divide(shared, counts, out=np.full(len(rows), np.nan), where=counts > 0)
    values = {
        "circuit_neurons": counts, "shared": shared, "overlap": overlap, "explained": explained, "by_chance": by_chance,
    }  # fmt: skip
    return comparison_group(layers).filled(values).assign_attrs(attrs)


def _rank(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its p; NaN with fewer than three values, or where all are equal."""
    if len(left) < 3 or min(len(set(left)), len(set(right))) < 2:
        return float("nan"), float("nan")
    correlation = stats.spearmanr(left, right)
    return float(correlation.statistic), float(correlation.pvalue)


def comparison_group(layers: Sequence[int]) -> Group:
    """The labels of `compare`."""
    way = "circuit against the projections of the control vector on the down projection's columns"
    meanings = {
        "circuit_neurons": ("neurons of the circuit in the layer", np.int64),
        "shared": ("of these, among as many neurons that the control vector projects on most", np.int64),
        "overlap": ("share of these neurons (NaN: no neuron in the layer)", np.float64),
        "explained": ("share of the control vector's squared length in the span of the circuit's neurons", np.float64),
        "by_chance": ("the same for as many neurons drawn at random", np.float64),
    }
    variables = {name: Variable(("layer",), meaning, "1", way, dtype) for name, (meaning, dtype) in meanings.items()}
    return Group(variables, {"layer": index_coord("layer", list(layers), "layer")})
