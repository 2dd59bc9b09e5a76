"""What an alignment scan says: the neurons that it selected, from its store (or that of a bias scan with ``alignment``)."""

from __future__ import annotations

import xarray as xr

from nsp.experiments.alignment_scan.activations import GROUP
from nsp.experiments.alignment_scan.select import AlignmentNeurons, alignment_neurons, neuron_table
from nsp.report.summary import Summary, SummaryTable

_SHOWN = 15


def summarise(tree: xr.DataTree) -> Summary:
    """The selected neurons of a run, from its store."""
    if bool(tree[GROUP]["value"].isnull().any()):
        return Summary("alignment scan", ("the scan is not finished; run the recipe again to go on",))
    neurons = alignment_neurons(tree)
    model = tree.attrs.get("model", {})
    lines = [f"model {model.get('name', '?')} ({model.get('dtype', '?')})", *alignment_lines(tree, neurons)]
    return Summary("alignment scan", tuple(lines), (shown_neurons(neurons),))


def headline(tree: xr.DataTree) -> str:
    """How many neurons were found, for `nsp ls`."""
    neurons = alignment_neurons(tree)
    selected, confirmed = int(neurons.selected.sum()), int(neurons.confirmed.sum())
    return f"{selected} of {len(neurons.layer)} neurons selected, {confirmed} confirmed"


def alignment_lines(tree: xr.DataTree, neurons: AlignmentNeurons) -> list[str]:
    """What a scan found, in sentences."""
    attrs = tree[GROUP].attrs
    searched, held = neurons.searched, neurons.held
    lines = [
        f"{attrs['source']}: searched on {searched.n_harmful} harmful and {searched.n_normal} normal prompts, tried on "
        f"{held.n_harmful} and {held.n_normal} held out",
        f"{len(neurons.layer)} neurons: {int(neurons.selected.sum())} selected (precision at least {attrs['min_precision']:g}, "
        f"Benjamini-Hochberg at {attrs['level']:g}), {int(neurons.confirmed.sum())} confirmed on the held-out prompts",
    ]
    if not neurons.selected.any():
        lines.append("no neuron passes; the table shows those that came nearest")
    return lines


def shown_neurons(neurons: AlignmentNeurons) -> SummaryTable:
    """The table of a summary: fewer columns and rows than the csv file has."""
    names = ("layer", "neuron", "precision", "recall", "lift", "q", "held_precision", "held_recall", "confirmed")
    some = neurons.selected.any()
    title = "neurons that fire on harmful prompts" if some else "neurons of least p-value, none selected"
    return neuron_table(neurons, _SHOWN).only(names, title)


def tables(tree: xr.DataTree) -> list[SummaryTable]:
    """The tables of `nsp export STORE --csv DIR`."""
    return [neuron_table(alignment_neurons(tree))]
