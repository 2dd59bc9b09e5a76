"""Lenses: what would the model say if it stopped at each layer?

The residual stream after each layer, at each position, is read as a next-token distribution: by the model's own final
norm and head (logit lens, nostalgebraist 2020), through a trained translator (tuned lens, Belrose et al. 2023), or put
into the token-identity prompt (a patchscope as a lens, Ghandeharioun et al. 2024). At the last layer the first two are
the model's own output.

Limits: early layers do not write in the language of the head, so a lens that reads nothing there has found nothing
out; the tuned lens may read what a layer does not yet use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.datasets.tokens import single_token, token_texts
from nsp.engine.budget import Budget
from nsp.engine.implant import Cells, check_implant, final_residuals, head_logits
from nsp.engine.plan import Plan, model_statement
from nsp.engine.readout import chunk_rows
from nsp.engine.recording import Recording, record
from nsp.engine.schedule import Estimate, Schedule, speed
from nsp.engine.slots import BOUNDARY
from nsp.experiments import runner
from nsp.experiments.job import BranchProgress, Unit, UnitValues, blocks, header_of
from nsp.experiments.labels import index_coord, prompts_dataset, text_array
from nsp.experiments.lens.panels import panels
from nsp.experiments.lens.recipe import LensRecipe
from nsp.experiments.lens.results import headline, summarise
from nsp.experiments.lens.tuned import TunedLens, load_tuned_lens, train_tuned_lens
from nsp.experiments.patchscope.templates import TEMPLATES, target_prompt
from nsp.experiments.prompt_options import encode_prompts
from nsp.experiments.registry import Experiment, register
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.sites import Selection

KIND = "lens"
_UNIT_ROWS = 4096
Table = dict[str, tuple[tuple[str, ...], Any, dict[str, str]]]

_METHODS = {
    "logit": "the model's final norm and head, applied to resid_post",
    "tuned": "a tuned lens, then the model's final norm and head",
    "patchscope": "first token after the identity prompt, with resid_post put at its placeholder",
}


class LensJob:
    """A lens run, prepared."""

    def __init__(self, model: Model, recipe: LensRecipe, lens: TunedLens | None = None) -> None:
        self.model, self.recipe, self._lens_given = model, recipe, lens
        self.prompts = encode_prompts(model, recipe.prompts, recipe.chat)
        geometry = model.geometry
        self.layers = tuple(sorted(Selection.of(recipe.layers).resolve(geometry.n_layers, what="layer (layers)")))
        chosen = Selection.of(recipe.positions)
        self.read = tuple(tuple(sorted(prompt.positions(chosen))) for prompt in self.prompts)
        self.positions = tuple(sorted({position for read in self.read for position in read}))
        self.tokens = tuple(single_token(model.tokenizer, token, what="token to follow") for token in recipe.tokens)
        self.top = min(recipe.top, geometry.vocab_size)
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        if recipe.method == "patchscope":
            check_implant(model.runtime)
            self.identity = target_prompt(model.tokenizer, TEMPLATES[recipe.template])
            if recipe.target_layer is not None:
                Selection.of(recipe.target_layer).resolve(geometry.n_layers, what="layer (target_layer)")
        if recipe.weights is not None and lens is None:
            self._lens_given = load_tuned_lens(recipe.weights, model)

    # --- description ------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Plan:
        """The plan; its statement is what the recipe comes to."""
        recipe = self.recipe
        model = model_statement(self.model.provenance)
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
            text = Path(recipe.train.text)
            statement["train"] = recipe.train.model_dump(exclude={"save_to", "text"}) | {
                "text": _digest(text.read_bytes()),
                "seed": recipe.seed,
            }
        elif self._lens_given is not None:
            statement["lens"] = _digest(
                self._lens_given.weight.numpy().tobytes() + self._lens_given.bias.numpy().tobytes()
            )
        return Plan(KIND, model, statement, Schedule((self._estimate(),)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of prompts."""
        count = len(self.prompts)
        each = len(self.layers) * max(1, max(map(len, self.read)))
        block = max(1, min(count, _UNIT_ROWS // each))
        return blocks(count, block, ("effects/lens", "effects/top"))

    def template(self) -> xr.DataTree:
        """All groups and labels, results blank."""
        inputs = prompts_dataset(self.prompts)
        return xr.DataTree.from_dict(
            {"inputs": inputs, "effects/lens": self._blank(self._measures()), "effects/top": self._blank(self._tops())}
        )

    def _estimate(self) -> Estimate:
        geometry, runtime = self.model.geometry, self.model.runtime
        rows = sum(map(len, self.read)) * len(self.layers)
        tokens = sum(map(len, self.prompts))
        flop = rows * 2.0 * geometry.d_model * geometry.vocab_size + tokens * runtime.cost.per_token * geometry.n_layers
        if self.recipe.method == "patchscope":
            flop += rows * 2.0 * runtime.cost.per_token * geometry.n_layers / 2
        kept = tokens * geometry.d_model * (len(self.layers) + 1) * 4
        return Estimate(
            f"{self.recipe.method} lens, {len(self.prompts)} prompts", "plain", "a lens reads ordinary runs", rows, 0, len(self.units),
            tokens, tokens * geometry.n_layers, tokens * geometry.n_layers, flop, flop,
            flop / speed(str(runtime.device), runtime.dtype), kept + chunk_rows(geometry.vocab_size) * geometry.vocab_size * 36,
        )  # fmt: skip

    def _measures(self) -> Table:
        at = ("prompt", "layer", "position")
        method = _METHODS[self.recipe.method]

        def attrs(long_name: str, units: str = "nat") -> dict[str, str]:
            return {"long_name": long_name, "units": units, "method": method}

        found: Table = {
            "entropy": (at, np.float32, attrs("entropy of the lens's distribution")),
            "divergence": (at, np.float32, attrs("KL(model's output || lens)")),
            "output_logprob": (at, np.float32, attrs("log-probability of the token that the model's output favours")),
            "output_rank": (at, np.int32, attrs("rank of the token that the model's output favours, 0 first", "1")),
            "next_logprob": (at, np.float32, attrs("log-probability of the prompt's next token")),
            "next_rank": (at, np.int32, attrs("rank of the prompt's next token, 0 first (-1: none)", "1")),
        }
        if self.tokens:
            followed = (*at, "token")
            found |= {
                "prob": (followed, np.float32, attrs("probability of the token", "1")),
                "logprob": (followed, np.float32, attrs("log-probability of the token")),
                "rank": (followed, np.int32, attrs("rank of the token, 0 first", "1")),
            }
        return found

    def _tops(self) -> Table:
        at, method = ("prompt", "layer", "position", "token"), _METHODS[self.recipe.method]
        return {
            "token_id": (at, np.int32, {"long_name": "most likely tokens", "units": "1", "method": method}),
            "token_text": (at, object, {"long_name": "most likely tokens as text", "units": "1", "method": method}),
            "token_prob": (at, np.float32, {"long_name": "their probability", "units": "1", "method": method}),
        }

    def _coords(self, tops: bool) -> dict[str, xr.Variable]:
        found = {
            "prompt": index_coord("prompt", len(self.prompts), "prompt, from 0"),
            "layer": index_coord("layer", self.layers, "layer whose resid_post is read"),
            "position": index_coord("position", self.positions, "token position"),
        }
        if tops:
            return found | {"token": index_coord("token", self.top, "place among the most likely tokens, 0 the first")}
        if self.tokens:
            found["token"] = index_coord("token", self.tokens, "token id followed")
            texts = text_array(token_texts(self.model.tokenizer, self.tokens))
            found["followed"] = xr.Variable(("token",), texts, {"long_name": "token followed"})
        return found

    def _blank(self, variables: Table) -> xr.Dataset:
        coords = self._coords("token_id" in variables)
        data = {}
        for name, (dims, dtype, attrs) in variables.items():
            shape = tuple(len(coords[dim]) for dim in dims)
            data[name] = (dims, _empty(shape, dtype), attrs)
        return xr.Dataset(data, coords)

    # --- running ----------------------------------------------------------------------------------------------------

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Read a block of prompts."""
        rows = range(len(self.prompts))[unit.regions["effects/lens"]["prompt"]]
        values: dict[str, dict[str, np.ndarray]] = {}
        for group, variables in (("effects/lens", self._measures()), ("effects/top", self._tops())):
            coords = self._coords(group == "effects/top")
            values[group] = {
                name: _empty((len(rows), *(len(coords[dim]) for dim in dims[1:])), dtype)
                for name, (dims, dtype, _) in variables.items()
            }
        done, total = 0, sum(len(self.read[row]) for row in rows) * len(self.layers)
        n_layers = self.model.geometry.n_layers
        slots = {(BOUNDARY, layer + 1) for layer in self.layers} | {(BOUNDARY, n_layers)}
        for number, row in enumerate(rows):
            taken = record(self.model.runtime, [self.prompts[row].token_ids], slots, stay=True)
            block = max(1, chunk_rows(self.model.geometry.vocab_size) // 2)
            for low in range(0, len(self.read[row]), block):
                positions = self.read[row][low : low + block]
                self._read(values, number, row, positions, taken)
                done += len(positions) * len(self.layers)
                if progress is not None:
                    progress(done, total)
        return values

    def _read(
        self, values: dict[str, dict[str, np.ndarray]], number: int, row: int, positions: Sequence[int], taken: Recording
    ) -> None:
        """Read some positions of one prompt at every layer into ``values``."""
        runtime, prompt, count = self.model.runtime, self.prompts[row], len(positions)
        final = taken.values[(BOUNDARY, self.model.geometry.n_layers)][0, list(positions)]
        output = torch.cat([torch.log_softmax(logits.double(), dim=1) for _, logits in head_logits(runtime, final)])
        best = output.argmax(dim=1)
        ids = torch.tensor(prompt.token_ids, device=best.device)
        at = torch.tensor(positions, device=best.device)
        following = torch.where(at + 1 < len(prompt), ids[(at + 1).clamp(max=len(prompt) - 1)], -1)
        columns = np.searchsorted(self.positions, positions)
        hidden = torch.stack([taken.values[(BOUNDARY, layer + 1)][0, list(positions)] for layer in self.layers])
        lens, top = values["effects/lens"], values["effects/top"]
        for cells, logits in self._logits(hidden):
            layer, place = np.divmod(cells, count)
            here = torch.as_tensor(place, device=logits.device)
            log_p = torch.log_softmax(logits.double(), dim=1)
            index = (number, layer, columns[place])
            true = output[here]
            likely = log_p.topk(self.top, dim=1)
            found = [
                torch.special.entr(log_p.exp()).sum(1),
                torch.where(true.exp() > 0, true.exp() * (true - log_p), 0.0).sum(1),
                *_followed(log_p, best[here]),
                *_followed(log_p, following[here]),
                likely.indices,
                likely.values.exp(),
            ]
            for token in self.tokens:
                found += _followed(log_p, torch.full_like(here, token))
            numbers = [_cpu(value) for value in runtime.fetch(found)]
            named = ("entropy", "divergence", "output_logprob", "output_rank", "next_logprob", "next_rank")
            for name, value in zip(named, numbers, strict=False):
                lens[name][index] = value
            top["token_id"][index], top["token_prob"][index] = numbers[len(named) : len(named) + 2]
            texts = token_texts(self.model.tokenizer, numbers[len(named)].flatten().tolist())
            top["token_text"][index] = text_array(texts).reshape(numbers[len(named)].shape)
            rest = numbers[len(named) + 2 :]
            for which, (logprob, rank) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
                place_of = (*index, which)
                lens["logprob"][place_of], lens["prob"][place_of] = logprob, np.exp(logprob)
                lens["rank"][place_of] = rank

    def _logits(self, hidden: torch.Tensor) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Logits of residual vectors with axes (layer, position, width): the numbers of the (layer, position) cells in
        that order, and their logits, a block at a time.
        """
        runtime, width = self.model.runtime, hidden.shape[-1]
        if self.recipe.method == "patchscope":
            count = hidden.shape[1]
            layers = np.repeat(self.layers, count)
            target = layers if self.recipe.target_layer is None else np.full_like(layers, self.recipe.target_layer)
            prompt, position = self.identity
            cells = Cells(
                (prompt,), (position,), hidden.reshape(-1, width), np.zeros_like(layers), target, np.arange(len(layers))
            )
            for chunk, made in final_residuals(runtime, cells, self.budget):
                for rows, logits in head_logits(runtime, made):
                    yield chunk[rows], logits
            return
        if self.recipe.method == "tuned":
            lens = self.lens
            hidden = torch.stack(
                [lens.translated(part, layer + 1) for layer, part in zip(self.layers, hidden, strict=True)]
            )
        for rows, logits in head_logits(runtime, hidden.reshape(-1, width)):
            yield np.arange(rows.start, rows.stop), logits

    @cached_property
    def lens(self) -> TunedLens:
        """The tuned lens: loaded, or trained when it is first needed (and saved where the recipe says)."""
        if self._lens_given is not None:
            return self._lens_given
        options = self.recipe.train
        assert options is not None
        how = options.model_dump(exclude={"text", "save_to"})
        trained = train_tuned_lens(self.model, options.text, **how, seed=self.recipe.seed)
        if options.save_to is not None:
            trained.save(options.save_to)
        return trained


def _followed(log_p: torch.Tensor, wanted: torch.Tensor) -> list[torch.Tensor]:
    """Log-probability and rank of one token a row; NaN and -1 where the token is -1."""
    value = log_p.gather(1, wanted.clamp(min=0)[:, None])
    rank = (log_p > value).sum(1)
    missing = wanted < 0
    return [value[:, 0].masked_fill(missing, float("nan")), rank.masked_fill(missing, -1)]


def _cpu(values: torch.Tensor) -> np.ndarray:
    return np.asarray(values.cpu().numpy())


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if dtype is object:
        return np.full(shape, "", dtype=object)
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -1, dtype=dtype)


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def prepare(model: Model, recipe: LensRecipe) -> LensJob:
    """Check a recipe against a model and describe the run."""
    return LensJob(model, recipe)


def _lens(
    model: Model, prompts: Any, job: Callable[[LensRecipe], LensJob], out: str | Path | None, options: Mapping[str, Any]
) -> xr.DataTree:
    given = [prompts] if isinstance(prompts, str) and not Path(prompts).suffix else prompts
    made = job(checked(LensRecipe, {"kind": KIND, "prompts": given, **options}))
    return runner.results(made, out=out)


def logit_lens(model: Model, prompts: Any, *, out: str | Path | None = None, **options: Any) -> xr.DataTree:
    """The logit lens: the recipe's keys (``layers``, ``positions``, ``tokens``, ``top``) as arguments.

    ``prompts`` is a text, a list of them, or a file. Returns a tree with ``effects/lens``, ``effects/top``, ``inputs``.
    """
    return _lens(model, prompts, lambda recipe: LensJob(model, recipe), out, options)


def tuned_lens(
    model: Model, prompts: Any, lens: TunedLens | str | Path, *, out: str | Path | None = None, **options: Any
) -> xr.DataTree:
    """The tuned lens, from `train_tuned_lens` or a directory; otherwise as `logit_lens`."""
    loaded = lens if isinstance(lens, TunedLens) else load_tuned_lens(lens, model)
    # The recipe names where a lens comes from; one made in Python is known by its weights in the plan.
    where = "in memory" if isinstance(lens, TunedLens) else str(lens)
    return _lens(
        model,
        prompts,
        lambda recipe: LensJob(model, recipe, loaded),
        out,
        {"method": "tuned", "weights": where, **options},
    )


def patchscope_lens(model: Model, prompts: Any, *, out: str | Path | None = None, **options: Any) -> xr.DataTree:
    """A patchscope as a lens: every layer and position put into the token-identity prompt; otherwise as `logit_lens`."""
    return _lens(model, prompts, lambda recipe: LensJob(model, recipe), out, {"method": "patchscope", **options})


register(Experiment(KIND, LensRecipe, prepare, summarise, headline, panels=panels))
