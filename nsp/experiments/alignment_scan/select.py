"""Which neurons fire on harmful prompts and not on normal ones: thresholds, counts, tests, and the held-out half.

The model: on normal prompts a neuron's value has a mean and a standard deviation; it *fires* on a prompt where its value
is above mean + sigma x standard deviation. On the searched half, each neuron has a precision (the share of harmful ones
among the prompts on which it fires), a recall (the share of the harmful prompts on which it fires), a lift (precision
over the share of harmful prompts) and a p-value: the chance of at least so many harmful prompts among those on which it
fires, were they drawn at random (hypergeometric, which is Fisher's one-sided exact test). Selected are neurons with
precision at least ``min_precision`` whose p-values pass Benjamini-Hochberg at ``level`` over every neuron scanned.

On the held-out half nothing is fitted anew: the thresholds stay, and *confirmed* are the selected neurons that keep the
precision and pass Benjamini-Hochberg among the selected.

Limits: the standard deviation is of the very normal prompts whose firing is counted, which favours precision a little on
the searched half; the held-out half has no such favour. Benjamini-Hochberg allows for positive dependence, which neurons
of one layer mostly have. A neuron that fires on harmful prompts need not be about harm: it may be about their words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from nsp.errors import InputError
from nsp.experiments.alignment_scan.activations import GROUP
from nsp.report.summary import SummaryTable


@dataclass(frozen=True, eq=False)
class Firing:
    """How neurons fire on one half of the prompts, arrays with axis (neuron of all layers,)."""

    harmful: np.ndarray
    normal: np.ndarray
    n_harmful: int
    n_normal: int

    @property
    def precision(self) -> np.ndarray:
        """NaN where a neuron never fires."""
        fires = self.harmful + self.normal
        return np.asarray(np.divide(self.harmful, fires, out=np.full(len(fires), np.nan), where=fires > 0))

    @property
    def recall(self) -> np.ndarray:
        return np.asarray(self.harmful / max(1, self.n_harmful))

    @property
    def lift(self) -> np.ndarray:
        return np.asarray(self.precision / (self.n_harmful / (self.n_harmful + self.n_normal)))

    @property
    def p(self) -> np.ndarray:
        """One-sided hypergeometric tail probability of at least ``harmful`` of the firings."""
        total = self.n_harmful + self.n_normal
        pairs, inverse = np.unique(np.stack([self.harmful, self.harmful + self.normal]), axis=1, return_inverse=True)
        tails = stats.hypergeom.sf(pairs[0] - 1, total, self.n_harmful, pairs[1])
        return np.asarray(np.minimum(tails, 1.0)[inverse.reshape(-1)])


@dataclass(frozen=True, eq=False)
class AlignmentNeurons:
    """The result for every neuron scanned, arrays with axis (neuron of all layers,).

    Attributes:
        layer, neuron: where each is.
        threshold, mean, sd: from the normal prompts of the searched half.
        searched, held: firing on each half; ``q``, ``held_q`` corrected p-values, NaN where not in the family.
        selected, confirmed: flags.
    """

    layer: np.ndarray
    neuron: np.ndarray
    threshold: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    searched: Firing
    held: Firing
    q: np.ndarray
    held_q: np.ndarray
    selected: np.ndarray
    confirmed: np.ndarray

    def sites(self, flags: np.ndarray) -> set[tuple[int, int]]:
        """(layer, neuron) of the flagged neurons."""
        return {(int(layer), int(neuron)) for layer, neuron in zip(self.layer[flags], self.neuron[flags], strict=True)}


def select_neurons(
    values: np.ndarray,
    layers: np.ndarray,
    harmful: np.ndarray,
    held_out: np.ndarray,
    *,
    sigma: float,
    min_precision: float,
    level: float,
) -> AlignmentNeurons:
    """Search one half of the prompts and try the result on the other.

    Args:
        values: (prompt, layer, neuron); NaN is an InputError: a scan that is not finished has no result.
        layers: labels of the layer axis; ``harmful``, ``held_out`` flags with axis (prompt,).
    """
    if np.isnan(values).any():
        raise InputError("activations are missing (NaN): the scan is not finished; run the recipe again to go on")
    count = values.shape[2]
    flat = values.reshape(len(values), -1)
    fitted = flat[~harmful & ~held_out].astype(np.float64)
    mean, sd = fitted.mean(axis=0), fitted.std(axis=0, ddof=1 if len(fitted) > 1 else 0)
    threshold = mean + sigma * sd
    fires = flat > threshold
    halves = []
    for half in (~held_out, held_out):
        bad, good = half & harmful, half & ~harmful
        halves.append(Firing(fires[bad].sum(axis=0), fires[good].sum(axis=0), int(bad.sum()), int(good.sum())))
    searched, held = halves
    q = stats.false_discovery_control(searched.p, method="bh")
    selected = (np.nan_to_num(searched.precision, nan=-1.0) >= min_precision) & (q <= level)
    held_q = np.full(len(q), np.nan)
    if selected.any():
        held_q[selected] = stats.false_discovery_control(held.p[selected], method="bh")
    confirmed = (
        selected
        & (np.nan_to_num(held.precision, nan=-1.0) >= min_precision)
        & (np.nan_to_num(held_q, nan=1.0) <= level)
    )
    return AlignmentNeurons(
        np.repeat(np.asarray(layers), count), np.tile(np.arange(count), len(layers)), threshold, mean, sd, searched, held, q, held_q,
        selected, confirmed,
    )  # fmt: skip


def alignment_neurons(tree: xr.DataTree) -> AlignmentNeurons:
    """What a finished scan found, from its store (also the store of a bias scan that had ``alignment``)."""
    dataset = tree[GROUP].to_dataset().load()
    return select_neurons(
        dataset["value"].values,
        dataset["layer"].values,
        dataset["harmful"].values.astype(bool),
        dataset["held_out"].values.astype(bool),
        sigma=float(dataset.attrs["sigma"]),
        min_precision=float(dataset.attrs["min_precision"]),
        level=float(dataset.attrs["level"]),
    )


def neuron_table(neurons: AlignmentNeurons, most: int | None = None) -> SummaryTable:
    """The selected neurons, confirmed ones first, then by p-value; where none is selected, the 20 of least p-value."""
    searched, held = neurons.searched, neurons.held
    chosen = np.flatnonzero(neurons.selected)
    if len(chosen) == 0:
        chosen = np.argsort(searched.p, kind="stable")[:20]
    order = chosen[np.lexsort((-searched.recall[chosen], searched.p[chosen], ~neurons.confirmed[chosen]))][:most]
    columns = {
        "layer": neurons.layer, "neuron": neurons.neuron, "threshold": neurons.threshold, "mean_normal": neurons.mean, "sd_normal": neurons.sd,
        "fires_harmful": searched.harmful, "fires_normal": searched.normal, "precision": searched.precision, "recall": searched.recall,
        "lift": searched.lift, "p": searched.p, "q": neurons.q, "selected": neurons.selected, "held_fires_harmful": held.harmful,
        "held_fires_normal": held.normal, "held_precision": held.precision, "held_recall": held.recall, "held_lift": held.lift,
        "held_p": held.p, "held_q": neurons.held_q, "confirmed": neurons.confirmed,
    }  # fmt: skip
    return SummaryTable.of("alignment_neurons", {name: values[order] for name, values in columns.items()})


@dataclass(frozen=True)
class Overlap:
    """Two sets of neurons and what chance makes of their overlap.

    Attributes:
        population: how many neurons both could have come from; ``shared`` the neurons in both.
        expected: the mean size of the overlap of two random sets of these sizes; ``p`` the chance of at least this one.
    """

    population: int
    first: int
    second: int
    shared: tuple[tuple[int, int], ...]
    expected: float
    p: float


def overlap(first: set[tuple[int, int]], second: set[tuple[int, int]], layers: set[int], neurons: int) -> Overlap:
    """The overlap of two sets of (layer, neuron), among the ``neurons`` of each of ``layers`` (hypergeometric)."""
    inside = [{site for site in sites if site[0] in layers} for sites in (first, second)]
    population = len(layers) * neurons
    shared = tuple(sorted(inside[0] & inside[1]))
    sizes = len(inside[0]), len(inside[1])
    if population == 0:
        return Overlap(0, 0, 0, (), float("nan"), float("nan"))
    p = float(stats.hypergeom.sf(len(shared) - 1, population, sizes[0], sizes[1]))
    return Overlap(population, *sizes, shared, sizes[0] * sizes[1] / population, min(p, 1.0))
