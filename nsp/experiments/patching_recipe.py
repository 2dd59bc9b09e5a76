"""The recipe of kind ``activation-patching``: which sites are patched between which prompts, and what is measured.

Only the description lives here: checking it needs no model. Selections are kept as text in the selector grammar
(``all``, ``3``, ``1,4``, ``2:8``, ``subject``) and resolved against a model when the run is prepared.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from nsp.datasets.sets import SETS, MadeSet, make_set, pair_set
from nsp.errors import InputError
from nsp.metrics import METRICS, Metric
from nsp.recipe import DataPath, Recipe, RecipeOptions
from nsp.recipe_errors import problem_at
from nsp.sites import COMPONENTS, Site, component

if TYPE_CHECKING:
    from nsp.datasets.pairs import Pair

_INDEX = re.compile(r"-?\d+|(-?\d+)?:(-?\d+)?(:-?\d+)?")
_SPAN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_EXAMPLES = "write all, 3, [1, 4] or 2:8"


def _selection(value: Any, *, spans: bool) -> str:
    """A selection as text: ``all``, or indices, slices (and span names) between commas."""
    items = value if isinstance(value, list | tuple) else [value]
    examples = _EXAMPLES + (", last or the name of a span" if spans else "")
    if not items:
        raise ValueError(f"selects nothing; {examples}")
    if any(isinstance(item, bool) or not isinstance(item, int | str) for item in items):
        raise ValueError(f"{value!r} is no selection; {examples}")
    words = [word.strip() for item in items for word in str(item).split(",")]
    if words in (["all"], ["*"]):
        return "all"
    for word in words:
        if not (_INDEX.fullmatch(word) or (spans and _SPAN.fullmatch(word) and word != "all")):
            raise ValueError(f"{word!r} is no index or slice; {examples}")
        start, _, rest = word.partition(":")
        stop, _, step = rest.partition(":")
        if step and int(step) == 0:
            raise ValueError(f"the slice {word!r} has step 0")
        if start.isdigit() and stop.isdigit() and int(step or 1) > 0 and int(start) >= int(stop):
            raise ValueError(f"the slice {word!r} selects nothing: it ends before {stop}")
    return ",".join(words)


def _indices(value: Any) -> str:
    return _selection(value, spans=False)


def _places(value: Any) -> str:
    return _selection(value, spans=True)


def _optional(check: Callable[[Any], str]) -> Callable[[Any], str | None]:
    return lambda value: None if value is None else check(value)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


Indices = Annotated[str, BeforeValidator(_indices, json_schema_input_type=str | int | list[int | str])]
Positions = Annotated[str, BeforeValidator(_places, json_schema_input_type=str | int | list[int | str])]
Units = Annotated[
    str | None, BeforeValidator(_optional(_indices), json_schema_input_type=str | int | list[int | str] | None)
]


class Message(RecipeOptions):
    """One chat message."""

    role: str
    content: str


def _prompt_form(value: Any) -> str:
    if isinstance(value, list | tuple) and value:
        return "Message" if isinstance(value[0], dict | Message) else "ids"
    return "text"


TokenId = Annotated[int, Field(strict=True, ge=0)]
PromptText = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")]
    | Annotated[tuple[TokenId, ...], Tag("ids")]
    | Annotated[tuple[Message, ...], Tag("Message")],
    Discriminator(_prompt_form),
]
"""A prompt: text, token ids, or chat messages."""


def _span_name(name: str) -> str:
    if not _SPAN.fullmatch(name) or name in ("all", "last"):
        raise ValueError(f"{name!r} cannot name a span: letters, digits, _ and - (and not all or last)")
    return name


class SpanTexts(RecipeOptions):
    """A named span that reads differently in the two prompts."""

    clean: Annotated[str, Field(min_length=1)]
    corrupt: Annotated[str, Field(min_length=1)]


SpanText = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[SpanTexts, Tag("SpanTexts")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "SpanTexts"),
]
SpanName = Annotated[str, AfterValidator(_span_name)]


class PairOptions(RecipeOptions):
    """Two prompts that differ in what matters, and the answer that they tell apart."""

    clean: PromptText
    """The prompt for which the answer is right."""
    corrupt: PromptText
    """The same prompt, changed so that the answer is wrong."""
    answer: str | None = None
    """One token, with its leading space where the model's tokens have one: " Mary"."""
    distractor: str | None = None
    """One token: the answer of the corrupt prompt; `logit_diff` needs it."""
    spans: dict[SpanName, SpanText] = Field(default_factory=dict)
    """Names for parts of the prompts, each a text that occurs once: {subject: Mary}."""
    name: str | None = None

    def to_pair(self) -> Pair:
        """The pair as `nsp.pair` makes it."""
        from nsp.datasets.pairs import pair  # here, so that a recipe is read without torch

        spans = {
            name: text if isinstance(text, str) else (text.clean, text.corrupt) for name, text in self.spans.items()
        }
        return pair(
            clean=_plain_prompt(self.clean),
            corrupt=_plain_prompt(self.corrupt),
            answer=self.answer,
            distractor=self.distractor,
            spans=spans or None,
            name=self.name,
        )


class PairsFile(RecipeOptions):
    """Pairs from a csv, tsv or jsonl file with the columns clean, corrupt, answer, distractor (and span_*)."""

    path: DataPath
    columns: dict[Literal["clean", "corrupt", "answer", "distractor"], str] = Field(default_factory=dict)
    """Which of the file's columns to take for each, where they have other names."""


def _set_name(name: str) -> str:
    return pair_set(name).name


class PairSet(RecipeOptions):
    """A built-in set of pairs, made from templates with a seed for the model's tokenizer."""

    set: Annotated[str, AfterValidator(_set_name), Field(json_schema_extra={"enum": list(SETS)})]
    size: Annotated[int, Field(strict=True, ge=1)] | None = None
    """How many pairs; by default the set's own size."""
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    """Of the choice of words; a larger size with the same seed only adds pairs."""


def _pairs_form(value: Any) -> str:
    if isinstance(value, PairSet) or (isinstance(value, dict) and "set" in value):
        return "PairSet"
    return "PairsFile" if isinstance(value, dict | PairsFile) else "PairOptions"


def _pairs(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    is_path = re.search(r"[/\\]|\.[A-Za-z]+$", value) is not None
    return {"path" if is_path else "set": value}


Pairs = Annotated[
    Annotated[tuple[PairOptions, ...], Field(min_length=1), Tag("PairOptions")]
    | Annotated[PairsFile, Tag("PairsFile")]
    | Annotated[PairSet, Tag("PairSet")],
    Discriminator(_pairs_form),
]


class MetricOptions(RecipeOptions):
    """What is measured on the next-token distribution. A bare text is the kind."""

    kind: Annotated[str, Field(json_schema_extra={"enum": list(METRICS)})]
    tokens: tuple[str | int, ...] = ()
    """The tokens measured, where they are not the pair's answer (and distractor)."""
    reference: Literal["donor", "base"] = "donor"
    """For distances: the run that they are measured from."""
    position: Annotated[str, BeforeValidator(_places, json_schema_input_type=str | int)] = "last"
    name: str = ""
    """The variable's name in the results; by default the kind."""

    @model_validator(mode="after")
    def _exists(self) -> MetricOptions:
        self.to_metric()
        return self

    def to_metric(self) -> Metric:
        return Metric(self.kind, self.tokens, self.reference, self.position, self.name)


def _metrics(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list | tuple):
        return [{"kind": item} if isinstance(item, str) else item for item in value]
    return value


class ActivationPatchingRecipe(Recipe):
    """Patch each site of one prompt's run with its value from the other prompt's, one by one, and measure."""

    kind: Literal["activation-patching"]
    pairs: Annotated[
        Pairs, BeforeValidator(_pairs, json_schema_input_type=str | tuple[PairOptions, ...] | PairsFile | PairSet)
    ]
    """Pairs of prompts: a list, a csv, tsv or jsonl file, or the name of a built-in set."""
    mode: Literal["denoising", "noising", "interchange"] = "denoising"
    """denoising patches clean into corrupt, noising corrupt into clean, interchange both ways."""
    sites: Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = ()
    """Sites as selectors, such as "z[9][3] @ last", in place of components or beside them."""
    components: Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = (
        "resid_post",
    )
    """What is patched, at every layer, unit and position chosen below; resid_post, unless sites are given."""
    layers: Indices = "all"
    """all, an index, a list, or a slice such as 2:8."""
    positions: Positions = "all"
    """all, last, an index, a list, a slice, or the name of a span."""
    heads: Units = None
    """Patch these heads one by one (all, a list, a slice); by default all heads of a layer together."""
    neurons: Units = None
    """Patch these neurons one by one (all, a list, a slice); by default all neurons of a layer together."""
    together: tuple[Literal["layer", "position"], ...] = ()
    """Dims that are patched all at once instead of one by one."""
    metric: Annotated[
        tuple[MetricOptions, ...],
        BeforeValidator(_metrics, json_schema_input_type=str | MetricOptions | tuple[str | MetricOptions, ...]),
        Field(min_length=1),
    ] = (MetricOptions(kind="logit_diff"),)
    """What is measured: a metric, or a list of them. The first one also gives `effect`, its normalised form."""

    @model_validator(mode="before")
    @classmethod
    def _sites_instead(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sites") and "components" not in data:
            return {**data, "components": []}
        return data

    @field_validator("sites")
    @classmethod
    def _parse_sites(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        parsed = [Site.parse(site) for site in sites]
        for site in parsed:
            _patchable(site.component)
        return tuple(map(str, parsed))

    @field_validator("components")
    @classmethod
    def _know_components(cls, components: tuple[str, ...]) -> tuple[str, ...]:
        for name in components:
            if any(char in name for char in "[]@ "):
                raise ValueError(f"{name!r} is a selector; list it under sites, or give the component alone")
            _patchable(component(name).name)
        return tuple(dict.fromkeys(components))

    @model_validator(mode="after")
    def _fits_together(self) -> ActivationPatchingRecipe:
        if not self.components and not self.sites:
            raise problem_at(("components",), "nothing to patch: name at least one component, or sites")
        chosen = [component(name) for name in self.components]
        units = {item.unit for item in chosen}
        if chosen and self.layers != "all" and not any(item.layered for item in chosen):
            raise problem_at(("layers",), f"{', '.join(self.components)} has no layers to choose from")
        for key, unit in (("heads", "head"), ("neurons", "neuron")):
            if getattr(self, key) is not None and unit not in units:
                having = ", ".join(item.name for item in COMPONENTS.values() if item.unit == unit)
                raise problem_at((key,), f"no component of this recipe has {key}; {having} have")
        if not self.components:
            for key in ("layers", "positions"):
                if getattr(self, key) != "all":
                    raise problem_at((key,), "has no effect on sites; write it into the selectors, or give components")
        names = [metric.to_metric().name for metric in self.metric]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise problem_at(("metric", index), f"two metrics are called {name!r}; give one a name of its own")
        self._answers_suffice()
        return self

    def _answers_suffice(self) -> None:
        if not isinstance(self.pairs, tuple):
            return
        needed = max((METRICS[metric.kind].tokens for metric in self.metric if not metric.tokens), default=0)
        who = next((metric.kind for metric in self.metric if METRICS[metric.kind].tokens == needed), "")
        for index, item in enumerate(self.pairs):
            if needed > 0 and item.answer is None:
                raise problem_at(("pairs", index), f"the metric {who} needs an answer")
            if needed > 1 and item.distractor is None:
                raise problem_at(("pairs", index), f"the metric {who} needs a distractor (or take the metric logit)")

    def check(self) -> None:
        if not isinstance(self.pairs, PairSet):
            self.read_pairs()

    def make_pairs(self, tokenizer: Any) -> MadeSet:
        """The pairs for a model: as `read_pairs` reads them, or a built-in set made for its tokenizer.

        Items of a set that fail the token checks are in ``dropped``. InputError where too few are left.
        """
        if isinstance(self.pairs, PairSet):
            return make_set(self.pairs.set, tokenizer, size=self.pairs.size, seed=self.pairs.seed)
        return MadeSet(list(self.read_pairs()))

    def read_pairs(self) -> tuple[Pair, ...]:
        """The pairs, read from their file or made from the recipe. InputError names the file and line that is wrong."""
        if isinstance(self.pairs, PairsFile):
            from nsp.datasets.pairs import read_pairs

            columns = {str(key): column for key, column in self.pairs.columns.items()}
            return tuple(read_pairs(self.pairs.path, columns or None))
        if isinstance(self.pairs, PairSet):
            raise InputError(f"the set {self.pairs.set!r} is made for a tokenizer: call make_pairs(tokenizer)")
        return tuple(item.to_pair() for item in self.pairs)

    def metrics(self) -> tuple[Metric, ...]:
        """What is measured; metrics without tokens of their own take each pair's."""
        return tuple(metric.to_metric() for metric in self.metric)

    def selected_sites(self) -> tuple[Site, ...]:
        """Every component at the recipe's layers, units and positions, then the explicit sites."""
        found = []
        for item in map(component, self.components):
            layers = f"[{_bracket(self.layers)}]" if item.layered else ""
            chosen = {"head": self.heads, "neuron": self.neurons}.get(item.unit or "")
            units = f"[{_bracket(chosen)}]" if chosen is not None else ""
            found.append(Site.parse(f"{item.name}{layers}{units} @ {_bracket(self.positions)}"))
        return (*found, *map(Site.parse, self.sites))


def _bracket(selection: str) -> str:
    return "*" if selection == "all" else selection


def _patchable(name: str) -> None:
    if name == "logits":
        raise InputError("logits can be measured, not patched; patch resid_post of the last layer")


def _plain_prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [item.model_dump() if isinstance(item, Message) else item for item in prompt]
