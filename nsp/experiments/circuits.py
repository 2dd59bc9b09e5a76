"""Circuits: a frozen set of units (neurons, heads) at layers and positions, with what each contributes and where it is from.

Sign: a unit's ``value`` is its *contribution*, what the metric loses when the unit is replaced by its donor: positive units
support the target. It is minus the effect, which attributions and exact patching report (donor minus base).

Positions count from 0; a negative one counts from the prompt's end, so that -1 is the last token of prompts of any length;
None is every position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.html import Table, card, ranges
from nsp.sites import component as component_named

FORMAT = "nsp circuit"
OLDER_KEYS = ("neurons", "prompt", "target_token", "total_logit_diff")
Key = tuple[int, int | None, int]  # layer, position, unit
# Every position, in a store, where a number is needed.
_EVERY = np.iinfo(np.int32).min
_TEXTS = ("component", "prompt", "target", "counterfactual", "metric")


class CircuitUnit(NamedTuple):
    """One unit of a circuit: a neuron or head of a layer at a position, its contribution, and a name for people."""

    layer: int
    position: int | None
    unit: int
    value: float
    label: str = ""

    @property
    def key(self) -> Key:
        return (self.layer, self.position, self.unit)


class Overlap(NamedTuple):
    """How two circuits meet: units in both, in one alone, shared / all, and the shared ones of each layer."""

    shared: int
    only_left: int
    only_right: int
    jaccard: float
    by_layer: dict[int, int]


@dataclass(frozen=True)
class Circuit:
    """Units that together carry an answer.

    Attributes:
        units: strongest first (by absolute value; equal values by layer, position, unit); each key occurs once.
        component: whose units they are: mlp_neurons, or z for heads, or any component with units.
        prompt, target, counterfactual: what it was found on, as text; empty where it is of many prompts.
        metric, metric_value: what the contributions are of, and its value in the ordinary run.
        provenance: where it is from: method, donor, selection, model, plan.
    """

    units: tuple[CircuitUnit, ...]
    component: str = "mlp_neurons"
    prompt: str = ""
    target: str = ""
    counterfactual: str = ""
    metric: str = ""
    metric_value: float = math.nan
    name: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if component_named(self.component).unit is None:
            raise InputError(f"{self.component} has no heads or neurons, so no circuit can be made of it")
        units = [_checked(unit) for unit in self.units]
        if len({unit.key for unit in units}) < len(units):
            raise InputError("a circuit names each unit once; two of these have one layer, position and number")
        units.sort(key=lambda unit: (-abs(unit.value), unit.layer, _order(unit.position), unit.unit))
        object.__setattr__(self, "units", tuple(units))

    # --- a set of units ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[CircuitUnit]:
        return iter(self.units)

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    @property
    def keys(self) -> frozenset[Key]:
        return frozenset(unit.key for unit in self.units)

    def union(self, other: Circuit) -> Circuit:
        """Units of either; where both have one, this circuit's value stays."""
        mine = self._alike(other)
        return self._of([*self.units, *(unit for unit in other.units if unit.key not in mine)], "union", other)

    def intersection(self, other: Circuit) -> Circuit:
        """Units of both, with this circuit's values."""
        self._alike(other)
        return self._of([unit for unit in self.units if unit.key in other.keys], "intersection", other)

    def difference(self, other: Circuit) -> Circuit:
        """Units of this one that the other lacks."""
        self._alike(other)
        return self._of([unit for unit in self.units if unit.key not in other.keys], "difference", other)

    __or__, __and__, __sub__ = union, intersection, difference

    def overlap(self, other: Circuit) -> Overlap:
        """How much of two circuits is common."""
        mine = self._alike(other)
        both = mine & other.keys
        layers: dict[int, int] = {}
        for layer, _, _ in sorted(both, key=lambda key: key[0]):
            layers[layer] = layers.get(layer, 0) + 1
        every = len(mine | other.keys)
        shared = len(both)
        return Overlap(shared, len(mine) - shared, len(other) - shared, shared / every if every else 1.0, layers)

    def by_layer(self) -> dict[int, tuple[CircuitUnit, ...]]:
        """Units of each layer that has any, layers ascending, strongest first."""
        layers = sorted({unit.layer for unit in self.units})
        return {layer: tuple(unit for unit in self.units if unit.layer == layer) for layer in layers}

    def unique_neurons(self) -> tuple[tuple[int, int], ...]:
        """(layer, unit) whatever the position, ascending."""
        return tuple(sorted({(unit.layer, unit.unit) for unit in self.units}))

    def top(self, count: int) -> Circuit:
        """The strongest ``count`` units."""
        return replace(self, units=self.units[:count])

    def where(
        self,
        layers: Iterable[int] | None = None,
        units: Iterable[int] | None = None,
        positions: Iterable[int | None] | None = None,
    ) -> Circuit:
        """The units of some layers, numbers and positions."""
        wanted = [None if given is None else set(given) for given in (layers, positions, units)]
        kept = [
            unit
            for unit in self.units
            if all(allowed is None or part in allowed for allowed, part in zip(wanted, unit.key, strict=True))
        ]
        return replace(self, units=tuple(kept))

    def at(self, length: int) -> Circuit:
        """The circuit on a prompt of ``length`` tokens: positions counted from the end become positions from 0."""

        def absolute(position: int | None) -> int | None:
            if position is None:
                return None
            place = position + length if position < 0 else position
            if not 0 <= place < length:
                raise InputError(f"the circuit has a unit at position {position}; the prompt has {length} tokens")
            return place

        return replace(self, units=tuple(unit._replace(position=absolute(unit.position)) for unit in self.units))

    def everywhere(self) -> Circuit:
        """The same neurons at every position: each (layer, unit) once, its values summed."""
        sums: dict[tuple[int, int], float] = {}
        labels: dict[tuple[int, int], str] = {}
        for unit in self.units:
            place = (unit.layer, unit.unit)
            sums[place] = sums.get(place, 0.0) + unit.value
            labels.setdefault(place, unit.label)
        merged = [CircuitUnit(layer, None, unit, value, labels[layer, unit]) for (layer, unit), value in sums.items()]
        return replace(self, units=tuple(merged))

    def sites(self) -> tuple[str, ...]:
        """Selectors that together hold every unit, one per layer and position: ``mlp_neurons[23][8079,12] @ -1``."""
        groups: dict[tuple[int, int | None], list[int]] = {}
        for unit in self.units:
            groups.setdefault((unit.layer, unit.position), []).append(unit.unit)
        ordered = sorted(groups.items(), key=lambda item: (item[0][0], _order(item[0][1])))
        return tuple(
            f"{self.component}[{layer}][{','.join(map(str, sorted(numbers)))}] @ {'*' if position is None else position}"
            for (layer, position), numbers in ordered
        )

    def _alike(self, other: Circuit) -> frozenset[Key]:
        if self.component != other.component:
            raise InputError(f"one circuit is of {self.component}, the other of {other.component}: they share no units")
        return self.keys

    def _of(self, units: list[CircuitUnit], operation: str, other: Circuit) -> Circuit:
        provenance = {"operation": operation, "left": dict(self.provenance), "right": dict(other.provenance)}
        same = {
            key: getattr(self, key) if getattr(self, key) == getattr(other, key) else ""
            for key in ("prompt", "target", "counterfactual", "metric")
        }
        kept = self.metric_value if self.metric_value == other.metric_value else math.nan
        return Circuit(tuple(units), self.component, **same, metric_value=kept, name="", provenance=provenance)

    def _repr_html_(self) -> str:
        layers = self.by_layer()
        unit = component_named(self.component).unit or "unit"
        answer = f"{self.target!r}" + (f" rather than {self.counterfactual!r}" if self.counterfactual else "")
        measured = self.metric if math.isnan(self.metric_value) else f"{self.metric} {self.metric_value:.4g}"
        facts = [
            ("units", f"{len(self)} {unit}s of {self.component}, in layers {ranges(layers)}"),
            ("contributions", f"{sum(unit.value for unit in self.units):.4g} in sum"),
            *(pair for pair in (("prompt", self.prompt), ("answer", answer if self.target else ""), ("metric", measured)) if pair[1]),
            *((name, str(value)) for name, value in self.provenance.items() if isinstance(value, str | int | float)),
        ]
        rows = [tuple("every" if part is None else part for part in member) for member in self.units]
        sums = [(layer, len(members), sum(member.value for member in members)) for layer, members in layers.items()]
        tables = [
            Table("strongest units", ("layer", "position", unit, "contribution", "label"), rows),
            Table("by layer", ("layer", "units", "contribution"), sums),
        ]
        return card("Circuit", self.name or self.component, facts=facts, tables=tables)

    # --- files and stores -------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The circuit as JSON text; a metric value that is not known is null."""
        data = {"format": FORMAT, "version": 1, **self._facts(), "units": [list(unit) for unit in self.units]}
        return json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> Circuit:
        """The circuit that `to_json` wrote, or one in the older form; InputError says what is wrong with ``source``."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{source} is no JSON: {error}") from None
        if isinstance(data, dict) and "neurons" in data and "format" not in data:
            return cls.from_older(data, source)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f'{source} is no circuit: it has neither "format": "{FORMAT}" nor "neurons"')
        if data.get("version") != 1:
            raise InputError(f"{source} is a circuit of version {data.get('version')!r}; this nsp reads version 1")
        try:
            return cls._of_facts(tuple(CircuitUnit(*unit) for unit in data["units"]), data)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source} is a damaged circuit: {type(error).__name__} {error}") from None

    def _facts(self) -> dict[str, Any]:
        """All but the units as plain data; a metric value that is not known is None."""
        value = None if math.isnan(self.metric_value) else self.metric_value
        texts = {name: getattr(self, name) for name in _TEXTS}
        return {**texts, "metric_value": value, "name": self.name, "provenance": dict(self.provenance)}

    @classmethod
    def _of_facts(cls, units: tuple[CircuitUnit, ...], facts: Mapping[str, Any]) -> Circuit:
        value = math.nan if facts["metric_value"] is None else float(facts["metric_value"])
        texts = {name: facts[name] for name in (*_TEXTS, "name")}
        return cls(units, **texts, metric_value=value, provenance=facts["provenance"])

    def save(self, path: str | Path) -> None:
        """Write the circuit as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read a circuit from JSON, of this form or the older one."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the circuit {path}: {error}") from None

    def to_older(self) -> dict[str, Any]:
        """The older form: ``{"neurons": {"layer,position,neuron": value}, "prompt", "target_token", "total_logit_diff"}``.

        It knows MLP neurons at positions from 0 alone: `at` gives them to a circuit whose positions count from the end.
        """
        if self.component != "mlp_neurons":
            raise InputError(f"the older form holds MLP neurons, not {self.component}")
        odd = next((unit for unit in self.units if unit.position is None or unit.position < 0), None)
        if odd is not None:
            raise InputError(
                f"the older form needs positions from 0; this circuit has a unit at {'every position' if odd.position is None else odd.position}: "
                "export circuit.at(length of the prompt in tokens)"
            )
        return {
            "neurons": {f"{unit.layer},{unit.position},{unit.unit}": unit.value for unit in self.units},
            "prompt": self.prompt,
            "target_token": self.target,
            "total_logit_diff": None if math.isnan(self.metric_value) else self.metric_value,
        }

    @classmethod
    def from_older(cls, data: Mapping[str, Any], source: str = "the circuit") -> Circuit:
        """A circuit from the older form."""
        missing = [key for key in OLDER_KEYS if key not in data]
        if missing or not isinstance(data["neurons"], Mapping):
            raise InputError(
                f"{source}: the older form has the keys {', '.join(OLDER_KEYS)}; missing: {missing or 'none'}"
            )
        units = []
        for key, value in data["neurons"].items():
            try:
                layer, position, neuron = (int(part) for part in str(key).split(","))
                units.append(CircuitUnit(layer, position, neuron, float(value)))
            except (TypeError, ValueError):
                raise InputError(
                    f'{source}: neuron {key!r}: {value!r} is not of the form "layer,position,neuron": value'
                ) from None
        total = data["total_logit_diff"]
        return cls(
            tuple(units),
            prompt=str(data["prompt"]),
            target=str(data["target_token"]),
            metric="logit_diff",
            metric_value=math.nan if total is None else float(total),
            provenance={"imported": "older JSON form"},
        )

    def to_dataset(self) -> xr.Dataset:
        """The circuit as a store's group ``circuit/<name>``, dims (token,): one entry per unit, strongest first."""
        how = {"units": "1", "method": str(self.provenance.get("method", "given"))}
        columns: dict[str, tuple[np.ndarray, str]] = {
            "unit_layer": (np.array([unit.layer for unit in self.units], dtype=np.int32), "layer"),
            "unit_position": (
                np.array([_EVERY if unit.position is None else unit.position for unit in self.units], dtype=np.int32),
                f"position (negative: from the end; {_EVERY}: every position)",
            ),
            "unit_number": (np.array([unit.unit for unit in self.units], dtype=np.int32), "neuron or head"),
            "contribution": (np.array([unit.value for unit in self.units]), "what the metric loses without the unit"),
            "label": (np.array([unit.label for unit in self.units], dtype=object), "name for people"),
        }
        variables = {name: (("token",), values, {"long_name": text, **how}) for name, (values, text) in columns.items()}
        index = xr.Variable(
            ("token",), np.arange(len(self.units)), {"long_name": "unit of the circuit, strongest first"}
        )
        return xr.Dataset(variables, {"token": index}, {"format": FORMAT, **self._facts()})

    @classmethod
    def from_dataset(cls, dataset: xr.Dataset) -> Circuit:
        """The circuit that `to_dataset` wrote."""
        if dataset.attrs.get("format") != FORMAT:
            raise InputError("this group holds no circuit")
        names = ("unit_layer", "unit_position", "unit_number", "contribution", "label")
        columns = [dataset[name].values.tolist() for name in names]
        units = tuple(
            CircuitUnit(layer, None if position == _EVERY else position, number, value, label)
            for layer, position, number, value, label in zip(*columns, strict=True)
        )
        return cls._of_facts(units, dataset.attrs)


def _order(position: int | None) -> float:
    return -math.inf if position is None else position


def _checked(unit: CircuitUnit) -> CircuitUnit:
    layer, position, number, value, label = unit
    whole = [layer, number] if position is None else [layer, number, position]
    if (
        any(isinstance(part, bool) or not isinstance(part, int | np.integer) for part in whole)
        or layer < 0
        or number < 0
    ):
        raise InputError(f"a circuit's unit is (layer, position, unit, value) with whole numbers; got {tuple(unit)}")
    if not math.isfinite(value):
        raise InputError(f"the unit (layer {layer}, position {position}, {number}) has the value {value}")
    place = None if position is None else int(position)
    return CircuitUnit(int(layer), place, int(number), float(value), str(label))
