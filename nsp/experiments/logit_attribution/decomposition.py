"""One logit as a sum over everything that wrote into the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.engine import Engine
from nsp.engine.recording import Recording
from nsp.engine.vector_patching import head_logits
from nsp.errors import InputError
from nsp.experiments.logit_attribution.frozen_norm import TOLERANCE, frozen_norm
from nsp.model import Model
from nsp.sites import COMPONENTS, IN_LAYER

WRITERS = tuple(name for name in IN_LAYER if COMPONENTS[name].adds)
UNITS = {"head": ("z", "attn_out"), "neuron": ("mlp_neurons", "mlp_out")}
"""What splits a component's share further: unit -> (its component, the component that it is a part of)."""


@dataclass(frozen=True)
class Answered:
    """A prompt, the position whose prediction is taken apart, and the tokens: answer, and distractor if there is one."""

    prompt: Prompt
    position: int
    tokens: tuple[int, ...]


class Decomposition:
    """The shares of one logit (or difference of two), by ordinary run of its prompt.

    Raises InputError where the shares do not sum to the logit, since something else than embedding, attention and MLPs
    writes into the residual stream, or changes what they wrote.
    """

    def __init__(self, model: Model, engine: Engine, answered: Answered, units: Sequence[str]) -> None:
        self.model, self.answered, self.units = model, answered, units
        geometry, runtime = model.geometry, model.runtime
        last = geometry.n_layers - 1
        read = [*WRITERS, *(UNITS[unit][0] for unit in units)]
        sites = [(component, layer) for component in read for layer in geometry.layers_of(component)]
        streams = ["resid_pre[0]", f"resid_post[{last}]"]
        self.recording: Recording = engine.record([answered.prompt.token_ids], [*streams, *sites])
        self.final = self.recording.at("resid_post", last)[0, answered.position]
        norm = frozen_norm(runtime.module_here(geometry.table.final_norm), self.final)
        weights, offset = self._unembedding()
        self.direction = norm.direction(weights)
        self.embed = self._share("resid_pre", 0)
        self.bias = float(norm.bias @ weights) + offset
        self.shares = {
            writer: np.array([self._share(writer, layer) for layer in geometry.layers_of(writer)]) for writer in WRITERS
        }
        self.total = self.embed + self.bias + sum(float(part.sum()) for part in self.shares.values())
        self.logit = self._logit()
        size = float(np.abs(np.concatenate([*self.shares.values(), [self.embed]])).sum())
        self.tolerance = 10 * TOLERANCE.get(runtime.dtype, 1e-4) * max(1.0, size)
        if abs(self.total - self.logit) > self.tolerance:
            raise InputError(
                f"the components of {model.name} sum to {self.total:.4f}, and the logit is {self.logit:.4f}: its residual "
                "stream is no plain sum of embedding, attention and MLP outputs, so it cannot be taken apart"
            )

    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        """The shares by group of the store: ``contribution`` (layer,) or (layer, unit), ``bias`` (layer,)."""
        groups: dict[str, Mapping[str, Any]] = {
            "baseline": {"logit": self.logit, "total": self.total, "embed": self.embed, "bias": self.bias}
        }
        groups |= {f"attribution/{writer}": {"contribution": share} for writer, share in self.shares.items()}
        groups |= {f"attribution/{UNITS[unit][0]}": self._unit_shares(unit) for unit in self.units}
        return groups

    def _value(self, component: str, layer: int) -> torch.Tensor:
        return self.recording.at(component, layer)[0, self.answered.position].double()

    def _share(self, component: str, layer: int) -> float:
        return float(self._value(component, layer) @ self.direction)

    def _unit_shares(self, unit: str) -> dict[str, np.ndarray]:
        """The share of each head or neuron of each layer, and what their component wrote beside them.

        That must be the projection's bias; otherwise something (a norm) lies between the units and the residual stream.
        """
        component, whole = UNITS[unit]
        geometry = self.model.geometry
        wholes = dict(zip(geometry.layers_of(whole), self.shares[whole], strict=True))
        shares, rest = [], []
        for layer in geometry.layers_of(component):
            weight, bias = self._projection(component, layer)
            value, units = self._value(component, layer), geometry.units(component)
            written = value * (weight.to(value) @ self.direction) * geometry.residual_multiplier
            share = written.reshape(units.rows, units.width).sum(dim=1).cpu().numpy()[list(units.index)]
            left = wholes[layer] - share.sum()
            expected = 0.0
            if bias is not None:
                expected = float(bias.detach().to(self.direction) @ self.direction) * geometry.residual_multiplier
            if abs(left - expected) > self.tolerance:
                raise InputError(
                    f"layer {layer}: the {unit}s' shares leave {left:.4f}, where the bias explains {expected:.4f}: "
                    f"{self.model.name} does more than project {component} into the residual stream; leave {unit} out of `by`"
                )
            shares.append(share)
            rest.append(left)
        return {"contribution": np.stack(shares), "bias": np.array(rest)}

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
        # transformers' Conv1D keeps (in, out), a Linear (out, in).
        given = weight.detach() if hasattr(module, "nf") else weight.detach().T
        return given, getattr(module, "bias", None)

    def _unembedding(self) -> tuple[torch.Tensor, float]:
        """The direction of the answer's logit (less the distractor's) after the norm, and the head's bias for it."""
        geometry, tokens = self.model.geometry, list(self.answered.tokens)
        head: Any = self.model.runtime.module_here(geometry.table.head)
        signs = torch.tensor((1.0, -1.0)[: len(tokens)], dtype=torch.float64, device=self.final.device)
        rows = head.weight.detach()[tokens].double().to(signs.device) * geometry.logit_scale
        bias = getattr(head, "bias", None)
        if bias is None:
            return signs @ rows, 0.0
        return signs @ rows, float(signs @ bias.detach()[tokens].double().to(signs.device)) * geometry.logit_scale

    def _logit(self) -> float:
        """What the model itself makes of it, with any softcap undone."""
        cap = self.model.geometry.softcap
        ((_, logits),) = head_logits(self.model.runtime, self.final[None])
        values = [float(logits[0, token]) for token in self.answered.tokens]
        if cap is not None:
            values = [cap * float(np.arctanh(value / cap)) for value in values]
        return values[0] - (values[1] if len(values) > 1 else 0.0)
