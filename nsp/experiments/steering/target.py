"""What is steered: control vectors that are added, or a circuit's units that are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import xarray as xr

from nsp.errors import InputError
from nsp.experiments.circuits import Circuit
from nsp.experiments.contrast.vectors import ControlVectors
from nsp.interventions import Inject, Scale, scale
from nsp.sites import Selection, Site

ADD_MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)
SCALE_MULTIPLIERS = (0.0, 0.5, 1.0, 2.0, 4.0)
OWN = "own"


@dataclass(frozen=True)
class SteeringTarget:
    """Control vectors or a circuit, one of them.

    A multiplier multiplies the vector that is added, or the units' activations.
    """

    vectors: ControlVectors | None = None
    circuit: Circuit | None = None

    def __post_init__(self) -> None:
        if (self.vectors is None) == (self.circuit is None):
            raise InputError("steering takes control vectors or a circuit, one of them")
        if self.circuit is not None and not len(self.circuit):
            raise InputError("the circuit has no unit, so there is nothing to scale")

    @property
    def kind(self) -> Literal["add", "scale"]:
        return "add" if self.vectors is not None else "scale"

    @property
    def neutral(self) -> float:
        """The multiplier that changes nothing."""
        return 0.0 if self.vectors is not None else 1.0

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Those of a sweep where none are named."""
        return ADD_MULTIPLIERS if self.vectors is not None else SCALE_MULTIPLIERS

    def interventions(self, positions: str = "*") -> tuple[Scale | Inject, ...]:
        """What is done at multiplier 1, at the selected positions; ``own``: where the circuit's units were found."""
        chosen = "*" if positions == "all" else positions
        if self.vectors is not None:
            if positions == OWN:
                raise InputError("a control vector has no positions of its own; give all, last or an index")
            return self.vectors.interventions(chosen)
        assert self.circuit is not None
        if positions == OWN:
            return tuple(scale(site, 1.0) for site in self.circuit.sites())
        places = Selection.of(chosen)
        sites = [Site.parse(site) for site in self.circuit.everywhere().sites()]
        return tuple(scale(replace(site, positions=places), 1.0) for site in sites)

    def describe(self) -> str:
        """In words."""
        if self.vectors is not None:
            layers = ", ".join(map(str, self.vectors.layers))
            return f"adding the {self.vectors.name} ({self.vectors.method}) to {self.vectors.component} of layer {layers}"
        assert self.circuit is not None
        name = f" of {self.circuit.name}" if self.circuit.name else ""
        return f"scaling {len(self.circuit.unique_neurons())} unit(s) of {self.circuit.component}{name}"

    def groups(self) -> dict[str, xr.Dataset]:
        """The target as a group of a store, which says what it is."""
        attrs = {"steering": self.kind, "description": self.describe()}
        if self.vectors is not None:
            return {f"activations/{self.vectors.component}": self.vectors.to_dataset().assign_attrs(attrs)}
        assert self.circuit is not None
        return {f"circuit/{self.circuit.component}": self.circuit.to_dataset().assign_attrs(attrs)}

    def to_dict(self) -> dict[str, Any]:
        """The target as plain data."""
        if self.vectors is not None:
            return {"vectors": self.vectors.to_dict()}
        assert self.circuit is not None
        return {"circuit": self.circuit.to_json()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SteeringTarget:
        """The target that `to_dict` wrote."""
        if "vectors" in data:
            return cls(vectors=ControlVectors.from_dict(data["vectors"]))
        return cls(circuit=Circuit.from_json(data["circuit"]))
