"""Direct logit attribution: what each component, head or neuron adds to a logit on its own way through the final norm.

The final residual stream is a sum of what the embedding, every attention and every MLP wrote. With the norm's scale
held at its value, norm and head are linear, so a logit (or a difference of two) is a sum over the writers: exact for
the scale as it is, silent about what a writer does to the scale, and about what later layers make of what it wrote.
Heads and neurons split their component's share further; what no unit wrote (biases) stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xarray as xr

from nsp.datasets.pair_sets import make_set
from nsp.datasets.prompts import Prompt, encode
from nsp.datasets.tokens import single_token
from nsp.engine.estimates import Estimate, speed
from nsp.errors import InputError
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, given_variable, index_coord, prompts_dataset
from nsp.experiments.logit_attribution.decomposition import UNITS, WRITERS, Answered, Decomposition
from nsp.experiments.logit_attribution.recipe import LogitAttributionRecipe
from nsp.experiments.pair_options import PairSet, plain_prompt
from nsp.sites import Selection

_BLOCK = 16  # prompts of one unit of work
_METHOD = "direct logit attribution, the final norm's scale held at its value"


class LogitAttribution(Experiment[LogitAttributionRecipe]):
    """The logits of some prompts' answers, taken apart."""

    positional = ("prompts", "answer", "distractor")
    results = (
        "``attribution/attn_out`` and ``attribution/mlp_out``: ``contribution``, dims (prompt, layer); ``attribution/z`` and "
        "``attribution/mlp_neurons``, where asked for: ``contribution``, dims (prompt, layer, head) or (prompt, layer, "
        "neuron), and ``bias``, dims (prompt, layer), what no unit wrote; ``baseline``: ``logit``, ``total`` (the sum of all "
        "shares), ``embed`` and ``bias``, dims (prompt,); ``inputs``: texts and tokens. All in logits."
    )

    def prepare(self) -> None:
        self.prompts = self._answered()
        self.split = [unit for unit in UNITS if unit in self.recipe.by]
        for unit in self.split:
            self.model.geometry.where(UNITS[unit][0])

    def _answered(self) -> list[Answered]:
        answered = []
        for prompt, tokens in self._given():
            if not tokens:
                raise InputError(f"the prompt {prompt.title()} has no answer, whose logit could be taken apart")
            if len(tokens) > 1 and tokens[0] == tokens[1]:
                raise InputError(
                    f"the prompt {prompt.title()}: answer and distractor are the same token, so their difference is always 0"
                )
            (position, *_) = prompt.positions(Selection.of(self.recipe.position))
            answered.append(Answered(prompt, position, tokens))
        return answered

    def _given(self) -> Iterable[tuple[Prompt, tuple[int, ...]]]:
        """The prompts of the recipe, each with its answer, and distractor where there is one."""
        tokenizer, given = self.model.tokenizer, self.recipe.prompts
        if isinstance(given, PairSet):
            for pair in make_set(given.set, tokenizer, size=given.size, seed=given.seed).pairs:
                encoded = pair.encode(tokenizer)
                tokens = (encoded.answer, encoded.distractor)
                yield encoded.clean, tuple(token for token in tokens if token is not None)
            return
        for item in given:
            named = {"answer": item.answer, "distractor": item.distractor}
            ids = [single_token(tokenizer, text, what=what) for what, text in named.items() if text is not None]
            yield encode(tokenizer, plain_prompt(item.prompt)), tuple(ids)

    def statement(self) -> dict[str, Any]:
        items = [
            {"token_ids": list(item.prompt.token_ids), "position": item.position, "tokens": list(item.tokens)}
            for item in self.prompts
        ]
        return {"items": items, "by": sorted(self.recipe.by)}

    def estimates(self) -> Iterable[Estimate]:
        geometry, runtime = self.model.geometry, self.model.runtime
        lengths = [len(item.prompt) for item in self.prompts]
        tokens, count = sum(lengths), len(lengths)
        flop = tokens * runtime.cost.per_token * geometry.n_layers
        kept = _BLOCK * max(lengths) * geometry.n_layers * (3 * geometry.d_model + geometry.d_mlp) * 4
        yield Estimate(
            f"logit attribution, {count} prompts", "plain", "it reads ordinary runs", count, 0, len(self.units),
            tokens, tokens * geometry.n_layers, tokens * geometry.n_layers, flop, flop, flop / speed(str(runtime.device), runtime.dtype), kept,
        )  # fmt: skip

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        geometry = self.model.geometry
        prompt = {"prompt": index_coord("prompt", len(self.prompts), "prompt, from 0")}

        def share(meaning: str, *dims: str) -> Variable:
            return Variable(("prompt", *dims), meaning, "logit", _METHOD)

        baseline = {
            "logit": share("what is taken apart: the answer's logit less the distractor's, before any softcap"),
            "total": share("sum of all components' shares"),
            "embed": share("share of the embedding"),
            "bias": share("share of the biases of final norm and head"),
        }
        groups: dict[str, Group | xr.Dataset] = {"inputs": self._inputs(), "baseline": Group(baseline, prompt)}
        for writer in WRITERS:
            coords = prompt | {"layer": index_coord("layer", geometry.layers_of(writer), "layer")}
            groups[f"attribution/{writer}"] = Group({"contribution": share(f"share of {writer}", "layer")}, coords)
        for unit in self.split:
            component, whole = UNITS[unit]
            coords = prompt | {
                "layer": index_coord("layer", geometry.layers_of(component), "layer"),
                unit: index_coord(unit, geometry.unit_count(component), unit),
            }
            shares = {
                "contribution": share(f"share of each {unit}", "layer", unit),
                "bias": share(f"share of {whole} that no {unit} wrote", "layer"),
            }
            groups[f"attribution/{component}"] = Group(shares, coords)
        return groups

    def _inputs(self) -> xr.Dataset:
        columns = {
            "answer_id": ([item.tokens[0] for item in self.prompts], "token id of the answer"),
            "distractor_id": ([(*item.tokens, -1)[1] for item in self.prompts], "token id of the distractor (-1: none)"),
            "read_position": ([item.position for item in self.prompts], "position whose prediction is taken apart"),
        }
        given = {name: given_variable(("prompt",), *column, method="given") for name, column in columns.items()}
        return prompts_dataset([item.prompt for item in self.prompts]).assign(given)

    def stages(self) -> Sequence[Stage]:
        groups = tuple(path for path in self.blanks if path != "inputs")
        return (Stage(self._take_apart, groups, {"prompt": _BLOCK}),)

    def _take_apart(self, region: Region, stored: Stored) -> Values:
        """Take a block of prompts apart."""
        rows = region.indices("prompt")
        decomposed = []
        for number, row in enumerate(rows):
            decomposed.append(Decomposition(self.model, self.engine, self.prompts[row], self.split).groups())
            if region.progress is not None:
                region.progress(number + 1, len(rows))
        return {
            path: {name: [groups[path][name] for groups in decomposed] for name in variables}
            for path, variables in decomposed[0].items()
        }
