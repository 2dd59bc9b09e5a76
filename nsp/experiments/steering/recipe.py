"""The recipe of kind ``steering``: what is scaled or added, how strongly, and what is generated and measured."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from nsp.experiments.annotations import LiveObjects
from nsp.experiments.contrast.recipe import ContrastComponent
from nsp.experiments.prompt_options import ChatOptions, DecodingOptions, Prompts
from nsp.experiments.selections import Indices, Positions, as_list
from nsp.recipe import DataPath, Recipe, RecipeOptions
from nsp.recipe_errors import problem_at

_NEURON = re.compile(r"L(\d+)/N(\d+)", re.IGNORECASE)


def neuron_place(name: str) -> tuple[int, int]:
    """(layer, neuron) of a name such as L23/N8079. ValueError says how to write one."""
    match = _NEURON.fullmatch(name.strip())
    if match is None:
        raise ValueError(f"{name!r} names no neuron; write L23/N8079 for neuron 8079 of layer 23")
    return int(match[1]), int(match[2])


def _neuron(name: str) -> str:
    layer, unit = neuron_place(name)
    return f"L{layer}/N{unit}"


def _store(value: Any) -> Any:
    if not isinstance(value, str) or "://" in value:
        return value
    path = os.path.normpath(getattr(value, "base", Path.cwd()) / Path(value).expanduser())
    if not os.path.exists(path):
        raise ValueError(f"the store {path} does not exist; `nsp run contrast` makes one")
    return path


StorePath = Annotated[str, BeforeValidator(_store, json_schema_input_type=str)]


class VectorOptions(RecipeOptions):
    """Where control vectors come from: two sets of prompts, a contrast's store, or numbers."""

    python_types: ClassVar[tuple[str, ...]] = ("ControlVectors",)

    positive: Prompts | None = None
    """Prompts to steer towards; the vectors are made from them and `negative` before the run."""
    negative: Prompts | None = None
    """Prompts to steer away from."""
    paired: bool = False
    """Prompt i of the one set belongs to prompt i of the other; pca needs it."""
    chat: ChatOptions = ChatOptions()
    """How a text becomes a prompt: the chat template, a system message, the beginning of the reply."""
    at: Literal["last", "mean"] = "last"
    """The last position, or the mean over positions."""
    drop_first: Annotated[int, Field(strict=True, ge=0)] = 1
    """With at: mean, leave out so many first tokens."""
    vectors: Literal["mean_difference", "pca"] = "mean_difference"
    """How control vectors are made from the prompts."""
    store: StorePath | None = None
    """A store of kind contrast, in place of prompts."""
    given: dict[str, Any] | None = None
    """The vectors themselves, as `ControlVectors.to_dict` writes them."""
    component: ContrastComponent = "resid_post"
    """What the vector is added to."""
    layers: Indices = "all"
    """The layers at which it is added, each with its own vector; one layer is usual."""

    @model_validator(mode="after")
    def _one_source(self) -> VectorOptions:
        prompts = self.positive is not None or self.negative is not None
        if prompts and (self.positive is None or self.negative is None):
            raise ValueError("a control vector takes both positive and negative prompts")
        if sum((prompts, self.store is not None, self.given is not None)) != 1:
            raise ValueError("a control vector comes from positive and negative prompts, or from a store, or is given")
        return self


class CircuitOptions(RecipeOptions):
    """A circuit whose units are scaled. A bare text is its file."""

    python_types: ClassVar[tuple[str, ...]] = ("Circuit",)

    path: DataPath | None = None
    """JSON, as `Circuit.save` (or the older tool) writes it."""
    given: str | None = None
    """The circuit itself, as JSON text."""
    top: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Only its strongest units."""

    @model_validator(mode="after")
    def _one_source(self) -> CircuitOptions:
        if (self.path is None) == (self.given is None):
            raise ValueError("a circuit comes from a path, or is given")
        return self


def _numbers(value: Any) -> Any:
    return value if value is None else as_list(value)


class SteeringRecipe(Recipe):
    """Scale a circuit's neurons, or add a control vector, while generating, at several strengths at once."""

    kind: Literal["steering"]
    prompts: Prompts
    """Prompts to continue."""
    chat: ChatOptions = ChatOptions()
    """How a text becomes a prompt."""
    vector: VectorOptions | None = None
    """Add a control vector; a multiplier of 0 adds nothing."""
    circuit: Annotated[
        CircuitOptions | None,
        BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v, json_schema_input_type=str | CircuitOptions),
    ] = None
    """Scale the units of a circuit; a multiplier of 1 changes nothing."""
    neurons: tuple[Annotated[str, AfterValidator(_neuron)], ...] = ()
    """Scale these MLP neurons, such as L23/N8079."""
    feature: Annotated[str | None, LiveObjects("Feature", "SteeringTarget")] = None
    """A named feature of the feature store (`nsp.find_feature`); in Python also a feature itself."""
    multipliers: Annotated[
        Annotated[tuple[float, ...], Field(min_length=1)] | None,
        BeforeValidator(_numbers, json_schema_input_type=float | list[float] | None),
    ] = None
    """Strengths, generated side by side; by default -2 to 2 for vectors, 0 to 4 for neurons. The strength that changes
    nothing is always among them."""
    positions: Positions = "all"
    """Where the prompt is changed: all, last, an index, a list; for a circuit also own, where its units were found."""
    when: Literal["prompt", "generated", "both"] | None = None
    """Whether the prompt, each generated token, or both are changed; by default both, or the prompt with positions: own."""
    tokens: tuple[str | int, ...] = ()
    """Tokens whose next-token probabilities are kept, with their leading space: " Paris"."""
    top_k: Annotated[int, Field(strict=True, ge=1)] = 5
    """How many of the most likely next tokens are kept."""
    decoding: DecodingOptions | None = DecodingOptions(max_new_tokens=40)
    """How texts are generated; null generates none."""

    @model_validator(mode="before")
    @classmethod
    def _feature_by_value(cls, keys: Any) -> Any:
        """A feature that is passed in Python, in place of its name, is the vector or the circuit that it holds."""
        feature = keys.get("feature") if isinstance(keys, Mapping) else None
        if not isinstance(feature, Mapping):
            return keys
        return {**{name: value for name, value in keys.items() if name != "feature"}, **feature}

    @model_validator(mode="after")
    def _one_target(self) -> SteeringRecipe:
        sources = [self.vector is not None, self.circuit is not None, bool(self.neurons), self.feature is not None]
        if sum(sources) != 1:
            raise problem_at((), "name what is steered by one of vector, circuit, neurons, feature")
        if self.positions == "own":
            if self.vector is not None or self.neurons:
                raise problem_at(("positions",), "only a circuit has positions of its own; write all, last or an index")
            if self.when in ("generated", "both"):
                raise problem_at(("when",), "a circuit's own positions are in the prompt; write when: prompt")
        if self.multipliers is not None and len(set(self.multipliers)) < len(self.multipliers):
            raise problem_at(("multipliers",), "names a multiplier twice")
        return self

    @property
    def acts_on(self) -> Literal["prompt", "generated", "both"]:
        """``when``, with its default."""
        return self.when or ("prompt" if self.positions == "own" else "both")
