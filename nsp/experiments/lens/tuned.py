"""The tuned lens: an affine translator a layer, trained so that norm and head read from it what the model will say.

Belrose et al. 2023. Translator ``i`` belongs to what layer ``i`` receives (0: the embedding), and is added to it:
``h + A h + b``. The files are those of the tuned-lens package (``config.json`` and ``params.pt``), so lenses trained
there load here and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsp.engine.slots import BOUNDARY, stream_slots
from nsp.errors import InputError
from nsp.experiments.lens.recipe import TuneOptions
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.statistics.regression import ridge_regression

_CONFIG, _PARAMETERS = "config.json", "params.pt"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators of one model.

    Attributes:
        weight: float32 with axes (layer, out, in); ``bias`` (layer, out). Layer ``i`` is what layer ``i`` receives.
        model: the name of the model it was trained on.
        divergence: KL(model || lens) in nats of each layer on held-out text, and that of the logit lens beside it,
            axes (2, layer); None for a lens that was loaded.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    model: str
    divergence: np.ndarray | None = None

    def translated(self, hidden: torch.Tensor, boundary: int) -> torch.Tensor:
        """Residual vectors (row, width) that layer ``boundary`` receives, moved towards the final residual stream.

        After the last layer (``boundary`` = number of layers) they are there already, and stay.
        """
        if boundary >= len(self.weight):
            return hidden
        weight, bias = self.weight[boundary].to(hidden), self.bias[boundary].to(hidden)
        return hidden + hidden @ weight.T + bias

    def save(self, directory: str | Path) -> None:
        """Write the lens in the format of the tuned-lens package."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "base_model_name_or_path": self.model, "d_model": self.weight.shape[-1], "num_hidden_layers": len(self.weight),
            "bias": True, "base_model_revision": None, "unembed_hash": None, "lens_type": "linear_tuned_lens",
        }  # fmt: skip
        state = {f"{layer}.weight": self.weight[layer].clone() for layer in range(len(self.weight))}
        state |= {f"{layer}.bias": self.bias[layer].clone() for layer in range(len(self.bias))}
        torch.save(state, folder / _PARAMETERS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_tuned_lens(directory: str | Path, model: Model) -> TunedLens:
    """A lens saved by `TunedLens.save` or by the tuned-lens package; InputError where it does not fit the model."""
    folder = Path(directory)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        state: dict[str, torch.Tensor] = torch.load(folder / _PARAMETERS, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise InputError(f"{folder} holds no tuned lens ({_CONFIG} and {_PARAMETERS}): {error}") from None
    if not isinstance(config, dict) or config.get("lens_type", "linear_tuned_lens") != "linear_tuned_lens":
        kind = config.get("lens_type") if isinstance(config, dict) else config
        raise InputError(f"{folder / _CONFIG}: lens_type is {kind!r}; nsp reads linear_tuned_lens")
    n_layers, width = model.geometry.n_layers, model.geometry.d_model
    if (config.get("num_hidden_layers"), config.get("d_model")) != (n_layers, width):
        raise InputError(
            f"{folder} is a lens of {config.get('base_model_name_or_path')} ({config.get('num_hidden_layers')} layers of width "
            f"{config.get('d_model')}); {model.name} has {n_layers} layers of width {width}"
        )
    missing = [f"{layer}.weight" for layer in range(n_layers) if f"{layer}.weight" not in state]
    if missing:
        raise InputError(f"{folder / _PARAMETERS} has no {missing[0]}; its entries: {', '.join(list(state)[:4])} ...")
    weight = torch.stack([state[f"{layer}.weight"].float() for layer in range(n_layers)])
    bias = torch.stack([state.get(f"{layer}.bias", torch.zeros(width)).float() for layer in range(n_layers)])
    return TunedLens(weight, bias, str(config.get("base_model_name_or_path", "")))


def train_tuned_lens(
    model: Model,
    text: str | Path,
    *,
    tokens: int = 4096,
    sequence: int = 128,
    steps: int = 50,
    batch: int = 16,
    rate: float = 1e-4,
    ridge: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> TunedLens:
    """Train a lens on a text file.

    Each translator starts at the ridge regression of the final residual stream on its layer's, which a few hundred
    tokens fit in a second, and then follows the gradient of KL(model || lens) with Adam. A layer keeps whichever of
    start, trained translator and none does best on held-out text.

    Args:
        text: the file; its first ``tokens`` tokens are used, in pieces of ``sequence``; every tenth piece is held out.
        steps, batch, rate: of the descent; ``batch`` positions a step, the same ones for all layers.
        ridge: penalty of the start, relative to the mean variance of the layer.
        progress: called with (steps done, steps in all).
    """
    numbers = {"tokens": tokens, "sequence": sequence, "steps": steps, "batch": batch, "rate": rate, "ridge": ridge}
    checked(TuneOptions, {"text": str(text), **numbers}, "train_tuned_lens")
    streams, held = _streams(model, Path(text), tokens, sequence)
    head = _Head(model)
    n_layers, width = model.geometry.n_layers, model.geometry.d_model
    none = [(torch.zeros(width, width), torch.zeros(width))] * n_layers
    start = [_regression(streams[layer], streams[-1], ridge) for layer in range(n_layers)]
    trained = _descend(head, start, streams, steps, batch, rate, seed, progress) if steps else start
    candidates = [none, start, trained]
    final = head.log_p(held[-1])
    scores = np.array(
        [[_divergence(head, held[layer], final, *pairs[layer]) for layer in range(n_layers)] for pairs in candidates]
    )
    best = scores.argmin(axis=0)
    chosen = [candidates[best[layer]][layer] for layer in range(n_layers)]
    return TunedLens(
        torch.stack([weight for weight, _ in chosen]), torch.stack([bias for _, bias in chosen]), model.name,
        np.stack([scores.min(axis=0), scores[0]]),
    )  # fmt: skip


class _Head:
    """The model's final norm and head, with gradients: functions of its weights that no forward pass is needed for."""

    def __init__(self, model: Model) -> None:
        table, geometry = model.geometry.table, model.geometry
        self.norm, self.head = (model.runtime.module_here(path) for path in (table.final_norm, table.head))
        self.softcap, self.scale = geometry.softcap, geometry.logit_scale
        parameter = next(self.head.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def log_p(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (row, token) of final residual vectors (row, width)."""
        logits: torch.Tensor = self.head(self.norm(hidden.to(self.device, self.dtype))).float() * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return torch.log_softmax(logits, dim=-1)


def _streams(model: Model, path: Path, tokens: int, sequence: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What every layer receives, and the final residual stream, (token, width) each: to train on, and held out."""
    try:
        ids = list(model.encode(path.read_text(encoding="utf-8")).token_ids)[:tokens]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text {path}: {error}") from None
    pieces = [ids[low : low + sequence] for low in range(0, len(ids), sequence)]
    pieces = [piece for piece in pieces if len(piece) == sequence]
    if len(pieces) < 2:
        raise InputError(f"{path} has {len(ids)} tokens; a tuned lens needs two pieces of {sequence} at least")
    n_layers = model.geometry.n_layers
    kept = model.engine.record(pieces, stream_slots(n_layers))
    out = np.arange(len(pieces)) % 10 == min(9, len(pieces) - 1)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for layer in range(n_layers + 1):
        # The first token of a piece is an attention sink, unlike any other.
        values = kept.values[(BOUNDARY, layer)][:, 1:].float().cpu()
        parts[0].append(values[~out].flatten(0, 1))
        parts[1].append(values[out].flatten(0, 1))
    return parts


def _regression(values: torch.Tensor, final: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and b of ``h + A h + b``, the ridge regression of ``final`` on ``values``, both (token, width)."""
    weights, constant = ridge_regression(values, final - values, ridge)
    return weights.T.float(), constant.float()


def _descend(
    head: _Head, start: Sequence[tuple[torch.Tensor, torch.Tensor]], streams: Sequence[torch.Tensor],
    steps: int, batch: int, rate: float, seed: int, progress: Progress | None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    layers = [tuple(part.clone().to(head.device).requires_grad_() for part in pair) for pair in start]
    optimiser: Any = torch.optim.Adam([part for pair in layers for part in pair], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(streams[-1]), (batch,), generator=generator)
        with torch.no_grad():
            final = head.log_p(streams[-1][rows])
        for (weight, bias), values in zip(layers, streams, strict=False):
            hidden = values[rows].to(head.device)
            translated = head.log_p(hidden + hidden @ weight.T + bias)
            loss = (final.exp() * (final - translated)).sum(-1).mean()
            # Gradients of the translators alone: the model's own parameters keep none.
            weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        optimiser.step()
        if progress is not None:
            progress(step + 1, steps)
    return [(weight.detach().cpu(), bias.detach().cpu()) for weight, bias in layers]


@torch.no_grad()
def _divergence(
    head: _Head, hidden: torch.Tensor, final: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> float:
    translated = head.log_p(hidden + hidden @ weight.T + bias)
    return float((final.exp() * (final - translated)).sum(-1).mean())
