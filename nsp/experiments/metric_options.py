"""Metrics in recipes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from nsp.errors import InputError
from nsp.experiments.selections import places
from nsp.metrics import METRICS, Metric
from nsp.recipe import DataPath, RecipeOptions


class DirectionFile(RecipeOptions):
    """A vector in a file: .npy, .safetensors or .pt. A bare text is the path."""

    path: DataPath
    """The file, relative to the recipe."""
    key: str | None = None
    """Which of the file's tensors, where it has several."""


def _direction(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Direction = Annotated[
    Annotated[DirectionFile, Tag("DirectionFile")] | Annotated[tuple[float, ...], Field(min_length=1), Tag("numbers")],
    Discriminator(lambda value: "DirectionFile" if isinstance(value, dict | DirectionFile) else "numbers"),
]


def read_direction(path: str | Path, key: str | None = None) -> tuple[float, ...]:
    """The one vector in a .npy, .safetensors or .pt file (``key`` names it where there are several).

    Raises InputError: another ending, a file that is no such file, no or several tensors, one that is no vector.
    """
    import numpy as np  # here, so that a recipe is read without it
    from safetensors import SafetensorError

    path = Path(path)
    try:
        if path.suffix == ".npy":
            tensors: Any = {"": np.load(path, allow_pickle=False)}
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file  # here, so that a recipe is read without torch

            tensors = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            import torch

            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors if isinstance(tensors, dict) else {"": tensors}
        else:
            raise InputError(f"{path}: directions are read from .npy, .safetensors, .pt and .pth files")
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read a direction from it ({error})") from None
    names = ", ".join(map(repr, tensors))
    if key is not None and key not in tensors:
        raise InputError(f"{path}: there is no tensor {key!r}; there are {names}")
    if key is None and len(tensors) != 1:
        raise InputError(f"{path} holds {names or 'nothing'}; name one with key")
    vector = tensors[key] if key is not None else next(iter(tensors.values()))
    values = vector.tolist() if hasattr(vector, "tolist") else vector
    if not isinstance(values, list) or not values or not all(isinstance(value, int | float) for value in values):
        shape = tuple(getattr(vector, "shape", ()))
        raise InputError(f"{path}: a direction is one vector of dims (width,), not of shape {shape}")
    return tuple(map(float, values))


class MetricOptions(RecipeOptions):
    """What is measured on the next-token distribution. A bare text is the kind."""

    python_types: ClassVar[tuple[str, ...]] = ("Metric",)

    kind: Annotated[str, Field(json_schema_extra={"enum": list(METRICS)})]
    """Which metric."""
    tokens: tuple[str | int, ...] = ()
    """The tokens measured, where they are not the pair's answer (and distractor); for cross_entropy the continuation, a
    text of any number of tokens."""
    reference: Literal["donor", "base"] = "donor"
    """For distances: the run that they are measured from."""
    position: Annotated[str, BeforeValidator(places, json_schema_input_type=str | int)] = "last"
    """The position whose next-token distribution is measured: last, an index or a named span."""
    name: str = ""
    """The variable's name in the results; by default the kind."""
    layer: Annotated[int, Field(strict=True, ge=0)] | None = None
    """For projection: the layer whose resid_post is read (at the position above)."""
    direction: Annotated[
        Direction | None, BeforeValidator(_direction, json_schema_input_type=str | DirectionFile | list[float] | None)
    ] = None
    """For projection: a file with one vector of the residual stream's width, or its numbers."""
    function: str = ""
    """For function: module:function, which takes float32 logits (row, token) and returns one number a row."""

    @model_validator(mode="after")
    def _exists(self) -> MetricOptions:
        self.to_metric()
        return self

    def to_metric(self) -> Metric:
        direction: tuple[float, ...] = ()
        if isinstance(self.direction, DirectionFile):
            direction = read_direction(self.direction.path, self.direction.key)
        elif self.direction is not None:
            direction = self.direction
        return Metric(
            self.kind, self.tokens, self.reference, self.position, self.name, self.layer, direction, self.function
        )


def _metrics(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list | tuple):
        return [_metric(item) if isinstance(item, str) else item for item in value]
    return value


def _metric(text: str) -> dict[str, str]:
    return {"kind": "function", "function": text, "name": text.rpartition(":")[2]} if ":" in text else {"kind": text}


MetricsField = Annotated[
    tuple[MetricOptions, ...],
    BeforeValidator(_metrics, json_schema_input_type=str | MetricOptions | tuple[str | MetricOptions, ...]),
    Field(min_length=1),
]
"""What is measured: a metric, or a list of them, each a kind, a module:function, or a mapping."""
