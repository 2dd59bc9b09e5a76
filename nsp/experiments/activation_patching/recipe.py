"""The recipe of kind ``activation-patching``: which sites are patched between which prompts, and what is measured.

Only the description lives here: checking it needs no model. Selections are kept as text in the selector grammar
(``all``, ``3``, ``1,4``, ``2:8``, ``subject``) and resolved against a model when the run is prepared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nsp.datasets.pair_sets import CheckedPairs
from nsp.errors import InputError
from nsp.experiments.metric_options import MetricOptions, MetricsField
from nsp.experiments.pair_options import PairSet, PairsField, given_pairs, make_pairs
from nsp.experiments.selections import Indices, Positions, Units, listed
from nsp.metrics import METRICS, Metric
from nsp.recipe import Recipe, RecipeOptions
from nsp.recipe_errors import problem_at
from nsp.sites import COMPONENTS, Site, component

if TYPE_CHECKING:
    from nsp.datasets.pairs import Pair


class StatisticsOptions(RecipeOptions):
    """How effects over pairs are judged. Nothing that is computed or stored depends on it."""

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the intervals of mean effects."""
    bootstrap: Annotated[int, Field(strict=True, ge=1)] = 2000
    """Resamples of the pairs for the intervals."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """A site is significant where its corrected p is at most this."""
    correction: Literal["max-t", "bh", "by", "none"] = "max-t"
    """For the number of sites: max-t bounds the chance of one false site, bh and by the share of false ones."""
    resamples: Annotated[int, Field(strict=True, ge=1)] = 9999
    """Sign flips of the pairs for p; all of them are made where there are no more."""
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    """Seed of resampling, permutations and the split."""


class ActivationPatchingRecipe(Recipe):
    """Patch each site of one prompt's run with its value from the other prompt's, one by one, and measure."""

    report_keys: ClassVar[tuple[str, ...]] = ("statistics", "threshold", "split")

    kind: Literal["activation-patching"]
    pairs: PairsField
    """Pairs of prompts: a list, a csv, tsv or jsonl file, or the name of a built-in set."""
    mode: Literal["denoising", "noising", "interchange"] = "denoising"
    """denoising patches clean into corrupt, noising corrupt into clean, interchange both ways."""
    sites: Annotated[tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str])] = ()
    """Sites as selectors, such as "z[9][3] @ last", in place of components or beside them."""
    components: Annotated[tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str])] = (
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
    together: Annotated[
        tuple[Literal["layer", "position"], ...],
        BeforeValidator(listed, json_schema_input_type=Literal["layer", "position"] | list[Literal["layer", "position"]]),
    ] = ()
    """Dims that are patched all at once instead of one by one."""
    cumulative: bool = False
    """Patch the chosen layers up to each layer together, instead of each layer alone."""
    metric: MetricsField = (MetricOptions(kind="logit_diff"),)
    """What is measured: a metric, or a list of them. The first one also gives `effect`, its normalised form."""
    statistics: StatisticsOptions = StatisticsOptions()
    """How effects over several pairs are judged in the report."""
    threshold: Annotated[float, Field(gt=0)] | None = None
    """Count in the report the sites whose mean effect is at least this far from 0. This is no test."""
    split: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Select sites on this fraction of the pairs and estimate their effects on the others, reported separately."""

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
        self._cumulative_fits()
        names = [metric.to_metric().name for metric in self.metric]
        for index, name in enumerate(names):
            if name.split("_")[0] in ("effect", "recovery"):
                raise problem_at(("metric", index, "name"), f"{name!r} is taken: effects and recoveries have such names")
            if name in names[:index]:
                raise problem_at(("metric", index), f"two metrics are called {name!r}; give one a name of its own")
        self._answers_suffice()
        return self

    def _cumulative_fits(self) -> None:
        if not self.cumulative:
            return
        if "layer" in self.together:
            raise problem_at(("cumulative",), "has no effect where all layers are patched together")
        for site in self.selected_sites():
            if not site.spec.layered:
                raise problem_at(("cumulative",), f"{site} has no layers to add up")

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

    def make_pairs(self, tokenizer: Any) -> CheckedPairs:
        """The pairs for a model: as `read_pairs` reads them, or a built-in set made for its tokenizer.

        Items of a set that fail the token checks are in ``dropped``. InputError where too few are left.
        """
        return make_pairs(self.pairs, tokenizer, one_token=not self.continues)

    def read_pairs(self) -> tuple[Pair, ...]:
        """The pairs, read from their file or made from the recipe. InputError names the file and line that is wrong."""
        if isinstance(self.pairs, PairSet):
            raise InputError(f"the set {self.pairs.set!r} is made for a tokenizer: call make_pairs(tokenizer)")
        return given_pairs(self.pairs)

    @property
    def continues(self) -> bool:
        """Whether the pairs' answers are only measured as continuations, so that they may be any number of tokens."""
        own = [METRICS[metric.kind] for metric in self.metric if not metric.tokens]
        asking = [kind for kind in own if kind.tokens]
        return bool(asking) and all(kind.several for kind in asking)

    def metrics(self) -> tuple[Metric, ...]:
        """What is measured; metrics without tokens of their own take each pair's."""
        return tuple(metric.to_metric() for metric in self.metric)

    def selected_sites(self) -> tuple[Site, ...]:
        """Every component at the recipe's layers, units and positions, then the explicit sites."""
        found = []
        for item in map(component, self.components):
            units = {"head": self.heads, "neuron": self.neurons}.get(item.unit or "")
            found.append(Site.of(item.name, self.layers if item.layered else None, units, self.positions))
        return (*found, *map(Site.parse, self.sites))


def _patchable(name: str) -> None:
    if name == "logits":
        raise InputError("logits can be measured, not patched; patch resid_post of the last layer")
