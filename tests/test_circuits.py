"""Circuits as values: set algebra, files, stores, the older JSON form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import xarray as xr

import nsp
from nsp.errors import InputError
from nsp.experiments.circuits import Circuit, CircuitUnit

LEFT = Circuit(
    (CircuitUnit(3, -1, 7, 0.5), CircuitUnit(1, -1, 2, -2.0, "negation"), CircuitUnit(3, 4, 7, 0.25)),
    prompt="a b", target=" c", counterfactual=" d", metric="logit_diff", metric_value=3.5, name="left",
    provenance={"method": "relp", "donor": "zero"},
)  # fmt: skip
RIGHT = Circuit((CircuitUnit(3, -1, 7, 9.0), CircuitUnit(2, None, 0, 1.0)), prompt="a b", provenance={"method": "atp"})


def test_units_are_strongest_first_and_each_occurs_once() -> None:
    assert [unit.value for unit in LEFT] == [-2.0, 0.5, 0.25]
    assert (3, -1, 7) in LEFT
    assert (3, -1, 8) not in LEFT
    with pytest.raises(InputError, match="each unit once"):
        Circuit((CircuitUnit(1, 0, 1, 1.0), CircuitUnit(1, 0, 1, 2.0)))
    with pytest.raises(InputError, match="nan"):
        Circuit((CircuitUnit(1, 0, 1, math.nan),))
    with pytest.raises(InputError, match="no heads or neurons"):
        Circuit((), component="resid_post")


def test_set_algebra_keeps_the_left_values_and_says_where_it_is_from() -> None:
    union, both, rest = LEFT | RIGHT, LEFT & RIGHT, LEFT - RIGHT
    assert union.keys == LEFT.keys | RIGHT.keys
    assert both.units == (CircuitUnit(3, -1, 7, 0.5),)
    assert rest.keys == {(1, -1, 2), (3, 4, 7)}
    assert (union.prompt, union.target) == ("a b", "")
    assert union.provenance == {"operation": "union", "left": LEFT.provenance, "right": RIGHT.provenance}
    assert (both | rest).keys == LEFT.keys
    found = LEFT.overlap(RIGHT)
    assert found == (1, 2, 1, 0.25, {3: 1})
    with pytest.raises(InputError, match="share no units"):
        LEFT.union(Circuit((), component="z"))


def test_views_of_a_circuit() -> None:
    assert {layer: len(units) for layer, units in LEFT.by_layer().items()} == {1: 1, 3: 2}
    assert LEFT.unique_neurons() == ((1, 2), (3, 7))
    assert LEFT.top(1).units == (CircuitUnit(1, -1, 2, -2.0, "negation"),)
    assert LEFT.where(layers=[3], positions=[4]).units == (CircuitUnit(3, 4, 7, 0.25),)
    assert LEFT.at(6).keys == {(1, 5, 2), (3, 5, 7), (3, 4, 7)}
    with pytest.raises(InputError, match="position 4; the prompt has 4 tokens"):
        LEFT.at(4)
    assert LEFT.everywhere().keys == {(1, None, 2), (3, None, 7)}
    assert {unit.unit: unit.value for unit in LEFT.everywhere()} == {7: 0.75, 2: -2.0}
    assert LEFT.sites() == ("mlp_neurons[1][2] @ -1", "mlp_neurons[3][7] @ -1", "mlp_neurons[3][7] @ 4")
    assert RIGHT.sites()[0] == "mlp_neurons[2][0] @ *"
    assert all(str(nsp.Site.parse(site)) for site in LEFT.sites() + RIGHT.sites())


@pytest.mark.parametrize("circuit", [LEFT, RIGHT, Circuit((), component="z")])
def test_json_and_store_give_the_circuit_back(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path / "c.json")
    back = Circuit.load(tmp_path / "c.json")
    assert repr(back) == repr(circuit)  # NaN is not equal to itself
    tree = xr.DataTree.from_dict({"circuit/found": circuit.to_dataset()})
    assert repr(Circuit.from_dataset(tree["circuit/found"].to_dataset())) == repr(circuit)


def test_a_circuit_passes_the_stores_schema() -> None:
    from nsp.stores import schema

    assert schema.check_tree(xr.DataTree.from_dict({"circuit/found": LEFT.to_dataset()})) == []


def test_the_older_form_there_and_back(tmp_path: Path) -> None:
    older = {
        "neurons": {"23,7,8079": 1.5, "5,0,11": -0.25},
        "prompt": "The capital of Texas is",
        "target_token": " Austin",
        "total_logit_diff": 4.25,
    }
    (tmp_path / "older.json").write_text(json.dumps(older), encoding="utf-8")
    circuit = Circuit.load(tmp_path / "older.json")
    assert circuit.keys == {(23, 7, 8079), (5, 0, 11)}
    assert (circuit.target, circuit.metric_value) == (" Austin", 4.25)
    assert circuit.to_older() == older
    with pytest.raises(InputError, match="positions from 0"):
        LEFT.to_older()
    assert set(LEFT.at(6).to_older()["neurons"]) == {"1,5,2", "3,5,7", "3,4,7"}
    with pytest.raises(InputError, match="holds MLP neurons"):
        Circuit((), component="z").to_older()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no circuit"),
        ('{"neurons": {}}', "missing"),
        ('{"neurons": {"1,2": 1.0}, "prompt": "", "target_token": "", "total_logit_diff": 0}', "layer,position,neuron"),
        ('{"format": "nsp circuit", "version": 2}', "version 2"),
        ('{"format": "nsp circuit", "version": 1, "units": [[1]]}', "damaged"),
    ],
)
def test_a_wrong_file_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Circuit.from_json(text)
