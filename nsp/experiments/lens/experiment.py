"""Lenses: what would the model say if it stopped at each layer?

The residual stream after each layer, at each position, is read as a next-token distribution: by the model's own final
norm and head (logit lens, nostalgebraist 2020), through a trained translator (tuned lens, Belrose et al. 2023), or put
into the token-identity prompt (a patchscope as a lens, Ghandeharioun et al. 2024). At the last layer the first two are
the model's own output.

Limits: early layers do not write in the language of the head, so a lens that reads nothing there has found nothing
out; the tuned lens may read what a layer does not yet use.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr

from nsp.datasets.tokens import single_token, token_texts
from nsp.engine.estimates import Estimate, speed
from nsp.engine.readout import chunk_rows
from nsp.engine.recording import Recording
from nsp.engine.vector_patching import VectorPatches, check_patched_generation, final_residuals, head_logits
from nsp.experiments.arguments import recipe_value
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, index_coord, prompts_dataset, text_array, text_coord
from nsp.experiments.lens.recipe import LensRecipe
from nsp.experiments.lens.tuned import TunedLens, load_tuned_lens, train_tuned_lens
from nsp.experiments.patchscope.templates import TEMPLATES, target_prompt
from nsp.experiments.prompt_options import encode_prompts
from nsp.sites import Selection

_UNIT_ROWS = 4096
_CELL = ("prompt", "layer", "position")
_METHODS = {
    "logit": "the model's final norm and head, applied to resid_post",
    "tuned": "a tuned lens, then the model's final norm and head",
    "patchscope": "first token after the identity prompt, with resid_post put at its placeholder",
}
_MEASURES = ("entropy", "divergence", "output_logprob", "output_rank", "next_logprob", "next_rank")
_NO_WEIGHTS = {"weights": None, "train": None}
_NO_PROMPT = {"target_layer": None, "template": "few_shot"}

Arrays = dict[str, dict[str, np.ndarray]]


class Lens(Experiment[LensRecipe]):
    """Prompts read at every layer and position, by one kind of lens."""

    door = "logit_lens"
    doors: ClassVar = {
        "logit_lens": {"method": "logit", **_NO_WEIGHTS, **_NO_PROMPT},
        "tuned_lens": {"method": "tuned", **_NO_PROMPT},
        "patchscope_lens": {"method": "patchscope", **_NO_WEIGHTS},
    }
    positional = ("prompts", "weights")
    results = (
        "``effects/lens``: ``entropy``, ``divergence`` (from the model's output), ``output_logprob`` and ``output_rank`` (of "
        "the token that the output favours), ``next_logprob`` and ``next_rank`` (of the prompt's next token), dims (prompt, "
        "layer, position), and ``prob``, ``logprob`` and ``rank`` of the tokens followed, dims (prompt, layer, position, "
        "token); ``effects/top``: ``token_id``, ``token_text`` and ``token_prob`` of the most likely tokens, dims (prompt, "
        "layer, position, token); ``inputs``: texts and tokens."
    )

    def prepare(self) -> None:
        model, recipe = self.model, self.recipe
        self.prompts = encode_prompts(model, recipe.prompts, recipe.chat)
        geometry = model.geometry
        self.layers = tuple(sorted(Selection.of(recipe.layers).resolve(geometry.n_layers, what="layer (layers)")))
        chosen = Selection.of(recipe.positions)
        self.read = tuple(tuple(sorted(prompt.positions(chosen))) for prompt in self.prompts)
        self.positions = tuple(sorted({position for read in self.read for position in read}))
        self.tokens = tuple(single_token(model.tokenizer, token, what="token to follow") for token in recipe.tokens)
        self.top = min(recipe.top, geometry.vocab_size)
        if recipe.method == "patchscope":
            check_patched_generation(model.runtime)
            self.identity = target_prompt(model.tokenizer, TEMPLATES[recipe.template])
            if recipe.target_layer is not None:
                Selection.of(recipe.target_layer).resolve(geometry.n_layers, what="layer (target_layer)")
        if recipe.weights is not None:
            passed = self.given.get("weights")
            self.lens = passed if isinstance(passed, TunedLens) else load_tuned_lens(recipe.weights, model)

    @cached_property
    def lens(self) -> TunedLens:
        """The tuned lens: given, or trained when it is first needed (and saved where the recipe says)."""
        options = self.recipe.train
        assert options is not None
        how = options.model_dump(exclude={"text", "save_to"})
        lens = train_tuned_lens(self.model, options.text, **how, seed=self.recipe.seed)
        if options.save_to is not None:
            lens.save(options.save_to)
        return lens

    # --- description ------------------------------------------------------------------------------------------------

    def statement(self) -> dict[str, Any]:
        recipe = self.recipe
        statement: dict[str, Any] = {
            "method": recipe.method,
            "prompts": [list(prompt.token_ids) for prompt in self.prompts],
            "layers": list(self.layers),
            "positions": [list(read) for read in self.read],
            "tokens": list(self.tokens),
            "top": self.top,
            "target_layer": recipe.target_layer,
            "identity": list(self.identity[0].token_ids) if recipe.method == "patchscope" else None,
        }
        if recipe.train is not None:
            text = _digest(Path(recipe.train.text).read_bytes())
            how = recipe.train.model_dump(exclude={"save_to", "text"})
            statement["train"] = how | {"text": text, "seed": recipe.seed}
        elif recipe.weights is not None:
            statement["lens"] = _digest(self.lens.weight.numpy().tobytes() + self.lens.bias.numpy().tobytes())
        return statement

    def estimates(self) -> Iterable[Estimate]:
        geometry, runtime = self.model.geometry, self.model.runtime
        rows = sum(map(len, self.read)) * len(self.layers)
        tokens = sum(map(len, self.prompts))
        flop = rows * 2.0 * geometry.d_model * geometry.vocab_size + tokens * runtime.cost.per_token * geometry.n_layers
        if self.recipe.method == "patchscope":
            flop += rows * 2.0 * runtime.cost.per_token * geometry.n_layers / 2
        kept = tokens * geometry.d_model * (len(self.layers) + 1) * 4
        yield Estimate(
            f"{self.recipe.method} lens, {len(self.prompts)} prompts", "plain", "a lens reads ordinary runs", rows, 0, len(self.units),
            tokens, tokens * geometry.n_layers, tokens * geometry.n_layers, flop, flop,
            flop / speed(str(runtime.device), runtime.dtype), kept + chunk_rows(geometry.vocab_size) * geometry.vocab_size * 36,
        )  # fmt: skip

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        method = _METHODS[self.recipe.method]
        coords = {
            "prompt": index_coord("prompt", len(self.prompts), "prompt, from 0"),
            "layer": index_coord("layer", self.layers, "layer whose resid_post is read"),
            "position": index_coord("position", self.positions, "token position"),
        }

        def log(long_name: str, dims: tuple[str, ...] = _CELL) -> Variable:
            return Variable(dims, long_name, "nat", method)

        def rank(long_name: str, dims: tuple[str, ...] = _CELL) -> Variable:
            return Variable(dims, long_name, "1", method, np.int32)

        cells = {
            "entropy": log("entropy of the lens's distribution"),
            "divergence": log("KL(model's output || lens)"),
            "output_logprob": log("log-probability of the token that the model's output favours"),
            "output_rank": rank("rank of the token that the model's output favours, 0 first"),
            "next_logprob": log("log-probability of the prompt's next token"),
            "next_rank": rank("rank of the prompt's next token, 0 first (-1: none)"),
        }
        tokens = (*_CELL, "token")
        followed = {}
        if self.tokens:
            cells |= {
                "prob": Variable(tokens, "probability of the token", "1", method),
                "logprob": log("log-probability of the token", tokens),
                "rank": rank("rank of the token, 0 first", tokens),
            }
            followed = {
                "token": index_coord("token", self.tokens, "token id followed"),
                "followed": text_coord("token", token_texts(self.model.tokenizer, self.tokens), "token followed"),
            }
        likely = {
            "token_id": Variable(tokens, "most likely tokens", "1", method, np.int32),
            "token_text": Variable(tokens, "most likely tokens as text", "1", method, object),
            "token_prob": Variable(tokens, "their probability", "1", method),
        }
        places = index_coord("token", self.top, "place among the most likely tokens, 0 the first")
        return {
            "inputs": prompts_dataset(self.prompts),
            "effects/lens": Group(cells, coords | followed),
            "effects/top": Group(likely, coords | {"token": places}),
        }

    # --- running ----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        each = len(self.layers) * max(1, max(map(len, self.read)))
        block = max(1, min(len(self.prompts), _UNIT_ROWS // each))
        return (Stage(self._read_block, ("effects/lens", "effects/top"), {"prompt": block}),)

    def _read_block(self, region: Region, stored: Stored) -> Values:
        """Read a block of prompts."""
        values = {path: self.unfilled(path, region) for path in ("effects/lens", "effects/top")}
        rows = region.indices("prompt")
        done, total = 0, sum(len(self.read[row]) for row in rows) * len(self.layers)
        sites = [f"resid_post[{layer}]" for layer in {*self.layers, self.model.geometry.n_layers - 1}]
        block = max(1, chunk_rows(self.model.geometry.vocab_size) // 2)
        for number, row in enumerate(rows):
            recording = self.engine.record([self.prompts[row].token_ids], sites, stay=True)
            for low in range(0, len(self.read[row]), block):
                positions = self.read[row][low : low + block]
                self._read(values, number, row, positions, recording)
                done += len(positions) * len(self.layers)
                if region.progress is not None:
                    region.progress(done, total)
        return values

    def _read(self, values: Arrays, number: int, row: int, positions: Sequence[int], recording: Recording) -> None:
        """Read some positions of one prompt at every layer into ``values``, at the prompt's ``number``."""
        runtime, prompt = self.model.runtime, self.prompts[row]
        hidden = torch.stack([recording.at("resid_post", layer)[0, list(positions)] for layer in self.layers])
        final = recording.at("resid_post", self.model.geometry.n_layers - 1)[0, list(positions)]
        output = torch.cat([torch.log_softmax(logits.double(), dim=1) for _, logits in head_logits(runtime, final)])
        favoured = output.argmax(dim=1)
        ids = torch.tensor(prompt.token_ids, device=output.device)
        after = torch.tensor(positions, device=output.device) + 1
        following = torch.where(after < len(prompt), ids[after.clamp(max=len(prompt) - 1)], -1)
        columns = np.searchsorted(self.positions, positions)
        lens, top = values["effects/lens"], values["effects/top"]
        for cells, logits in self._logits(hidden):
            layer, place = np.divmod(cells, len(positions))
            here = torch.as_tensor(place, device=logits.device)
            index = (number, layer, columns[place])
            log_p, true = torch.log_softmax(logits.double(), dim=1), output[here]
            likely = log_p.topk(self.top, dim=1)
            measured = [
                torch.special.entr(log_p.exp()).sum(1),
                torch.where(true.exp() == 0, 0.0, true.exp() * (true - log_p)).sum(1),
                *_followed(log_p, favoured[here]),
                *_followed(log_p, following[here]),
                likely.indices,
                likely.values.exp(),
            ]
            for token in self.tokens:
                measured += _followed(log_p, torch.full_like(here, token))
            arrays = [value.cpu().numpy() for value in runtime.fetch(measured)]
            for name, array in zip(_MEASURES, arrays, strict=False):
                lens[name][index] = array
            if len(bad := np.flatnonzero(arrays[_MEASURES.index("output_rank")] < 0)):
                where = ", ".join(f"layer {self.layers[layer[at]]} position {positions[place[at]]}" for at in bad[:3])
                more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
                warnings.warn(f"lens, prompt {number}: NaN logits at {where}{more}", RuntimeWarning, stacklevel=2)
            likeliest, probabilities, *followed = arrays[len(_MEASURES) :]
            texts = text_array(token_texts(self.model.tokenizer, likeliest.flatten().tolist()))
            top["token_id"][index], top["token_prob"][index] = likeliest, probabilities
            top["token_text"][index] = texts.reshape(likeliest.shape)
            for which, (logprob, rank) in enumerate(zip(followed[::2], followed[1::2], strict=True)):
                at = (*index, which)
                lens["logprob"][at], lens["prob"][at], lens["rank"][at] = logprob, np.exp(logprob), rank

    def _logits(self, hidden: torch.Tensor) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Logits of residual vectors with axes (layer, position, width): the numbers of the (layer, position) cells in
        that order, and their logits, a block at a time.
        """
        runtime, width = self.model.runtime, hidden.shape[-1]
        if self.recipe.method == "patchscope":
            layers = np.repeat(self.layers, hidden.shape[1])
            target = layers if self.recipe.target_layer is None else np.full_like(layers, self.recipe.target_layer)
            prompt, position = self.identity
            vectors, numbers = hidden.reshape(-1, width), np.arange(len(layers))
            patches = VectorPatches((prompt,), (position,), vectors, np.zeros_like(layers), target, numbers)
            for chunk, residuals in final_residuals(runtime, patches.branches(runtime), self.budget):
                for rows, logits in head_logits(runtime, residuals):
                    yield chunk[rows], logits
            return
        if self.recipe.method == "tuned":
            parts = zip(self.layers, hidden, strict=True)
            hidden = torch.stack([self.lens.translated(part, layer + 1) for layer, part in parts])
        for rows, logits in head_logits(runtime, hidden.reshape(-1, width)):
            yield np.arange(rows.start, rows.stop), logits


@recipe_value.register(TunedLens)
def _given_lens(lens: TunedLens) -> str:
    """The recipe names where a lens comes from; one made in Python is known by its weights in the plan."""
    return "in memory"


def _followed(log_p: torch.Tensor, wanted: torch.Tensor) -> list[torch.Tensor]:
    """Log-probability and rank of one token in each row; NaN and -1 where the token is -1 or the logits are NaN."""
    value = log_p.gather(1, wanted.clamp(min=0)[:, None])
    rank = torch.where((value == value)[:, 0], (log_p > value).sum(1), -1)  # NaN equals nothing
    missing = wanted < 0
    return [value[:, 0].masked_fill(missing, float("nan")), rank.masked_fill(missing, -1)]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
