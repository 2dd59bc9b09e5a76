"""A stand-in experiment for tests of recipes and of the command line: no model, a small store, the real interfaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr
from pydantic import Field

from nsp.errors import InputError, NspError
from nsp.recipe import DataPath, Recipe, RecipeOptions

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


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Summary:
    title: str
    lines: tuple[str, ...]
    tables: tuple[Table, ...]


class Plan:
    hash = "0" * 64

    def describe(self, width: int) -> str:
        return "15 branches in 3 passes, about 1 s, 10 MB"


@dataclass(frozen=True)
class Job:
    recipe: ToyRecipe
    plan: Plan = field(default_factory=Plan)


@dataclass
class Log:
    """What the command line asked for."""

    loaded: list[str] = field(default_factory=list)
    prepared: list[ToyRecipe] = field(default_factory=list)
    ran: list[Path] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)


def toy_tree(mode: str = "denoising") -> xr.DataTree:
    """A store's worth of results: effects with dims (pair, layer, position), baseline, inputs."""
    values = np.linspace(-1, 1, 2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    dims = ("pair", "layer", "position")
    texts = xr.Variable(("pair", "position"), np.array([TOKENS, TOKENS], dtype=object))
    effects = xr.Dataset(
        {
            "effect": (dims, values, {"long_name": "normalised effect", "units": "1"}),
            "logit_diff": (dims, values * 4 - 2, {"long_name": "logit difference", "units": "logits"}),
        },
        coords={"layer": np.arange(3), "position": np.arange(5), "token_text": texts},
    )
    baseline = xr.Dataset({"logit_diff_clean": ("pair", [2.0, 2.0]), "logit_diff_corrupt": ("pair", [-2.0, -2.5])})
    tree = xr.DataTree.from_dict({"/effects/resid_post": effects, "/baseline": baseline})
    tree.attrs |= {"kind": "toy", "mode": mode}
    return tree


class FakeExperiments:
    """What stands in for nsp.load, the registry and the runner."""

    def __init__(self) -> None:
        self.log = Log()
        self.recipe = ToyRecipe
        self.EXPERIMENTS: Mapping[str, Any] = {"toy": self}

    def load(self, name: str, **options: Any) -> str:
        if name == "nosuch":
            raise InputError("there is no model 'nosuch'")
        self.log.loaded.append(name)
        return name

    def prepare(self, model: str, recipe: ToyRecipe) -> Job:
        if recipe.layers == "99":
            raise InputError("layers: 99 is out of range; the model has layers 0 to 29")
        self.log.prepared.append(recipe)
        return Job(recipe)

    def run(self, job: Job, *, out: Path, force: bool = False, progress: bool = True) -> None:
        self.log.forced.append(force)
        if job.recipe.metric == "interrupt":
            raise KeyboardInterrupt
        if job.recipe.metric == "fail":
            raise NspError("the run failed: out of memory")
        if job.recipe.metric == "bug":
            raise ZeroDivisionError("division by zero")
        toy_tree().to_zarr(out, mode="w", consolidated=False)
        self.log.ran.append(out)

    def summarise(self, tree: xr.DataTree) -> Summary:
        effect = tree["effects/resid_post"]["effect"]
        rows = ((2, 4, " John\n[bold]", float(effect[1, 2, 4])), (0, 1, " Mary", -0.25))
        return Summary("toy", ("2 pairs",), (Table("strongest sites", ("layer", "position", "token", "effect"), rows),))
