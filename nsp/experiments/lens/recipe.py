"""The recipe of kind ``lens``: which prompts and layers are read, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from nsp.experiments.annotations import LiveObjects
from nsp.experiments.prompt_options import ChatOptions, Prompts
from nsp.experiments.selections import Indices, Positions, as_list
from nsp.recipe import DataPath, Recipe, RecipeOptions
from nsp.recipe_errors import problem_at


class TuneOptions(RecipeOptions):
    """How a tuned lens is trained."""

    text: DataPath
    """A text file."""
    tokens: Annotated[int, Field(strict=True, ge=64)] = 4096
    """How many of its tokens are used; a tenth of them is held out."""
    sequence: Annotated[int, Field(strict=True, ge=8)] = 128
    """Tokens of one piece of the text."""
    steps: Annotated[int, Field(strict=True, ge=0)] = 50
    """Steps of gradient descent on the divergence from the model's output, after a least-squares start."""
    batch: Annotated[int, Field(strict=True, ge=1)] = 16
    """Positions a step."""
    rate: Annotated[float, Field(gt=0)] = 1e-4
    """The learning rate of Adam."""
    ridge: Annotated[float, Field(gt=0)] = 0.01
    """The penalty of the least-squares start, relative to the mean variance of a layer."""
    save_to: str | None = None
    """A directory that the lens is saved to, in the format of the tuned-lens package."""


class LensRecipe(Recipe):
    """What would the model say if it stopped at each layer? The residual stream, read as next-token predictions."""

    kind: Literal["lens"]
    prompts: Prompts
    """Texts, or a file of them."""
    chat: ChatOptions = ChatOptions()
    """How a text becomes a prompt of an instruct model."""
    method: Literal["logit", "tuned", "patchscope"] = "logit"
    """logit: the model's own norm and head; tuned: an affine translator before them; patchscope: put into the
    token-identity prompt "cat -> cat ... ?" and read there."""
    layers: Indices = "all"
    """Layers whose resid_post is read."""
    positions: Positions = "all"
    """Token positions that are read."""
    tokens: Annotated[
        tuple[str | int, ...], BeforeValidator(as_list, json_schema_input_type=str | int | list[str | int])
    ] = ()
    """Tokens to follow: their probability, log-probability and rank everywhere. With its leading space: " Paris"."""
    top: Annotated[int, Field(strict=True, ge=1)] = 5
    """How many of the most likely tokens are kept."""
    weights: Annotated[str | None, LiveObjects("TunedLens")] = None
    """tuned: a directory with a lens (config.json, params.pt), of nsp or of the tuned-lens package; in Python also a lens."""
    train: TuneOptions | None = None
    """tuned: train the lens instead."""
    target_layer: Annotated[int, Field(strict=True, ge=0)] | None = None
    """patchscope: the layer that is written in the identity prompt; by default the layer that was read."""
    template: Literal["few_shot", "identity"] = "few_shot"
    """patchscope: few_shot ends with the placeholder, so that the next token is read (as in the paper); identity goes on
    with " ->", so that the token itself is."""

    @model_validator(mode="after")
    def _fits_together(self) -> LensRecipe:
        if (self.method == "tuned") != ((self.weights is None) != (self.train is None)) or (
            self.weights and self.train
        ):
            raise problem_at(
                ("method",), "the tuned lens needs weights or train, one of them; no other method takes them"
            )
        for key in ("target_layer", "template"):
            if getattr(self, key) != type(self).model_fields[key].default and self.method != "patchscope":
                raise problem_at((key,), "is for the patchscope method")
        return self
