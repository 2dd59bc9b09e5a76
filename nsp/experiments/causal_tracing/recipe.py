"""The recipe of kind ``causal-tracing``: which facts, how the subject is corrupted, and what is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from nsp.datasets.facts import FACTS, Fact, read_facts
from nsp.experiments.metric_options import MetricOptions, MetricsField
from nsp.experiments.selections import Indices, Positions, as_list
from nsp.metrics import METRICS, Metric
from nsp.recipe import DataPath, Recipe, RecipeOptions
from nsp.recipe_errors import problem_at
from nsp.sites import COMPONENTS

TracedComponent = Literal["resid_post", "attn_out", "mlp_out"]


class FactOptions(RecipeOptions):
    """A prompt, the subject that it names, and the one token that completes it."""

    python_types: ClassVar[tuple[str, ...]] = ("Fact",)

    prompt: Annotated[str, Field(min_length=1)]
    """The sentence up to its answer; it names the subject once."""
    subject: Annotated[str, Field(min_length=1)]
    """A piece of the prompt that occurs once in it; its tokens get the noise."""
    answer: Annotated[str, Field(min_length=1)]
    """One token, with its leading space where the model's tokens have one: " Paris"."""


class FactsFile(RecipeOptions):
    """Facts from a csv, tsv, json or jsonl file with the columns prompt, subject and answer."""

    path: DataPath
    """A csv, tsv, json or jsonl file, relative to the recipe."""


class FactsSet(RecipeOptions):
    """The facts that ship with nsp."""

    set: Literal["facts"] = "facts"
    """The set's name."""


def _form(value: Any) -> str:
    if isinstance(value, FactsFile) or (isinstance(value, Mapping) and "path" in value):
        return "FactsFile"
    return "FactsSet" if isinstance(value, Mapping | FactsSet) else "FactOptions"


def _facts(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return {"set": value} if value == "facts" else {"path": value}


FactsField = Annotated[
    Annotated[
        Annotated[tuple[FactOptions, ...], Field(min_length=1), Tag("FactOptions")]
        | Annotated[FactsFile, Tag("FactsFile")]
        | Annotated[FactsSet, Tag("FactsSet")],
        Discriminator(_form),
    ],
    BeforeValidator(_facts, json_schema_input_type=str | tuple[FactOptions, ...] | FactsFile | FactsSet),
]


class NoiseOptions(RecipeOptions):
    """The noise that is added to the subject's embeddings. A bare number is its scale."""

    scale: Annotated[float, Field(gt=0)] = 3.0
    """Standard deviation, in units of the deviation below."""
    of: Literal["embedding", "subjects"] = "embedding"
    """Whose deviation is the unit: the embedding matrix's entries, or what the model's first layer receives at the
    subjects of the recipe's facts (needed where a model scales its embeddings, as Gemma does)."""
    draws: Annotated[int, Field(strict=True, ge=1)] = 5
    """How many times noise is drawn for each fact; effects are means over draws."""


def _noise(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"scale": value} if number else value


class CausalTracingRecipe(Recipe):
    """Corrupt a fact's subject with noise, restore one state (or a window of layers) from the clean run, and measure."""

    kind: Literal["causal-tracing"]
    facts: FactsField = FactsSet()
    """Facts: `facts` (the set that ships with nsp), a file, or a list of {prompt, subject, answer}."""
    limit: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Take only so many facts, the first that the model knows."""
    known_only: bool = True
    """Leave out facts whose answer is not the model's most likely next token: there is nothing to restore."""
    noise: Annotated[NoiseOptions, BeforeValidator(_noise, json_schema_input_type=float | NoiseOptions)] = NoiseOptions()
    """The noise that corrupts the subject's embeddings."""
    components: Annotated[
        tuple[TracedComponent, ...],
        BeforeValidator(as_list, json_schema_input_type=TracedComponent | tuple[TracedComponent, ...]),
        Field(min_length=1),
    ] = ("resid_post", "attn_out", "mlp_out")
    """What is restored: single states of the residual stream, windows of layers of attention or MLP outputs."""
    window: Annotated[int, Field(strict=True, ge=1)] = 10
    """How many layers of attn_out or mlp_out are restored together, centred on a layer and clipped at the ends."""
    layers: Indices = "all"
    """The layers restored (the centres of windows): all, an index, a list, or a slice such as 2:8."""
    positions: Positions = "all"
    """The positions restored, one by one: all, last, subject, an index, a list, a slice."""
    metric: MetricsField = (MetricOptions(kind="prob"), MetricOptions(kind="logprob"))
    """What is measured: a metric, or a list of them. Effects on the first are in `indirect_effect`."""

    @model_validator(mode="after")
    def _fits_together(self) -> CausalTracingRecipe:
        names: list[str] = []
        for index, metric in enumerate(self.metrics()):
            kind = METRICS[metric.kind]
            if kind.tokens > 1 and not metric.tokens:
                raise problem_at(("metric", index), f"{metric.kind} needs a distractor, which a fact has not; name its tokens")
            if kind.several:
                raise problem_at(("metric", index), f"{metric.kind} measures continuations; take logprob of the answer")
            if metric.name in names:
                raise problem_at(("metric", index), f"two metrics are called {metric.name!r}; give one a name of its own")
            names.append(metric.name)
        if len(set(self.components)) < len(self.components):
            raise problem_at(("components",), "a component is listed twice")
        return self

    def check(self) -> None:
        self.read_facts()

    def read_facts(self) -> tuple[Fact, ...]:
        """The facts, read from their file where there is one. InputError names the file and line that is wrong."""
        if isinstance(self.facts, FactsSet):
            return FACTS
        if isinstance(self.facts, FactsFile):
            return tuple(read_facts(self.facts.path))
        return tuple(Fact(item.prompt, item.subject, item.answer) for item in self.facts)

    def metrics(self) -> tuple[Metric, ...]:
        """What is measured; metrics without tokens of their own take each fact's answer."""
        return tuple(metric.to_metric() for metric in self.metric)

    def width(self, component: str) -> int:
        """How many layers of a component are restored together; a state of the residual stream is restored alone."""
        return self.window if COMPONENTS[component].adds else 1
