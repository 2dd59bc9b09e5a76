"""A stand-in experiment for tests of recipes and the command line: no model, a small store, real jobs and summaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import xarray as xr
from pydantic import Field

from nsp.engine.plan import Plan
from nsp.errors import InputError, NspError
from nsp.experiments import kinds, registry
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.registry import Experiment
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


class ToyJob:
    """Two units of work, one a pair. The recipe's metric makes the second one go wrong."""

    def __init__(self, recipe: ToyRecipe, log: Log) -> None:
        self.recipe, self.log = recipe, log
        statement = recipe.model_dump(mode="json", include={"layers", "mode", "size", "seed"})
        hashes = dict.fromkeys(("revision", "weights_hash", "tokenizer_hash"), "0")
        self.plan = Plan("toy", {"name": recipe.model.name, "dtype": "float32", **hashes}, statement)
        self.units = tuple(Unit(n, {"effects/resid_post": {"pair": slice(n, n + 1)}}) for n in range(2))

    @property
    def header(self) -> Mapping[str, Any]:
        return header_of(self.plan, self.recipe, "cpu")

    def template(self) -> xr.DataTree:
        return blank_tree()

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        if unit.index == 1 and Path("interrupt").exists():
            raise KeyboardInterrupt
        if unit.index == 1 and self.recipe.metric == "fail":
            raise NspError("out of memory at unit 1; give --memory")
        if unit.index == 1 and self.recipe.metric == "bug":
            raise ZeroDivisionError("division by zero")
        self.log.units.append(unit.index)
        values = effect_values()[unit.index : unit.index + 1]
        return {"effects/resid_post": {"effect": values, "logit_diff": values * 4 - 2}}


@dataclass
class Log:
    """What the command line asked for."""

    loaded: list[dict[str, Any]] = field(default_factory=list)
    prepared: list[ToyRecipe] = field(default_factory=list)
    units: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class FakeModel:
    """A name, and no job that was sent anywhere."""

    name: str
    ledger: None = None

    def jobs(self) -> list[dict[str, Any]]:
        return []


class FakeExperiment:
    """Stands in for the models and for the experiments; what runs and stores is real."""

    def __init__(self) -> None:
        self.log = Log()
        self.experiment = Experiment("toy", ToyRecipe, self.prepare, self.summarise)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it the only kind that there is."""
        monkeypatch.setattr("nsp.experiments.models.load", self.load)
        monkeypatch.setattr(registry, "EXPERIMENTS", {"toy": self.experiment})
        monkeypatch.setattr(kinds, "RECIPES", {"toy": ToyRecipe})

    def load(self, name: str, backend: Any = None, **options: Any) -> FakeModel:
        if name == "nosuch":
            raise InputError("there is no model 'nosuch'")
        self.log.loaded.append({"name": name, **options})
        return FakeModel(name)

    def prepare(self, model: Any, recipe: ToyRecipe) -> ToyJob:
        if str(recipe.layers) == "99":
            raise InputError("layers: 99 is out of range; the model has layers 0 to 29")
        self.log.prepared.append(recipe)
        return ToyJob(recipe, self.log)

    def summarise(self, tree: xr.DataTree) -> Summary:
        effect = tree["effects/resid_post"]["effect"]
        rows = ((2, 4, " John\n[bold]", float(effect[1, 2, 4])), (0, 1, " Mary", -0.25))
        table = SummaryTable("strongest sites", ("layer", "position", "token", "effect"), rows)
        return Summary("toy summary", ("2 pairs",), (table,))
