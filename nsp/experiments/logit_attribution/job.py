"""Direct logit attribution: what each component, head or neuron adds to a logit on its own way through the final norm.

The final residual stream is a sum of what the embedding, every attention and every MLP wrote. With the norm's scale
held at its value, norm and head are linear, so a logit (or a difference of two) is a sum over the writers: exact for
the scale as it is, silent about what a writer does to the scale, and about what later layers make of what it wrote.
Heads and neurons split their component's share further; what no unit wrote (biases) stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.datasets.prompts import Prompt, encode
from nsp.datasets.tokens import single_token
from nsp.engine.implant import head_logits
from nsp.engine.plan import Plan, model_statement
from nsp.engine.recording import record
from nsp.engine.schedule import Estimate, Schedule, speed
from nsp.engine.slots import BOUNDARY, Slot
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.job import BranchProgress, Unit, UnitValues, blocks, header_of
from nsp.experiments.labels import index_coord, prompts_dataset
from nsp.experiments.lens.norm import TOLERANCE, frozen_norm
from nsp.experiments.logit_attribution.panels import panels
from nsp.experiments.logit_attribution.recipe import LogitAttributionRecipe
from nsp.experiments.logit_attribution.summary import headline, summarise
from nsp.experiments.pair_options import PairSet, plain_prompt
from nsp.experiments.registry import Experiment, register
from nsp.experiments.selections import as_list
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.sites import Selection

KIND = "logit-attribution"
_BLOCK = 16  # prompts of one unit of work
_UNITS = {"head": ("z", "attn_out"), "neuron": ("mlp_neurons", "mlp_out")}


@dataclass(frozen=True)
class Item:
    """A prompt, the position taken apart, and the tokens: answer, and distractor if there is one."""

    prompt: Prompt
    position: int
    tokens: tuple[int, ...]


class LogitAttributionJob:
    """A run of direct logit attribution, prepared."""

    def __init__(self, model: Model, recipe: LogitAttributionRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.items = _items(model, recipe)
        geometry = model.geometry
        for unit in recipe.by:
            if unit in _UNITS:
                geometry.require(_UNITS[unit][0], geometry.layers_of(_UNITS[unit][0])) if _UNITS[unit][0] in geometry.components() \
                    else geometry.where(_UNITS[unit][0])  # fmt: skip

    # --- description ------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Plan:
        """The plan; its statement is what the recipe comes to."""
        model = model_statement(self.model.provenance)
        items = [
            {"token_ids": list(item.prompt.token_ids), "position": item.position, "tokens": list(item.tokens)}
            for item in self.items
        ]
        return Plan(KIND, model, {"items": items, "by": sorted(self.recipe.by)}, Schedule((self._estimate(),)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of prompts."""
        return blocks(len(self.items), _BLOCK, (group for group in self._groups() if group != "inputs"))

    def template(self) -> xr.DataTree:
        """All groups and labels, results blank."""
        return xr.DataTree.from_dict(self._groups())

    def _estimate(self) -> Estimate:
        geometry, runtime = self.model.geometry, self.model.runtime
        tokens = sum(len(item.prompt) for item in self.items)
        flop = tokens * runtime.cost.per_token * geometry.n_layers
        kept = (
            _BLOCK
            * max(len(item.prompt) for item in self.items)
            * geometry.n_layers
            * (3 * geometry.d_model + geometry.d_mlp)
            * 4
        )
        return Estimate(
            f"logit attribution, {len(self.items)} prompts", "plain", "it reads ordinary runs", len(self.items), 0, len(self.units),
            tokens, tokens * geometry.n_layers, tokens * geometry.n_layers, flop, flop, flop / speed(str(runtime.device), runtime.dtype), kept,
        )  # fmt: skip

    def _groups(self) -> dict[str, xr.Dataset]:
        geometry = self.model.geometry
        prompt = {"prompt": index_coord("prompt", len(self.items), "prompt, from 0")}
        method = "direct logit attribution, the final norm's scale held at its value"

        def blank(dims: dict[str, int], name: str, meaning: str, more: Mapping[str, xr.Variable]) -> dict[str, Any]:
            values = np.full((len(self.items), *dims.values()), np.nan, np.float32)
            return {name: (("prompt", *dims), values, {"long_name": meaning, "units": "logit", "method": method})}

        groups = {"inputs": self._inputs()}
        baseline: dict[str, Any] = {}
        for name, meaning in (
            ("logit", "what is taken apart: the answer's logit less the distractor's, before any softcap"),
            ("total", "sum of all components' shares"),
            ("embed", "share of the embedding"),
            ("bias", "share of the biases of final norm and head"),
        ):
            baseline |= blank({}, name, meaning, {})
        groups["baseline"] = xr.Dataset(baseline, prompt)
        for component in ("attn_out", "mlp_out"):
            layers = geometry.layers_of(component)
            coords = prompt | {"layer": index_coord("layer", layers, "layer")}
            groups[f"attribution/{component}"] = xr.Dataset(
                blank({"layer": len(layers)}, "contribution", f"share of {component}", coords), coords
            )
        for unit, (component, whole) in _UNITS.items():
            if unit in self.recipe.by:
                layers, count = geometry.layers_of(component), geometry.unit_count(component)
                coords = prompt | {
                    "layer": index_coord("layer", layers, "layer"),
                    unit: index_coord(unit, count, unit),
                }
                data = blank({"layer": len(layers), unit: count}, "contribution", f"share of each {unit}", coords)
                data |= blank({"layer": len(layers)}, "bias", f"share of {whole} that no {unit} wrote", coords)
                groups[f"attribution/{component}"] = xr.Dataset(data, coords)
        return groups

    def _inputs(self) -> xr.Dataset:
        found = prompts_dataset([item.prompt for item in self.items])
        given = {"units": "1", "method": "given"}
        answer = [item.tokens[0] for item in self.items]
        distractor = [item.tokens[1] if len(item.tokens) > 1 else -1 for item in self.items]
        for name, values, meaning in (
            ("answer_id", answer, "token id of the answer"),
            ("distractor_id", distractor, "token id of the distractor (-1: none)"),
            ("read_position", [item.position for item in self.items], "position whose prediction is taken apart"),
        ):
            found[name] = (("prompt",), np.asarray(values, dtype=np.int64), {"long_name": meaning, **given})
        return found

    # --- running ----------------------------------------------------------------------------------------------------

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Take a block of prompts apart."""
        rows = range(len(self.items))[unit.regions["baseline"]["prompt"]]
        groups = self._groups()
        values = {
            group: {
                str(name): np.full((len(rows), *variable.shape[1:]), np.nan, np.float32)
                for name, variable in groups[group].data_vars.items()
            }
            for group in unit.regions
        }
        for number, row in enumerate(rows):
            for group, found in self._attribute(self.items[row]).items():
                for name, share in found.items():
                    values[group][name][number] = share
            if progress is not None:
                progress(number + 1, len(rows))
        return values

    def _attribute(self, item: Item) -> dict[str, dict[str, Any]]:
        geometry, runtime = self.model.geometry, self.model.runtime
        n_layers = geometry.n_layers
        pairs = [(unit, *_UNITS[unit]) for unit in _UNITS if unit in self.recipe.by]
        slots: set[Slot] = {(BOUNDARY, 0), (BOUNDARY, n_layers)}
        for component in ("attn_out", "mlp_out", *(component for _, component, _ in pairs)):
            slots |= {(component, layer) for layer in geometry.layers_of(component)}
        taken = record(runtime, [item.prompt.token_ids], slots)

        def at(component: str, layer: int) -> torch.Tensor:
            return taken.values[(component, layer)][0, item.position].double()

        final = taken.values[(BOUNDARY, n_layers)][0, item.position]
        norm = frozen_norm(runtime.module_here(geometry.table.final_norm), final)
        weights, offset = self._unembedding(item.tokens, final.device)
        direction = norm.direction(weights)
        shares = {
            component: np.array([float(at(component, layer) @ direction) for layer in geometry.layers_of(component)])
            for component in ("attn_out", "mlp_out")
        }
        embed, bias = float(at(BOUNDARY, 0) @ direction), float(norm.bias @ weights) + offset
        total = embed + bias + sum(float(part.sum()) for part in shares.values())
        logit = self._logit(item, final)
        scale = max(1.0, float(np.abs(np.concatenate([*shares.values(), [embed]])).sum()))
        if abs(total - logit) > 10 * TOLERANCE.get(runtime.dtype, 1e-4) * scale:
            raise InputError(
                f"the components of {self.model.name} sum to {total:.4f}, and the logit is {logit:.4f}: its residual stream is no plain "
                "sum of embedding, attention and MLP outputs, so it cannot be taken apart"
            )
        found: dict[str, dict[str, Any]] = {"baseline": {"logit": logit, "total": total, "embed": embed, "bias": bias}}
        found |= {f"attribution/{component}": {"contribution": share} for component, share in shares.items()}
        for unit, component, whole in pairs:
            layers, wholes = (
                geometry.layers_of(component),
                dict(zip(geometry.layers_of(whole), shares[whole], strict=True)),
            )
            parts = np.stack([self._units(component, layer, at(component, layer), direction) for layer in layers])
            rest = np.array([wholes[layer] for layer in layers]) - parts.sum(axis=1)
            self._check_units(unit, component, layers, rest, direction, scale)
            found[f"attribution/{component}"] = {"contribution": parts, "bias": rest}
        return found

    def _units(self, component: str, layer: int, value: torch.Tensor, direction: torch.Tensor) -> np.ndarray:
        """The share of each head or neuron of one layer: its value through its rows of the output projection."""
        geometry = self.model.geometry
        weight, _ = self._projection(component, layer)
        written = value * (weight.to(value) @ direction) * geometry.residual_multiplier
        units = geometry.units(component)
        return np.asarray(written.reshape(units.rows, units.width).sum(dim=1).cpu().numpy())[list(units.index)]

    def _projection(self, component: str, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight (in, out) and bias of the module that a component is the input of."""
        table, where = self.model.geometry.table, self.model.geometry.where(component)
        module: Any = self.model.runtime.module_here(f"{table.layers}.{layer}.{where.module}")
        weight = getattr(module, "weight", None)
        if (
            where.side != "input"
            or not isinstance(weight, torch.Tensor)
            or weight.dim() != 2
            or not weight.is_floating_point()
        ):
            raise InputError(
                f"{component} of layer {layer} is not the input of a plain linear layer, so its units cannot be told apart"
            )
        given = weight.detach() if hasattr(module, "nf") else weight.detach().T
        return given, getattr(module, "bias", None)

    def _check_units(
        self,
        unit: str,
        component: str,
        layers: tuple[int, ...],
        rest: np.ndarray,
        direction: torch.Tensor,
        scale: float,
    ) -> None:
        """What the units leave must be the projection's bias; otherwise something (a norm) lies between them and the
        residual stream.
        """
        for layer, left in zip(layers, rest, strict=True):
            _, bias = self._projection(component, layer)
            expected = (
                0.0
                if bias is None
                else float(bias.detach().to(direction) @ direction) * self.model.geometry.residual_multiplier
            )
            if abs(left - expected) > 10 * TOLERANCE.get(self.model.runtime.dtype, 1e-4) * scale:
                raise InputError(
                    f"layer {layer}: the {unit}s' shares leave {left:.4f}, where the bias explains {expected:.4f}: {self.model.name} "
                    f"does more than project {component} into the residual stream; leave {unit} out of `by`"
                )

    def _unembedding(self, tokens: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, float]:
        """The direction of the answer's logit (less the distractor's) after the norm, and the head's bias for it."""
        geometry = self.model.geometry
        head: Any = self.model.runtime.module_here(geometry.table.head)
        rows = head.weight.detach()[list(tokens)].double().to(device) * geometry.logit_scale
        bias = getattr(head, "bias", None)
        offsets = (
            torch.zeros(len(tokens)) if bias is None else bias.detach()[list(tokens)].double() * geometry.logit_scale
        )
        signs = torch.tensor((1.0, -1.0)[: len(tokens)], dtype=torch.float64)
        return signs.to(device) @ rows, float(signs @ offsets.double().cpu())

    def _logit(self, item: Item, final: torch.Tensor) -> float:
        """What the model itself makes of it, with any softcap undone."""
        cap = self.model.geometry.softcap
        values = []
        for _, logits in head_logits(self.model.runtime, final[None]):
            for token in item.tokens:
                value = float(logits[0, token])
                values.append(value if cap is None else cap * float(np.arctanh(value / cap)))
        return values[0] - (values[1] if len(values) > 1 else 0.0)


def _items(model: Model, recipe: LogitAttributionRecipe) -> tuple[Item, ...]:
    if isinstance(recipe.prompts, PairSet):
        from nsp.datasets.sets import make_set

        made = make_set(recipe.prompts.set, model.tokenizer, size=recipe.prompts.size, seed=recipe.prompts.seed)
        encoded = [pair.encode(model.tokenizer) for pair in made.pairs]
        given = [
            (one.clean, tuple(token for token in (one.answer, one.distractor) if token is not None)) for one in encoded
        ]
    else:
        given = []
        for one in recipe.prompts:
            named = [(one.answer, "answer"), (one.distractor, "distractor")]
            ids = tuple(single_token(model.tokenizer, text, what=what) for text, what in named if text is not None)
            given.append((encode(model.tokenizer, plain_prompt(one.prompt)), ids))
    found = []
    for prompt, tokens in given:
        if not tokens:
            raise InputError(f"the prompt {prompt.title()} has no answer, whose logit could be taken apart")
        if len(tokens) > 1 and tokens[0] == tokens[1]:
            raise InputError(
                f"the prompt {prompt.title()}: answer and distractor are the same token, so their difference is always 0"
            )
        position = len(prompt) - 1 if recipe.position == "last" else prompt.positions(Selection.of(recipe.position))[0]
        found.append(Item(prompt, position, tokens))
    return tuple(found)


def prepare(model: Model, recipe: LogitAttributionRecipe) -> LogitAttributionJob:
    """Check a recipe against a model and describe the run."""
    return LogitAttributionJob(model, recipe)


def logit_attribution(
    model: Model,
    prompt: Any,
    answer: str | int,
    distractor: str | int | None = None,
    *,
    by: Any = ("component", "head"),
    position: Any = "last",
    out: str | Path | None = None,
) -> xr.DataTree:
    """Direct logit attribution of one prompt (or a list of them, all with the same answer and distractor).

    Returns a tree with ``attribution/attn_out``, ``attribution/mlp_out`` and, where asked for, ``attribution/z`` and
    ``attribution/mlp_neurons``; ``baseline`` holds the logit, the sum, and the shares of embedding and biases.
    """
    prompts = as_list(prompt)
    items = [{"prompt": one, "answer": answer, "distractor": distractor} for one in prompts]
    recipe = checked(LogitAttributionRecipe, {"kind": KIND, "prompts": items, "by": by, "position": position})
    job = prepare(model, recipe)
    return runner.results(job, out=out)


register(Experiment(KIND, LogitAttributionRecipe, prepare, summarise, headline, panels=panels))
