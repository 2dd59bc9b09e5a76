"""The recipe of kind ``contrast``: two sets of prompts, and what is compared between them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from nsp.experiments.prompt_options import ChatOptions, Prompts, PromptsFile
from nsp.experiments.selections import Indices, listed
from nsp.recipe import DataPath, Recipe, RecipeOptions
from nsp.recipe_errors import problem_at

# Stated here too, so that a recipe is read without torch; a test holds the two together.
ContrastComponent = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_neurons"]


class GivenCircuit(RecipeOptions):
    """A circuit that is given in the recipe itself."""

    python_types: ClassVar[tuple[str, ...]] = ("Circuit",)

    given: str
    """The circuit as JSON text, as `Circuit.to_json` writes it."""


CircuitSource = Annotated[
    Annotated[DataPath, Tag("path")] | Annotated[GivenCircuit, Tag("GivenCircuit")],
    Discriminator(lambda value: "path" if isinstance(value, str) else "GivenCircuit"),
]


class ContrastRecipe(Recipe):
    """Compare activations between two sets of prompts: neurons that differ, and a control vector a layer."""

    kind: Literal["contrast"]
    positive: Prompts
    """Prompts that have what is looked for: a list, or a file."""
    negative: Prompts
    """Prompts that lack it."""
    paired: bool = False
    """Prompt i of the one set belongs to prompt i of the other; pca needs it, and tests gain power from it."""
    chat: ChatOptions = ChatOptions()
    """How a text becomes a prompt: the chat template, a system message, the beginning of the reply."""
    components: Annotated[
        tuple[ContrastComponent, ...], BeforeValidator(listed, json_schema_input_type=str | list[str]), Field(min_length=1)
    ] = ("mlp_neurons", "resid_post")
    """What is compared; each component gets neurons (or columns) by effect, and control vectors."""
    layers: Indices = "all"
    """all, an index, a list, or a slice such as 2:8."""
    at: Literal["last", "mean"] = "last"
    """The last position, or the mean over positions."""
    drop_first: Annotated[int, Field(strict=True, ge=0)] = 1
    """With at: mean, leave out so many first tokens: a model's first token is often an outlier whatever it says."""
    vectors: Literal["mean_difference", "pca"] = "mean_difference"
    """How control vectors are made."""
    correction: Literal["max-t", "bh", "by", "none"] = "max-t"
    """For the number of units tested, over all layers of a component: max-t (any false unit at all), bh or by (the share
    of false ones), none."""
    resamples: Annotated[int, Field(strict=True, ge=1)] = 2000
    """Permutations (or flips of pairs) of the test, for max-t and none."""
    decompose: bool = True
    """Take the control vectors of the residual stream apart into MLP neurons."""
    circuit: CircuitSource | None = None
    """A circuit to compare the control vectors with: a file (JSON, as `Circuit.save` writes it), or the circuit itself."""

    @model_validator(mode="after")
    def _fits_together(self) -> ContrastRecipe:
        if self.vectors == "pca" and not self.paired:
            raise problem_at(("vectors",), "pca takes the differences of paired prompts: set paired: true where they are")
        listed = [value for value in (self.positive, self.negative) if not isinstance(value, PromptsFile)]
        if self.paired and len(listed) == 2 and len(listed[0]) != len(listed[1]):
            raise problem_at(("paired",), f"paired sets have equally many prompts, not {len(listed[0])} and {len(listed[1])}")
        if len(set(self.components)) < len(self.components):
            raise problem_at(("components",), "names a component twice")
        return self
