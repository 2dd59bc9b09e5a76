"""The recipe of kind ``path-patching``: which senders reach which receivers directly, between which prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nsp.datasets.pair_sets import CheckedPairs
from nsp.errors import InputError
from nsp.experiments.metric_options import MetricOptions, MetricsField
from nsp.experiments.pair_options import PairSet, PairsField, given_pairs, make_pairs
from nsp.experiments.selections import Positions, listed
from nsp.metrics import METRICS, Metric
from nsp.recipe import Recipe
from nsp.recipe_errors import problem_at
from nsp.sites import COMPONENTS, IN_LAYER, Site

SENDERS = ("embed", *(name for name in IN_LAYER if COMPONENTS[name].sends))
RECEIVERS = (*(name for name in IN_LAYER if COMPONENTS[name].receives), "logits")


Selectors = Annotated[
    tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str]), Field(min_length=1)
]


class PathPatchingRecipe(Recipe):
    """Patch the direct path from each sender to each receiver, all that lies between frozen, and measure."""

    kind: Literal["path-patching"]
    pairs: PairsField
    """Pairs of prompts: a list, a csv, tsv or jsonl file, or the name of a built-in set."""
    mode: Literal["noising", "denoising"] = "noising"
    """noising sends the corrupt run's values along a path of the clean run (what does the path break?), denoising the
    clean run's along a path of the corrupt one (what does it restore?)."""
    senders: Selectors = ("z[*][*]", "mlp_out[*]")
    """Whose output changes, as selectors: embed, z (heads), attn_out, mlp_out."""
    receivers: Selectors = ("logits",)
    """Whose input changes, as selectors: q, k, v (heads; key/value heads for k and v), mlp_out (an MLP, through what it
    reads), logits (the final residual stream)."""
    positions: Positions = "all"
    """Where the path runs, all these positions together: all, last, an index, a list, a slice, or the name of a span."""
    metric: MetricsField = (MetricOptions(kind="logit_diff"),)
    """What is measured: a metric, or a list of them. The first one also gives `effect`, its normalised form."""

    @field_validator("senders")
    @classmethod
    def _know_senders(cls, selectors: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked(text, SENDERS, "send") for text in selectors)

    @field_validator("receivers")
    @classmethod
    def _know_receivers(cls, selectors: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked(text, RECEIVERS, "receive") for text in selectors)

    @model_validator(mode="after")
    def _fits_together(self) -> PathPatchingRecipe:
        names: list[str] = []
        for index, metric in enumerate(self.metrics()):
            if METRICS[metric.kind].several:
                raise problem_at(("metric", index), f"{metric.kind} measures continuations; take logprob of the answer")
            if metric.name in names:
                raise problem_at(("metric", index), f"two metrics are called {metric.name!r}; give one a name of its own")
            names.append(metric.name)
        return self

    def check(self) -> None:
        if not isinstance(self.pairs, PairSet):
            given_pairs(self.pairs)

    def make_pairs(self, tokenizer: Any) -> CheckedPairs:
        """The pairs for a model; items of a built-in set that fail the token checks are in ``dropped``."""
        return make_pairs(self.pairs, tokenizer)

    def metrics(self) -> tuple[Metric, ...]:
        """What is measured; metrics without tokens of their own take each pair's."""
        return tuple(metric.to_metric() for metric in self.metric)


def _checked(text: str, known: tuple[str, ...], verb: str) -> str:
    site = Site.parse(text)
    if site.component not in known:
        raise InputError(f"{site.component} cannot {verb} along a path; {', '.join(known)} can")
    if site.positions is not None:
        raise InputError(f"{text}: positions stand under the key positions, for all paths alike")
    return str(site)
