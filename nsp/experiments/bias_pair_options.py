"""Pairs of sentences for the scans for bias, in recipes: which file or set, and which of its pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from nsp.datasets.bias_pairs import BiasPair, BiasPairs, select_pairs
from nsp.errors import InputError
from nsp.experiments.selections import listed
from nsp.recipe import DataPath, RecipeOptions

Texts = Annotated[tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str])]


class StatedPair(RecipeOptions):
    """A pair that is stated in the recipe itself."""

    python_types: ClassVar[tuple[str, ...]] = ("BiasPair",)

    more: str
    """The text that expresses the stereotype more."""
    less: str
    """The text that does less."""
    bias_type: str = "unnamed"
    """The type of bias, such as gender."""
    pair_id: str = ""
    """Its name in the results."""
    direction: str = ""
    """stereo or antistereo."""
    language: str = ""
    """Its language, such as nl."""
    subset: str = ""
    """A part of the data, such as ambig."""
    origin: str = ""
    """Where it was read, such as pairs.csv:12."""


class BiasPairsOptions(RecipeOptions):
    """Pairs of sentences, and which of them. A bare text is the path, a bare list the pairs."""

    stated: tuple[StatedPair, ...] | None = None
    """The pairs themselves, instead of a path or a source."""
    path: DataPath | None = None
    """A file: CrowS-Pairs csv, BBQ or MBBQ jsonl, or a tsv of <type>_more and <type>_less rows."""
    source: Literal["shipped", "crows-pairs"] = "shipped"
    """Where no path is given: nsp's own small set, or CrowS-Pairs as `nsp data pull crows-pairs` fetched it."""
    format: Literal["auto", "crows", "bbq", "tsv"] = "auto"
    """The file's form; auto goes by its ending and columns."""
    bias_type: Texts = ()
    """Only these types, such as [gender, age]; by default all."""
    language: str | None = None
    """Only this language, such as nl."""
    subset: str | None = None
    """Only this part: stereo or antistereo of CrowS-Pairs, ambig or disambig of BBQ."""
    num_prompts: Annotated[int, Field(strict=True, ge=2)] | None = None
    """At most so many prompts, two per pair, drawn with the recipe's seed; by default all."""

    def read(self) -> BiasPairs:
        """Every pair of the file, and the rows that are none."""
        from nsp.datasets.bias_files import read_bias_pairs, shipped_pairs
        from nsp.experiments.bias_scan.data import pulled_crows

        if self.stated is not None:
            return BiasPairs(tuple(BiasPair(**pair.model_dump()) for pair in self.stated))
        if self.path is not None:
            return read_bias_pairs(self.path, self.format)
        if self.source == "shipped":
            return shipped_pairs()
        return read_bias_pairs(pulled_crows(), "crows")

    def select(self, pairs: BiasPairs, seed: int) -> tuple[BiasPair, ...]:
        """The pairs that the filters keep. InputError where a set of nsp's has fewer than are asked for."""
        kept = select_pairs(
            pairs.pairs,
            bias_type=self.bias_type,
            language=self.language,
            subset=self.subset,
            num_prompts=self.num_prompts,
            seed=seed,
        )
        if self.stated is None and self.path is None and self.num_prompts is not None and self.num_prompts > 2 * len(kept):
            raise InputError(
                f"pairs.num_prompts: the set {self.source!r} has {2 * len(kept)} prompts that pass the filters, not {self.num_prompts}"
            )
        return kept


def _in_full(value: Any) -> Any:
    if isinstance(value, str | Path):
        return {"path": value}
    if isinstance(value, BiasPairs):
        value = value.pairs
    if isinstance(value, Sequence):
        return {"stated": [asdict(pair) if isinstance(pair, BiasPair) else pair for pair in value]}
    return value


PairsOf = Annotated[
    BiasPairsOptions, BeforeValidator(_in_full, json_schema_input_type=str | list[StatedPair] | BiasPairsOptions)
]
