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
from nsp.experiments.labels import index_coord
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
    width, neurons, layers = model.geometry.d_model, model.geometry.d_mlp, vectors.layers
    check_stream(model, vectors)
    steps = min(steps, width, neurons)
    cosine = np.full((len(layers), neurons), np.nan, np.float32)
    coefficient = cosine.copy()
    order = np.full((len(layers), steps), -1, np.int64)
    explained, chance = (np.full((len(layers), steps), np.nan, np.float32) for _ in range(2))
    for row, layer in enumerate(layers):
        columns, vector = down_columns(model, layer), vectors.at(layer)
        projected = columns @ vector
        norms = np.linalg.norm(columns, axis=1)
        length = np.linalg.norm(vector)
        cosine[row] = np.divide(projected, norms * length, out=np.zeros_like(projected), where=norms * length > 0)
        coefficient[row] = np.divide(projected, norms**2, out=np.zeros_like(projected), where=norms > 0)
        pursuit = pursue(vector, columns, steps)
        order[row], explained[row] = pursuit.neurons, pursuit.explained
        chance[row] = _chance(vector, columns, steps, layer)
    return decomposition_dataset(layers, cosine, coefficient, order, explained, chance)


def decomposition_dataset(
    layers: Sequence[int], cosine: np.ndarray, coefficient: np.ndarray, order: np.ndarray, explained: np.ndarray, chance: np.ndarray
) -> xr.Dataset:
    """The labelled form of `decompose`, also as an empty template."""
    way = "orthogonal matching pursuit on the down projection's columns"
    both, path = ("layer", "neuron"), ("layer", "step")
    share = "share of the control vector's squared length that the first neurons explain"
    variables = {
        "cosine": (both, cosine, "cosine of the control vector with the neuron's output direction", "1", "projection"),
        "coefficient": (both, coefficient, "activation that the neuron would have, were it alone", "activation", "projection"),
        "pursuit_neuron": (path, order, "neuron taken at each step", "1", way),
        "explained": (path, explained, share, "1", way),
        "by_chance": (path, chance, f"{share}, for as many neurons drawn at random", "1", f"mean of {_DRAWS} draws, seed of the layer"),
    }  # fmt: skip
    coords = {
        "layer": index_coord("layer", list(layers), "layer"),
        "neuron": index_coord("neuron", cosine.shape[1], "neuron"),
        "step": index_coord("step", order.shape[1], "neurons taken, less one"),
    }
    labelled = {name: (dims, data, {"long_name": text, "units": unit, "method": how}) for name, (dims, data, text, unit, how) in variables.items()}
    return xr.Dataset(labelled, coords)


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
    return comparison_dataset(layers, np.array(rows, dtype=np.float64), attrs)


def _rank(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its p; NaN with fewer than three values, or where all are equal."""
    if len(left) < 3 or min(len(set(left)), len(set(right))) < 2:
        return float("nan"), float("nan")
    correlation = stats.spearmanr(left, right)
    return float(correlation.statistic), float(correlation.pvalue)


def comparison_dataset(layers: Sequence[int], rows: np.ndarray, attrs: dict[str, float]) -> xr.Dataset:
    """The labelled form of `compare`; ``rows`` has dims (layer, 4)."""
    counts, shared, explained, chance = rows.T
    share = np.divide(shared, counts, out=np.full(len(rows), np.nan), where=counts > 0)
    way = "circuit against the projections of the control vector on the down projection's columns"
    columns = {
        "circuit_neurons": (counts.astype(np.int64), "neurons of the circuit in the layer"),
        "shared": (shared.astype(np.int64), "of these, among as many neurons that the control vector projects on most"),
        "overlap": (share, "share of these neurons (NaN: no neuron in the layer)"),
        "explained": (explained, "share of the control vector's squared length in the span of the circuit's neurons"),
        "by_chance": (chance, "the same for as many neurons drawn at random"),
    }
    variables = {name: (("layer",), data, {"long_name": text, "units": "1", "method": way}) for name, (data, text) in columns.items()}
    return xr.Dataset(variables, {"layer": index_coord("layer", list(layers), "layer")}, attrs)
