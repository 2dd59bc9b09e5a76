"""The experiment core: what every kind of experiment has in common, stated once.

A kind is a recipe class and one subclass of `Experiment`. It says what it knows: how its recipe is checked against a
model (`prepare`), what its plan hashes (`statement`), what its results will be (`groups`), how they are computed
(`stages`) and at what cost (`estimates`), and how a finished store is told and drawn (`summary`, `figures`). The plan,
the header, the template, the units of work, running in memory, into a store, on Ray or detached, resuming, the Python
door, the recipe's schema and the exports are made from that.

Whatever a stage needs of earlier ones it reads from the store, never from the process that computed it: so a run may
be killed between any two units and go on elsewhere without computing anything twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Generic, TypeVar, get_args

import numpy as np
import xarray as xr

from nsp.engine.budget import Budget
from nsp.engine.engine import Engine
from nsp.engine.estimates import Estimate, Schedule
from nsp.engine.plan import Plan, model_statement
from nsp.errors import NspError
from nsp.experiments import finished, registry
from nsp.experiments.kinds import is_package
from nsp.experiments.labels import Group, fitted
from nsp.experiments.models import load_second
from nsp.model import Model
from nsp.progress import BranchProgress
from nsp.recipe import ModelOptions, Recipe
from nsp.report.figures import Figure
from nsp.report.summary import Summary, SummaryTable

R = TypeVar("R", bound=Recipe)
Values = Mapping[str, Mapping[str, Any]]
"""What a unit of work computes: group path -> variable -> array."""
Stored = Mapping[str, xr.Dataset]
"""Groups that earlier stages filled, read from the store: group path -> dataset."""


@dataclass(frozen=True)
class Region:
    """Where one unit of work writes: a block along each dim that its stage splits.

    Attributes:
        blocks: dim -> slice, of the split dims.
        sizes: dim -> length, of every dim of the stage's groups.
        progress: told (branches done, branches in all) while the unit runs; None where nothing is shown.
    """

    blocks: Mapping[str, slice]
    sizes: Mapping[str, int]
    progress: BranchProgress | None = None

    def indices(self, dim: str) -> range:
        """The places of the region along a dim: all of them where the stage does not split it."""
        return range(self.sizes[dim])[self.blocks.get(dim, slice(None))]


@dataclass(frozen=True)
class Stage:
    """One kind of unit of work.

    Attributes:
        run: computes a unit: takes its region and the groups that the stage ``needs``, and returns values for each group
            that the unit fills. An array may be shorter than the region where prompts are; the rest stays blank.
        groups: what the stage fills. A group without one of the split dims is filled by the first block along it.
        split: dim -> places of one block; a stage that splits nothing is one unit of work.
        needs: groups that earlier stages fill; they are complete before the first unit of this stage runs.
    """

    run: Callable[[Region, Stored], Values]
    groups: tuple[str, ...]
    split: Mapping[str, int] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """One unit of work: what is lost at most when a run is killed.

    Attributes:
        index: its number in the run.
        stage: the number of its stage.
        blocks: dim -> slice, of the dims that its stage splits.
        regions: what it fills, as group path -> dim -> slice (dims not named: whole).
    """

    index: int
    stage: int
    blocks: Mapping[str, slice]
    regions: Mapping[str, Mapping[str, slice]]


class Experiment(Generic[R]):
    """One run of one kind of experiment: a recipe, checked against a model, and not yet computed.

    A subclass ``class Mine(Experiment[MyRecipe])`` is registered under the recipe's ``kind`` where it is defined.

    Args:
        model: the loaded model that the recipe's ``model`` names.
        recipe: the recipe.
        given: live objects that a Python caller passed for a recipe's keys (another `Model`, a trained lens), by key;
            the recipe names them.

    Raises:
        InputError: whatever is wrong with the recipe on this model.
    """

    kind: ClassVar[str]
    recipe_class: ClassVar[type[Recipe]]
    door: ClassVar[str] = ""
    """The name of its function in `nsp.experiments`; by default the kind with underscores."""
    doors: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Further functions, each with the recipe's keys that it fixes."""
    positional: ClassVar[tuple[str, ...]] = ()
    """Keys that may be passed by position, after the model; by default those without a default."""
    model_keys: ClassVar[tuple[str, ...]] = ()
    """Of a kind for several models: the names under which its ``models`` takes them; the last one given is loaded first."""
    model_texts: ClassVar[Mapping[str, str]] = {}
    """What each of several models is for, by its name: ``", which donates its activations"``."""
    results: ClassVar[str] = ""
    """The groups of its tree with their dims, for the documentation of the door."""

    def __init_subclass__(cls, **keys: Any) -> None:
        super().__init_subclass__(**keys)
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, Recipe):
                    cls.recipe_class = argument
                    cls.kind = get_args(argument.model_fields["kind"].annotation)[0]
                    cls.door = cls.__dict__.get("door") or cls.kind.replace("-", "_")
                    registry.register(cls)

    def __init__(self, model: Model, recipe: R, given: Mapping[str, Any] | None = None) -> None:
        self.model, self.recipe, self.given = model, recipe, dict(given or {})
        self.prepare()

    # --- what a kind says -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Encode, align, resolve. Whatever can be wrong is an InputError here; nothing is measured yet."""

    def statement(self) -> dict[str, Any]:
        """What decides the numbers, as plain data: the plan's hash is of this and of the model."""
        raise NotImplementedError

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        """What will be known, by group path: blank groups, and datasets that are known already (``inputs``)."""
        raise NotImplementedError

    def stages(self) -> Sequence[Stage]:
        """How it is computed."""
        raise NotImplementedError

    def estimates(self) -> Iterable[Estimate]:
        """What the engine will run, and at what cost."""
        return ()

    def seeds(self) -> Mapping[str, int]:
        """Seeds beside the recipe's own, by what they decide."""
        return {}

    # What a finished run says: by default in the modules ``summary`` and ``figures`` beside the class
    # (see `nsp.experiments.finished`); a kind in one file says it here.

    @classmethod
    def summary(cls, tree: xr.DataTree) -> Summary:
        """The summary of a finished (or unfinished) store."""
        return finished.summary(tree)

    @classmethod
    def headline(cls, tree: xr.DataTree) -> str | None:
        """The main figure of a finished store in a line, for `nsp ls`; kept in the store's header."""
        return finished.headline(tree) if is_package(cls.kind) else None

    @classmethod
    def figures(cls, tree: xr.DataTree) -> Sequence[Figure] | None:
        """What is drawn, the main figure first; by default a figure for each group, by its dims."""
        return finished.figures(tree) if is_package(cls.kind) else None

    @classmethod
    def tables(cls, tree: xr.DataTree) -> Sequence[SummaryTable] | None:
        """The tables of `nsp export STORE --csv DIR`, each a file named by its title; by default one for each group."""
        return finished.tables(tree) if is_package(cls.kind) else None

    @classmethod
    def figure(cls, tree: xr.DataTree) -> Any:
        """The one figure that a door shows for ``plot=True``, as a matplotlib Figure."""
        from nsp.experiments.accessor import Results

        return Results(tree).plot()

    # --- what the core makes of it ----------------------------------------------------------------------------------

    @cached_property
    def engine(self) -> Engine:
        """The model's engine, within the recipe's memory."""
        return self.model.engine.within(self.recipe.memory_bytes)

    @cached_property
    def budget(self) -> Budget:
        """The memory that the run's activations may take."""
        return self.engine.budget

    @cached_property
    def plan(self) -> Plan:
        """Everything that decides the numbers, with the schedule of the engine."""
        model = model_statement(self.model.provenance)
        return Plan(self.kind, model, self.statement(), Schedule(tuple(self.estimates())))

    @property
    def header(self) -> dict[str, Any]:
        """What the root of the run's store says about it."""
        return {
            "kind": self.kind,
            "plan_hash": self.plan.hash,
            "recipe_given": self.recipe.model_dump(mode="json", exclude_unset=True),
            "recipe_resolved": self.recipe.model_dump(mode="json"),
            "model": {**self.plan.model, "device": self.model.provenance.device},
            "seeds": {"recipe": self.recipe.seed, **self.seeds()},
            "versions": library_versions(),
        }

    @cached_property
    def blanks(self) -> dict[str, xr.Dataset]:
        """Every group with all labels; results blank."""
        return {path: group.blank() if isinstance(group, Group) else group for path, group in self.groups().items()}

    def template(self) -> xr.DataTree:
        """The whole tree with all labels; results blank."""
        return xr.DataTree.from_dict(self.blanks)

    @cached_property
    def staged(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        return tuple(self.stages())

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The units of work, stage after stage; the same for the same plan on every machine."""
        units: list[Unit] = []
        for number, stage in enumerate(self.staged):
            sizes = self._sizes(stage)
            spans = {dim: _spans(sizes[dim], extent) for dim, extent in stage.split.items()}
            for blocks in itertools.product(*spans.values()):
                at = dict(zip(spans, blocks, strict=True))
                regions = {
                    path: {dim: block for dim, block in at.items() if dim in self.blanks[path].sizes}
                    for path in stage.groups
                    if all(block.start == 0 or dim in self.blanks[path].sizes for dim, block in at.items())
                }
                units.append(Unit(len(units), number, at, regions))
        return tuple(units)

    def _sizes(self, stage: Stage) -> dict[str, int]:
        return {str(dim): size for path in stage.groups for dim, size in self.blanks[path].sizes.items()}

    def needs(self, unit: Unit) -> tuple[str, ...]:
        """The groups that must be complete before a unit can run."""
        return self.staged[unit.stage].needs

    def compute(
        self, unit: Unit, stored: Callable[[str], xr.Dataset], progress: BranchProgress | None = None
    ) -> dict[str, dict[str, np.ndarray]]:
        """Compute one unit: group path -> variable -> array shaped like the unit's region there.

        ``stored`` reads a group of the run as it is committed.
        """
        stage = self.staged[unit.stage]
        region = Region(unit.blocks, self._sizes(stage), progress)
        values = stage.run(region, {path: stored(path) for path in stage.needs})
        if not set(unit.regions) <= set(values) <= set(stage.groups):
            raise NspError(f"{self.kind}: a unit of work computed {sorted(values)}; it fills {sorted(unit.regions)}")
        return {path: self._fitted(path, region, values[path]) for path, region in unit.regions.items()}

    def _fitted(self, path: str, region: Mapping[str, slice], arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        blank = self.blanks[path]
        if set(arrays) != set(map(str, blank.data_vars)):
            raise NspError(f"{path}: computed {sorted(arrays)}; its variables are {sorted(map(str, blank.data_vars))}")
        shaped: dict[str, np.ndarray] = {}
        for name, values in arrays.items():
            variable = blank[name].variable
            sizes = [len(range(size)[region.get(str(dim), slice(None))]) for dim, size in variable.sizes.items()]
            shaped[name] = fitted(values, sizes, variable, f"{path}/{name}")
        return shaped

    def unfilled(self, path: str, region: Region) -> dict[str, np.ndarray]:
        """The arrays of a group over a region with nothing computed, for a stage that fills them cell by cell."""
        variables = {str(name): array.variable for name, array in self.blanks[path].data_vars.items()}
        return {
            name: np.array(variable.isel({dim: at for dim, at in region.blocks.items() if dim in variable.dims}).values)
            for name, variable in variables.items()
        }

    def second_model(self, key: str, options: ModelOptions) -> Model:
        """Another model of the recipe: what the Python caller passed for ``key``, or loaded where the first one runs."""
        passed = self.given.get(key)
        return passed if isinstance(passed, Model) else load_second(options, self.recipe.backend, self.model)


def _spans(size: int, extent: int) -> list[slice]:
    return [slice(low, min(low + extent, size)) for low in range(0, size, extent)] or [slice(0, 0)]


def library_versions() -> dict[str, str]:
    """The versions of nsp and of the libraries that its numbers depend on."""
    versions = {}
    for name in ("nsp", "torch", "transformers", "nnsight", "numpy", "xarray", "zarr", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
