"""The Python doors: one function for each kind of experiment, made from the fields of its recipe.

A door's parameters are the model and the recipe's keys; every door takes ``out``, ``force``, ``progress``,
``store_dtype`` and ``plot`` as well. Its signature, types, defaults and docstring come from the recipe class, so that a
parameter is stated once.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import xarray as xr
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nsp.errors import InputError, suggestion
from nsp.experiments import runner
from nsp.experiments.annotations import python_type
from nsp.experiments.arguments import recipe_value
from nsp.experiments.experiment import Experiment
from nsp.experiments.figure_display import check_place, show
from nsp.experiments.registry import experiment_of
from nsp.model import Model
from nsp.recipe_errors import checked

# Keys of a recipe that say which model runs, where, and what the run is called: a Python caller holds the model.
NOT_ARGUMENTS = ("kind", "name", "description", "model", "models", "backend", "out")
LAST = ("memory", "seed")
RUN_OPTIONS: Mapping[str, tuple[str, Any, str]] = {
    "out": ("str | Path | None", None, "Where to keep the run as a store; None keeps it in memory alone."),
    "force": ("bool", False, "Replace a store at ``out`` that holds another run."),
    "progress": ("bool | None", None, "Show a bar; None shows one in a notebook alone."),
    "store_dtype": ("Literal['float32', 'bfloat16', 'float16'] | None", None, "Round what the store keeps."),
    "plot": ("bool | str | Path", False, "Show the run's figure, or write it to a file (``'figure.png'``)."),
}
Door = Callable[..., xr.DataTree]


def arguments(kind: type[Experiment[Any]]) -> dict[str, FieldInfo]:
    """The recipe's fields that are arguments of its door: needed ones first, memory and seed last."""
    fields = {name: field for name, field in kind.recipe_class.model_fields.items() if name not in NOT_ARGUMENTS}
    order = [*kind.positional, *(name for name, field in fields.items() if field.is_required())]
    order += [name for name in fields if name not in LAST] + list(LAST)
    return {name: fields[name] for name in dict.fromkeys(order)}


def positional(kind: type[Experiment[Any]]) -> tuple[str, ...]:
    """The keys that may be passed by position, after the model."""
    return kind.positional or tuple(name for name, field in arguments(kind).items() if field.is_required())


def make_door(kind: type[Experiment[Any]], name: str, fixed: Mapping[str, Any] | None = None) -> Door:
    """The function ``name`` of a kind of experiment; ``fixed`` are keys of its recipe that it does not take."""
    constant = dict(fixed or {})
    form = signature(kind, constant)

    def door(*args: Any, **keys: Any) -> xr.DataTree:
        models, chosen = _bound(kind, name, form, args, keys)
        run = {option: chosen.pop(option, default) for option, (_, default, _) in RUN_OPTIONS.items()}
        plot = run.pop("plot")
        check_place(plot)
        model, given = _model(kind, models)
        recipe: dict[str, Any] = {"kind": kind.kind, **constant, **given}
        recipe |= {key: recipe_value(value) for key, value in chosen.items()}
        prepared = kind(model, checked(kind.recipe_class, recipe), {**models, **chosen})
        tree = runner.results(prepared, **run)
        if plot:
            show(kind.figure(tree), plot)
        return tree

    door.__name__ = door.__qualname__ = name
    door.__module__ = "nsp.experiments"
    door.__doc__ = docstring(kind, constant)
    door.__signature__ = form  # type: ignore[attr-defined]
    return door


def signature(kind: type[Experiment[Any]], fixed: Mapping[str, Any]) -> inspect.Signature:
    """The parameters of a door: the model (or models), the recipe's keys, and how the run is kept."""
    by_position = positional(kind)
    either, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    names = kind.model_keys or ("model",)
    parameters = [inspect.Parameter(names[0], either, annotation="Model")]
    parameters += [inspect.Parameter(key, either, default=None, annotation="Model | None") for key in names[1:]]
    for key, field in arguments(kind).items():
        if key not in fixed:
            default = inspect.Parameter.empty if field.is_required() else _default(field)
            where = either if key in by_position else named
            if where is either and default is inspect.Parameter.empty and len(names) > 1:
                default = None
            annotation = python_type(field)
            if default is None and "None" not in annotation.split(" | "):
                annotation += " | None"
            parameters.append(inspect.Parameter(key, where, default=default, annotation=annotation))
    for option, (annotation, default, _) in RUN_OPTIONS.items():
        parameters.append(inspect.Parameter(option, named, default=default, annotation=annotation))
    return inspect.Signature(parameters, return_annotation="xr.DataTree")


def docstring(kind: type[Experiment[Any]], fixed: Mapping[str, Any]) -> str:
    """What a door does, what each argument means, and what it returns."""
    models = (f"    {name}: a loaded model{kind.model_texts.get(name, '')}." for name in kind.model_keys or ("model",))
    lines = [inspect.cleandoc(kind.recipe_class.__doc__ or ""), "", "Args:", *models]
    for name, field in arguments(kind).items():
        if name not in fixed:
            text = " ".join((field.description or "").split())
            lines += textwrap.wrap(f"{name}: {text}", 116, initial_indent="    ", subsequent_indent="        ")
    for name, (_, _, text) in RUN_OPTIONS.items():
        lines.append(f"    {name}: {text}")
    if kind.results:
        lines += ["", "Returns:"]
        lines += textwrap.wrap(f"a tree with {kind.results}", 116, initial_indent="    ", subsequent_indent="        ")
    lines += ["", "Raises:", "    InputError: a key is wrong, or does not fit the model; nothing has run then."]
    return "\n".join(lines)


def _default(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True)
    return _plain(default)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _bound(
    kind: type[Experiment[Any]], name: str, form: inspect.Signature, args: tuple[Any, ...], keys: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The models, and the other arguments that were passed, by name."""
    unknown = [key for key in keys if key not in form.parameters]
    if unknown:
        known = list(form.parameters)
        raise InputError(f"{name} takes no {unknown[0]!r}{suggestion(unknown[0], known)} (it takes {', '.join(known)})")
    try:
        given = dict(form.bind(*args, **keys).arguments)
    except TypeError as error:
        raise InputError(f"{name}: {error}; it is called {name}{_call(form)}") from None
    models = {key: given.pop(key) for key in kind.model_keys or ("model",) if key in given}
    for key, model in models.items():
        if model is not None and not isinstance(model, Model):
            kind_name = type(model).__name__
            raise InputError(f"{name}: {key} is a loaded model, such as nsp.load('smollm2'), not {kind_name} {model!r:.60}")
    return {key: model for key, model in models.items() if model is not None}, given


def _call(form: inspect.Signature) -> str:
    needed = [
        parameter.name
        for parameter in form.parameters.values()
        if parameter.default is inspect.Parameter.empty or parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return f"({', '.join(needed)}, ...)"


def _model(kind: type[Experiment[Any]], models: Mapping[str, Model]) -> tuple[Model, dict[str, Any]]:
    """The model that the run is loaded with, and what the recipe says of its models."""
    if not kind.model_keys:
        model = models["model"]
        return model, {"model": model.name}
    return list(models.values())[-1], {"models": {key: model.name for key, model in models.items()}}


@cache
def door(name: str, kind: str | None = None) -> Door:
    """The function ``name`` of `nsp.experiments`, of a kind of experiment; by default of the kind that it is named like.

    Raises:
        InputError: nsp has no such kind, or the kind no such door.
    """
    experiment = experiment_of(kind or name.replace("_", "-"))
    return doors_of(experiment)[name]


def doors_of(kind: type[Experiment[Any]]) -> dict[str, Door]:
    """Every door of a kind, by name."""
    named: dict[str, Mapping[str, Any]] = {} if kind.door in kind.doors else {kind.door: {}}
    named |= kind.doors
    return {name: make_door(kind, name, fixed) for name, fixed in named.items()}
