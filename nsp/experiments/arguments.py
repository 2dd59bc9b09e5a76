"""What a Python caller passes for a recipe's key, as the plain data that a recipe file would hold.

A key takes what YAML can say, and live objects in place of it: a `Pair`, a `Metric`, a `Circuit`, numpy and torch
numbers and arrays, paths, options of a recipe, another `Model`. A kind with objects of its own registers them with
``recipe_value.register``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import singledispatch
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from nsp.datasets.pairs import Pair
from nsp.experiments.circuits import Circuit
from nsp.metrics import Metric
from nsp.model import Model


@singledispatch
def recipe_value(value: Any) -> Any:
    """``value`` as plain data; what has no plain form is returned as it is, and the recipe refuses it by name."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [recipe_value(item) for item in value]
    return value


@recipe_value.register(Mapping)
def _mapping(value: Mapping[Any, Any]) -> Any:
    if "input_ids" in value:  # what a tokenizer returns
        return _one_prompt(recipe_value(value["input_ids"]))
    return {key: recipe_value(item) for key, item in value.items()}


@recipe_value.register(BaseModel)
def _options(value: BaseModel) -> dict[str, Any]:
    return value.model_dump(exclude_unset=True)


@recipe_value.register(PurePath)
def _path(value: PurePath) -> str:
    return str(value)


@recipe_value.register(np.generic)
@recipe_value.register(np.ndarray)
@recipe_value.register(torch.Tensor)
def _numbers(value: Any) -> Any:
    return value.tolist()


@recipe_value.register(Pair)
def _pair(value: Pair) -> dict[str, Any]:
    spans = {
        name: {"clean": span[0], "corrupt": span[1]} if isinstance(span, tuple) else span for name, span in value.spans
    }
    prompts = {name: _one_prompt(recipe_value(prompt)) for name, prompt in (("clean", value.clean), ("corrupt", value.corrupt))}
    answers = {"answer": recipe_value(value.answer), "distractor": recipe_value(value.distractor)}
    return {**prompts, **answers, "spans": spans, "name": value.name}


def _one_prompt(value: Any) -> Any:
    """Token ids without the axis of a batch of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value


@recipe_value.register(Circuit)
def _circuit(value: Circuit) -> dict[str, Any]:
    return {"given": value.to_json()}


@recipe_value.register(Metric)
def _metric(value: Metric) -> dict[str, Any]:
    return value.to_dict()


@recipe_value.register(Model)
def _model(value: Model) -> str:
    return value.name
