"""The recipe of kind ``attribution``: prompts and targets, methods, how circuits are selected, how they are proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from nsp.datasets.table_files import read_rows
from nsp.errors import InputError
from nsp.experiments.pair_options import PromptText
from nsp.experiments.prompt_options import ChatOptions, Prompts, is_prompts_path
from nsp.experiments.selections import Indices, Positions, listed
from nsp.recipe import DataPath, Recipe, RecipeOptions
from nsp.recipe_errors import problem_at
from nsp.sites import component

NodeMethod = Literal["atp", "atp_ig", "eap_ig", "grad_x_act", "relp"]
Method = Literal[NodeMethod, "edge"]
NODE_METHODS: tuple[NodeMethod, ...] = get_args(NodeMethod)
UnitAt = tuple[int, int]  # layer, unit
Ablation = Literal["zero", "mean", "resample", "counterfactual"]
RUNNER_UP, NONE, OWN = "runner-up", "none", "own"
FACT_SETS = ("fact-questions", "facts")
MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The proportions at which the MIB benchmark evaluates circuits (Mueller et al. 2025)."""


class AttributedPrompt(RecipeOptions):
    """One prompt with its answer."""

    prompt: PromptText
    """The prompt: a text, chat messages or token ids."""
    answer: str | int | None = None
    """The target, with its leading space where the model's tokens have one; by default the recipe's."""
    distractor: str | int | None = None
    """The counterfactual token; by default the recipe's."""
    donor: PromptText | None = None
    """The counterfactual prompt, which donor: counterfactual needs."""
    name: str | None = None
    """A short name for the prompt in results."""


class FactSet(RecipeOptions):
    """A built-in set: fact-questions (for chat models: the template, and a reply that begins "Answer:") or facts."""

    set: Annotated[str, Field(json_schema_extra={"enum": list(FACT_SETS)})]
    """The set's name."""
    size: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Only the first so many (of those that the model answers rightly)."""

    @field_validator("set")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FACT_SETS:
            raise ValueError(f"there is no set {name!r}; there are {', '.join(FACT_SETS)}")
        return name


class PromptTable(RecipeOptions):
    """Prompts from a csv, tsv, json or jsonl file with the columns prompt, answer, distractor, donor, name (all but prompt optional)."""

    path: DataPath
    """The file, relative to the recipe."""
    limit: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Take this many rows, the first ones."""

    def read(self) -> tuple[AttributedPrompt, ...]:
        """The prompts; InputError names file and line."""
        columns = ("prompt", "answer", "distractor", "donor", "name")
        prompts = []
        for row in read_rows(self.path):
            values = {name: row.values[name] for name in columns if row.values.get(name) not in (None, "")}
            if not isinstance(values.get("prompt"), str):
                raise InputError(f"{row.where}: no text in the column prompt; columns are {', '.join(columns)}")
            prompts.append(AttributedPrompt.model_validate(values))
        return tuple(prompts[: self.limit])


def _form(value: Any) -> str:
    if isinstance(value, FactSet) or (isinstance(value, dict) and "set" in value):
        return "FactSet"
    return "PromptTable" if isinstance(value, dict | PromptTable) else "AttributedPrompt"


def _given(value: Any) -> Any:
    """One prompt may stand alone; a text is a built-in set, a file, or (in Python, without a file's ending) a prompt."""
    if isinstance(value, str) and value in FACT_SETS:
        return {"set": value}
    if is_prompts_path(value):
        return {"path": value}
    if isinstance(value, FactSet | PromptTable) or (isinstance(value, dict) and "prompt" not in value):
        return value
    alone = not isinstance(value, list | tuple) or (len(value) > 0 and (isinstance(value[0], int) or _is_message(value[0])))
    prompts = [value] if alone else value
    return [prompt if isinstance(prompt, AttributedPrompt) or _has_keys(prompt) else {"prompt": prompt} for prompt in prompts]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value


def _has_keys(value: Any) -> bool:
    return isinstance(value, dict) and not _is_message(value)


def _counterfactual(value: Any) -> Any:
    return NONE if value is None else value


Attributed = Annotated[
    Annotated[tuple[AttributedPrompt, ...], Field(min_length=1), Tag("AttributedPrompt")]
    | Annotated[PromptTable, Tag("PromptTable")]
    | Annotated[FactSet, Tag("FactSet")],
    Discriminator(_form),
]


def _any_of(schema: dict[str, Any]) -> None:
    """In JSON's eyes "own" is a path as well, so a schema that asks for exactly one form would refuse it."""
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")


def _reference_form(value: Any) -> str:
    return "own" if value == OWN else "prompts"


Reference = Annotated[
    Annotated[Literal["own"], Tag("own")] | Annotated[Prompts, Tag("prompts")],
    Discriminator(_reference_form),
    Field(json_schema_extra=_any_of),
]


def _unit_pairs(value: Any) -> Any:
    return tuple((int(layer), int(unit)) for layer, unit in value)


class Selection(RecipeOptions):
    """Which units make the circuit."""

    method: NodeMethod = "relp"
    """Whose scores decide."""
    top_k: Annotated[int, Field(strict=True, ge=1)] | None = 100
    """Keep so many of the strongest."""
    per_layer: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Keep at most so many of each layer, before top_k."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep the strongest that together make this share of the sum of all absolute contributions."""
    percent: Annotated[float, Field(gt=0)] | None = None
    """Keep units whose contribution is at least this percentage of the metric."""
    over: Literal["prompt", "mean", "any"] = "prompt"
    """prompt: each prompt has its own circuit; mean: one circuit from mean contributions; any: the union of each prompt's."""
    sign: Literal["both", "positive", "negative"] = "both"
    """Units that support the target (positive), that oppose it, or both."""
    layers: Indices = "all"
    """all, an index, a list, or a slice such as 2:8."""
    drop_first: bool = False
    """Leave out the first position, whose activations are outliers in many models."""
    drop_last: Annotated[int, Field(strict=True, ge=0)] = 0
    """Leave out so many last positions."""
    blacklist: DataPath | Annotated[tuple[tuple[int, int], ...], AfterValidator(_unit_pairs)] = ()
    """Units that are never kept: a JSON file of [layer, unit] pairs, or the pairs."""
    universal: Annotated[float, Field(gt=0, le=1)] | None = None
    """Leave out units that are among the universal_top strongest in at least this share of the prompts."""
    universal_top: Annotated[int, Field(strict=True, ge=1)] = 100
    """How many units of a prompt count as its strongest, for `universal`."""

    @model_validator(mode="after")
    def _keeps_something(self) -> Selection:
        if self.top_k is None and self.per_layer is None and self.share is None and self.percent is None:
            raise ValueError("selects everything: give top_k, per_layer, share or percent")
        return self

    def barred(self) -> frozenset[UnitAt]:
        """The units of the blacklist."""
        return read_blacklist(self.blacklist) if isinstance(self.blacklist, str) else frozenset(self.blacklist)


def read_blacklist(path: str | Path) -> frozenset[UnitAt]:
    """Units from a JSON file: a list of [layer, unit] pairs."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return frozenset((int(layer), int(unit)) for layer, unit in data)
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise InputError(f"the blacklist {path} is no JSON list of [layer, unit] pairs: {error}") from None


class VerifyOptions(RecipeOptions):
    """How attributions and circuits are checked by exact patching."""

    exact: Literal["none", "top", "all"] = "top"
    """Patch each method's strongest units one by one (top), all units (all), or none."""
    top: Annotated[int, Field(strict=True, ge=1)] = 50
    """How many are the strongest: for exact: top, for the recall and for the miss rate."""
    ablations: Annotated[tuple[Ablation, ...], BeforeValidator(listed, json_schema_input_type=str | list[str])] = (
        "mean",
    )
    """What replaces the units outside (or inside) a circuit in the curves; empty: no curves."""
    sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = MIB_SIZES
    """Circuit sizes of the curves as proportions of all units; by default those of the MIB benchmark."""
    curve_draws: Annotated[int, Field(strict=True, ge=0)] = 3
    """Random circuits beside each size of the first ablation's curve, with as many units in each layer."""
    draws: Annotated[int, Field(strict=True, ge=0)] = 20
    """Random circuits beside the selected one, with as many units in each layer, when it is scaled to 0; 0: not tried."""

    @field_validator("sizes")
    @classmethod
    def _ascending(cls, sizes: tuple[float, ...]) -> tuple[float, ...]:
        if list(sizes) != sorted(set(sizes)) or len(sizes) < 2:
            raise ValueError("circuit sizes are at least two proportions, ascending, such as [0.001, 0.01, 0.1, 1.0]")
        return sizes


class AttributionRecipe(Recipe):
    """Attribute a metric to units by gradients, select circuits, and check both by exact patching."""

    kind: Literal["attribution"]
    prompts: Annotated[
        Attributed,
        BeforeValidator(
            _given, json_schema_input_type=str | tuple[str | AttributedPrompt, ...] | PromptTable | FactSet
        ),
    ]
    """Prompts (texts, or mappings with an answer), a csv, tsv or jsonl file, or a built-in set: fact-questions, facts."""
    chat: ChatOptions | None = None
    """The chat template, a system message, the beginning of the reply; a built-in set brings its own."""
    answer: str | int | None = None
    """The target of every prompt that names no answer; by default the model's most likely token."""
    counterfactual: Annotated[
        str | int, BeforeValidator(_counterfactual, json_schema_input_type=str | int | None)
    ] = RUNNER_UP
    """The token that the target is measured against: runner-up, none (the target alone), or a token or its id."""
    target: Literal["single", "first", "last", "all"] = "single"
    """Of an answer of several tokens: single is an error; first or last; all makes each token a prompt of its own."""
    measure: Literal["logit", "logprob", "prob"] = "logit"
    """With counterfactual: none, what is attributed of the target."""
    position: Positions = "last"
    """The position whose next-token distribution is measured."""
    known: bool = True
    """Of a built-in set, leave out what the model does not give as its most likely next token."""
    components: Annotated[
        tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str]), Field(min_length=1)
    ] = ("mlp_neurons",)
    """What is attributed, all of its units at once."""
    layers: Indices = "all"
    """all, an index, a list, or a slice such as 2:8."""
    positions: Positions = "last"
    """The positions whose units are attributed: all, last, an index, a list, a slice."""
    methods: Annotated[
        tuple[Method, ...], BeforeValidator(listed, json_schema_input_type=str | list[str]), Field(min_length=1)
    ] = ("relp",)
    """atp, atp_ig, eap_ig, grad_x_act, relp for units; edge for edges between heads and MLPs."""
    steps: Annotated[int, Field(strict=True, ge=1)] = 5
    """Of the integrated methods."""
    attention: Literal["frozen", "through"] = "frozen"
    """In relp: the attention pattern is detached, or gradients go through it."""
    donor: Ablation = "zero"
    """What replaces a unit, in scores and in exact effects alike."""
    reference: Reference | None = None
    """Prompts of mean and resample: own (the run's prompts; all of a built-in set), a list, a file; by default nsp's neutral sentences."""
    reference_over: Literal["tokens", "end"] | None = None
    """Over all tokens of the reference prompts, or over what is at the same position from the end (by default for own)."""
    select: Selection = Selection()
    """Which units make a circuit; can be chosen again later from the store, without computing anything."""
    verify: VerifyOptions | None = None
    """Proof by exact patching."""

    @field_validator("components")
    @classmethod
    def _know(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            component(name)
        return tuple(dict.fromkeys(names))

    @field_validator("methods")
    @classmethod
    def _once(cls, names: tuple[Method, ...]) -> tuple[Method, ...]:
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _fits_together(self) -> AttributionRecipe:
        nodes = [method for method in self.methods if method != "edge"]
        if nodes and self.select.method not in nodes:
            if "method" in self.select.model_fields_set:
                raise problem_at(
                    ("select", "method"), f"{self.select.method} is not among the methods {', '.join(nodes)}"
                )
            object.__setattr__(self, "select", self.select.model_copy(update={"method": nodes[0]}))
        if self.verify is not None and not nodes:
            raise problem_at(("verify",), "edge scores are not verified; add a method of units, such as relp")
        uses = {self.donor, *(self.verify.ablations if self.verify else ())}
        if "counterfactual" in uses and isinstance(self.prompts, tuple):
            for number, item in enumerate(self.prompts):
                if item.donor is None:
                    raise problem_at(
                        ("prompts", number), "donor: counterfactual needs a counterfactual prompt here (donor: …)"
                    )
        if "counterfactual" in uses and isinstance(self.prompts, FactSet):
            raise problem_at(("donor",), "a built-in set has no counterfactual prompts; take zero, mean or resample")
        if self.answer is not None and isinstance(self.prompts, FactSet):
            raise problem_at(("answer",), "a built-in set has its own answers")
        if self.reference_over == "end" and self.reference is None:
            raise problem_at(
                ("reference_over",), "end needs reference prompts of the prompts' own form: reference: own, or a list"
            )
        if self.measure != "logit" and self.counterfactual != NONE:
            raise problem_at(
                ("measure",), "goes with counterfactual: none; a difference of logits is measured otherwise"
            )
        return self

    @property
    def over(self) -> Literal["tokens", "end"]:
        """What mean and resample are over."""
        return self.reference_over or ("end" if self.reference == OWN else "tokens")

    @property
    def nodes(self) -> tuple[str, ...]:
        """The methods of units."""
        return tuple(method for method in self.methods if method != "edge")
