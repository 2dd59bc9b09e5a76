"""A stand-in experiment for tests of recipes and the command line: no model, a small store, real jobs and summaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
import xarray as xr
from pydantic import Field

from nsp.errors import InputError, NspError
from nsp.experiments import kinds, registry
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.models.loaded import Provenance
from nsp.recipe import DataPath, Recipe, RecipeOptions
from nsp.report.summary import Summary, SummaryTable

TOKENS = ["When", " Mary", " and", " John", "\n"]


class Part(RecipeOptions):
    """One of several parts."""

    text: str
    weight: float = 1.0


class ToyRecipe(Recipe):
    """Toy."""

    kind: Literal["toy"]
    layers: str | int = "all"
    mode: Literal["forwards", "backwards"] = "forwards"
    metric: str = "logit_diff"
    size: Annotated[int, Field(strict=True, ge=1)] = 3
    parts: tuple[Part, ...] = ()
    file: DataPath | None = None


def blank_tree() -> xr.DataTree:
    """The template of a toy store: effects with dims (pair, layer, position), baseline, inputs."""
    dims, attrs = ("pair", "layer", "position"), {"units": "1", "method": "toy"}
    pair = xr.Variable(("pair",), np.arange(2), {"long_name": "pair"})
    texts = xr.Variable(("pair", "position"), np.array([TOKENS, TOKENS], dtype=object), {"long_name": "token"})
    coords = {
        "pair": pair,
        "layer": xr.Variable(("layer",), np.arange(3), {"long_name": "layer"}),
        "position": xr.Variable(("position",), np.arange(5), {"long_name": "position"}),
        "token_text": texts,
    }
    blank = np.full((2, 3, 5), np.nan, dtype=np.float32)
    effects = xr.Dataset(
        {
            "effect": (dims, blank, {"long_name": "normalised effect", **attrs}),
            "logit_diff": (dims, blank, {"long_name": "logit difference", **attrs, "units": "logits"}),
        },
        coords,
    )
    runs = {
        f"logit_diff_{run}": (("pair",), np.array([value, value], dtype=np.float32), {"long_name": run, **attrs})
        for run, value in (("clean", 2.0), ("corrupt", -2.0))
    }
    bases = np.array(["corrupt", "corrupt"], dtype=object)
    inputs = xr.Dataset({"base": (("pair",), bases, {"long_name": "base run", **attrs})}, {"pair": pair})
    return xr.DataTree.from_dict(
        {"inputs": inputs, "baseline": xr.Dataset(runs, {"pair": pair}), "effects/resid_post": effects}
    )


def effect_values() -> np.ndarray:
    """The toy's effects, (pair, layer, position)."""
    return np.linspace(-1, 1, 2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)


class Toy(Experiment[ToyRecipe]):
    """Two units of work, one for each pair. The recipe's metric makes the second one go wrong."""

    log: ClassVar[Log]

    def prepare(self) -> None:
        if str(self.recipe.layers) == "99":
            raise InputError("layers: 99 is out of range; the model has layers 0 to 29")
        self.log.prepared.append(self.recipe)

    def statement(self) -> dict[str, Any]:
        return self.recipe.model_dump(mode="json", include={"layers", "mode", "size", "seed"})

    def groups(self) -> dict[str, xr.Dataset]:
        return {node.path.strip("/"): node.to_dataset() for node in blank_tree().subtree if node.data_vars}

    def stages(self) -> list[Stage]:
        return [Stage(self._effects, ("effects/resid_post",), split={"pair": 1})]

    def _effects(self, region: Region, stored: Stored) -> Values:
        (pair,) = region.indices("pair")
        if pair == 1 and Path("interrupt").exists():
            raise KeyboardInterrupt
        if pair == 1 and self.recipe.metric == "fail":
            raise NspError("out of memory at unit 1; give --memory")
        if pair == 1 and self.recipe.metric == "bug":
            raise ZeroDivisionError("division by zero")
        self.log.units.append(pair)
        values = effect_values()[pair : pair + 1]
        return {"effects/resid_post": {"effect": values, "logit_diff": values * 4 - 2}}

    @classmethod
    def summary(cls, tree: xr.DataTree) -> Summary:
        effect = tree["effects/resid_post"]["effect"]
        rows = ((2, 4, " John\n[bold]", float(effect[1, 2, 4])), (0, 1, " Mary", -0.25))
        table = SummaryTable("strongest sites", ("layer", "position", "token", "effect"), rows)
        return Summary("toy summary", ("2 pairs",), (table,))


@dataclass
class Log:
    """What the command line asked for."""

    loaded: list[dict[str, Any]] = field(default_factory=list)
    prepared: list[ToyRecipe] = field(default_factory=list)
    units: list[int] = field(default_factory=list)


class FakeModel:
    """A name with its provenance, and no job that was sent anywhere."""

    ledger = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.provenance = Provenance(name, "nowhere", "0", "0", "0", "float32", "cpu", None, None)

    def jobs(self) -> list[dict[str, Any]]:
        return []


class FakeExperiment:
    """Stands in for the models and for the experiments; what runs and stores is real."""

    def __init__(self) -> None:
        self.log = Toy.log = Log()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it the only kind that there is."""
        monkeypatch.setattr("nsp.experiments.models.load", self.load)
        monkeypatch.setattr(registry, "EXPERIMENTS", {"toy": Toy})
        monkeypatch.setattr(kinds, "RECIPES", {"toy": ToyRecipe})

    def load(self, name: str, backend: Any = None, **options: Any) -> FakeModel:
        if name == "nosuch":
            raise InputError("there is no model 'nosuch'")
        self.log.loaded.append({"name": name, **options})
        return FakeModel(name)
