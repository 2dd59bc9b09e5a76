"""Recipes: an experiment described as a YAML file, checked before anything runs.

A recipe class is a frozen pydantic model per kind of experiment, made from `Recipe`. `load_recipe_file` reads a file
into one `ResolvedRecipe` per matrix cell:

- ``extends: other.yaml`` (a path beside the file, or the name of a shipped recipe) builds on another recipe: mappings
  merge key by key, anything else replaces;
- ``matrix: {model: [smollm2, gpt2], layers: ["0:6", all]}`` runs every combination of the listed values; dotted keys
  reach inside (``pairs.path``);
- overrides (``layers=0:6``) come last. One over a key of the matrix fixes that key.

Relative data paths resolve against the file that names them, ``out`` and paths in overrides against the working
directory. Every problem is an InputError with a line each: file, line, key, and what would be valid.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nsp.backends.options import Backend, BackendOptions
from nsp.errors import InputError, suggestion
from nsp.memory import parse_memory
from nsp.recipe_errors import describe_problems
from nsp.recipe_yaml import (
    Document,
    SourceText,
    Where,
    assign,
    matrix_cells,
    merge,
    plain,
    read_document,
    read_setting,
)


def _memory(size: Any) -> str:
    count = parse_memory(size)
    return size if isinstance(size, str) else str(count)


def _resolve(value: Any) -> Any:
    if not isinstance(value, str) or not value:
        raise ValueError(f"should be a path, got {value!r}")
    base = value.base if isinstance(value, SourceText) else Path.cwd()
    return os.path.normpath(base / Path(value).expanduser())


def _is_file(value: str) -> str:
    if not os.path.isfile(value):
        what = "is a directory, not a file" if os.path.isdir(value) else "does not exist"
        raise ValueError(f"the file {value} {what}")
    return value


def _model_path(value: Any) -> Any:
    """A model written as a path is resolved like one; an alias or hub id stays as it is."""
    if isinstance(value, SourceText) and (value.startswith((".", "~", "/")) or value.endswith(".gguf")):
        return _resolve(value)
    return str(value) if isinstance(value, SourceText) else value


DataPath = Annotated[str, BeforeValidator(_resolve, json_schema_input_type=str), AfterValidator(_is_file)]
"""A file that must exist; in a recipe it is given relative to that recipe, and becomes absolute."""

Memory = Annotated[str, BeforeValidator(_memory, json_schema_input_type=str | float), Field(examples=["4GB"])]
"""A size of memory: a text such as 4GB, or a number of bytes."""


class RecipeOptions(BaseModel):
    """The base of every mapping in a recipe: frozen, and no key that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelOptions(RecipeOptions):
    """Which weights, and how to load them. A bare text is the name."""

    python_types: ClassVar[tuple[str, ...]] = ("Model",)

    name: Annotated[str, BeforeValidator(_model_path, json_schema_input_type=str), Field(min_length=1)] = "smollm2"
    """A catalogue alias (`nsp models list`), a hub id owner/name, a directory, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] | None = None
    """The dtype to compute in; by default float32 on a CPU and the checkpoint's own elsewhere."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; by default the best there is."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load quantised weights (needs bitsandbytes)."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2; by default transformers' choice."""


def named_model(value: Any) -> Any:
    """A model given as a text, as the mapping that it is short for."""
    return {"name": value} if isinstance(value, str) else value


NamedModel = Annotated[ModelOptions, BeforeValidator(named_model, json_schema_input_type=str | ModelOptions)]
"""A model: a name, or a mapping with its name and how to load it."""


class Recipe(RecipeOptions):
    """What every recipe has. A kind of experiment subclasses it with ``kind: Literal["..."]`` and its own keys.

    ``report_keys`` are those that concern the summary alone, so that a finished run can be reported by others.
    """

    report_keys: ClassVar[tuple[str, ...]] = ()

    kind: str
    """Which experiment this is."""
    name: str | None = None
    """A short name for the run; by default the file's."""
    description: str | None = None
    """What the recipe asks, in a sentence."""
    model: NamedModel = Field(default=ModelOptions(), validate_default=False)
    """The model: a name, or a mapping with its name and how to load it."""
    backend: Backend = Field(default=BackendOptions(), validate_default=False)
    """Where the model runs: local, local-sim (a dry run of the remote path), ndif, ndif://host:port, ray, or a mapping."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Seed for everything random in the run."""
    memory: Memory | None = None
    """The most memory that the run's activations may take, such as 4GB; by default what is free."""
    out: Annotated[str, Field(min_length=1)] | None = None
    """Where the result store goes, relative to the working directory; `{model}` and matrix keys are filled in."""

    def check(self) -> None:
        """Check what a recipe says about the world outside it (data files, say) and no model is needed for."""

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_memory(self.memory)


@dataclass(frozen=True)
class ResolvedRecipe:
    """One run that a recipe file asks for.

    Attributes:
        recipe: the checked recipe, ``out`` filled in.
        given: the file's own content, as written (with ``extends`` and ``matrix``).
        overrides: the ``key=value`` texts put on top.
        resolved: the whole recipe as plain data; validating it again gives ``recipe``.
        source: the file.
        cell: the values of this run's matrix cell, by key.
    """

    recipe: Recipe
    given: dict[str, Any]
    overrides: tuple[str, ...]
    resolved: dict[str, Any]
    source: Path
    cell: dict[str, Any]

    @property
    def name(self) -> str:
        return self.recipe.name or self.source.stem

    @property
    def label(self) -> str:
        """The run's name with its matrix values, for messages: ``ioi (model=gpt2)``."""
        values = ", ".join(f"{key}={_shown(value)}" for key, value in self.cell.items())
        return f"{self.name} ({values})" if values else self.name

    @property
    def out(self) -> Path:
        assert self.recipe.out is not None  # load_recipe_file fills it in
        return Path(self.recipe.out)

    def with_out(self, out: Path) -> ResolvedRecipe:
        """The same run with its store elsewhere."""
        changed = self.recipe.model_copy(update={"out": str(out)})
        return replace(self, recipe=changed, resolved={**self.resolved, "out": str(out)})


def shipped_recipes() -> dict[str, Path]:
    """The recipes that are installed with nsp, by name without suffix."""
    from nsp.recipes import shipped

    return shipped()


def find_recipe(name: str | Path, beside: Path | None = None) -> Path:
    """The recipe file that `name` means: a path (relative to `beside`, by default the working directory), or else the
    name of a shipped recipe, with or without ``.yaml``."""
    path = Path(name).expanduser()
    here = path if beside is None else beside / path
    if here.exists():
        return here
    known = shipped_recipes()
    bare = str(name).removesuffix(".yaml")
    if bare in known:
        return known[bare]
    siblings = [file.name for file in here.parent.glob("*.y*ml")] if here.parent.is_dir() else []
    hint = suggestion(path.name, [*siblings, *known]) or f" (nsp ships {', '.join(known)})"
    raise InputError(f"no such recipe: {here}{hint}")


def load_recipe_file(
    path: str | Path, overrides: Sequence[str] = (), *, kinds: Mapping[str, type[Recipe]]
) -> list[ResolvedRecipe]:
    """Read and check a recipe file; one `ResolvedRecipe` per matrix cell.

    Args:
        path: a file, or the name of a shipped recipe.
        overrides: ``key=value`` texts; keys are dotted, values YAML. A text may begin with another option's name
            (``--device model.device=cpu``), which errors then show in place of ``--set``.
        kinds: the recipe class of each kind.
    """
    file = find_recipe(path)
    given = read_document(file)
    document = _with_extends(given, file, ())
    settings = [_setting(text) for text in overrides]
    for place, value, where in settings:
        if place[0] in ("extends", "kind"):
            raise InputError(f"{where}: {place[0]} cannot be set from the command line")
        if place[0] == "matrix":
            document = assign(document, place, value, where)
    settings = [setting for setting in settings if setting[0][0] != "matrix"]
    fixed = frozenset(place for place, _, _ in settings)
    runs: list[tuple[ResolvedRecipe, Document]] = []
    problems: dict[str, None] = {}  # the same problem in every cell is one problem
    for cell, filled in matrix_cells(document, fixed):
        for place, value, where in settings:
            filled = assign(filled, place, value, where)
        recipe, wrong = _validate(filled, kinds)
        problems |= dict.fromkeys(wrong)
        if recipe is not None:
            data = recipe.model_dump(mode="json")
            runs.append((ResolvedRecipe(recipe, plain(given.data), tuple(overrides), data, file, plain(cell)), filled))
    if problems:
        raise InputError("\n".join(problems))
    return _placed(runs)


def _with_extends(document: Document, path: Path, children: tuple[Path, ...]) -> Document:
    if "extends" not in document.data:
        return document
    at = document.locate(("extends",))
    name = document.data["extends"]
    if not isinstance(name, str):
        raise InputError(f"{at}: extends: should be the path or the name of one recipe, got {name!r}")
    children = (*children, path.resolve())
    try:
        parent = find_recipe(name, path.parent)
    except InputError as error:
        raise InputError(f"{at}: extends: {error}") from None
    if parent.resolve() in children:
        chain = " -> ".join(file.name for file in (*children, parent.resolve()))
        raise InputError(f"{at}: extends: a recipe cannot build on itself ({chain})")
    base = _with_extends(read_document(parent), parent, children)
    return merge(base, replace(document, data=document.data.without("extends")))


def _setting(text: str) -> tuple[tuple[str, ...], Any, Where]:
    option, space, rest = text.partition(" ")
    if space and option.startswith("--"):
        place, value, _ = read_setting(rest)
        return place, value, Where(f"{option} {rest.partition('=')[2]}")
    return read_setting(text)


def _validate(document: Document, kinds: Mapping[str, type[Recipe]]) -> tuple[Recipe | None, list[str]]:
    kind = document.data.get("kind")
    known = ", ".join(kinds)
    if "kind" not in document.data:
        return None, [f"{document.locate(())}: missing key 'kind': one of {known}"]
    if not isinstance(kind, str) or kind not in kinds:
        at = document.locate(("kind",))
        return None, [f"{at}: unknown kind {kind!r}{suggestion(str(kind), kinds)} (nsp has {known})"]
    try:
        return kinds[kind].model_validate(document.data), []
    except ValidationError as error:
        return None, describe_problems(error, document, kinds[kind])


def _placed(runs: Sequence[tuple[ResolvedRecipe, Document]]) -> list[ResolvedRecipe]:
    """The runs with their stores' paths: templates filled, cells told apart, no two alike."""
    placed: list[ResolvedRecipe] = []
    taken: set[str] = set()
    for run, document in runs:
        template = run.recipe.out or f"runs/{run.name}.zarr"
        used: set[str] = set()

        for match in re.finditer(r"\{([^{}]*)\}", template):
            used.add(match[1])
            template = template.replace(match[0], _slug(_template_value(match[1], run, document)))
        base = Path(template).expanduser()
        suffix = "".join(f"-{key}={_slug(value)}" for key, value in run.cell.items() if key not in used)
        out = base.with_name(base.stem + suffix + base.suffix) if suffix else base
        number = 2
        while str(out) in taken:
            out = base.with_name(f"{base.stem}{suffix}-{number}{base.suffix}")
            number += 1
        taken.add(str(out))
        placed.append(run.with_out(out))
    return placed


def _template_value(key: str, run: ResolvedRecipe, document: Document) -> Any:
    if key in run.cell:
        return run.cell[key]
    if key == "name":
        return run.name
    value: Any = run.resolved
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):
        value = value.get("name")
    if value is None:
        keys = ", ".join(dict.fromkeys(["name", "model", "kind", *run.cell]))
        raise InputError(f"{document.locate(('out',))}: out: nothing to fill in for {{{key}}}; there are {keys}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return _shown(value["name"] if "name" in value else list(value.values()))
    return ",".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _slug(value: Any) -> str:
    text = re.sub(r"[^\w.+]+", "-", _shown(value).replace(",", "+")).strip("-.")
    return text[:60] or "x"
