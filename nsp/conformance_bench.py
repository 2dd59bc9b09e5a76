"""What the lines of the conformance list stand on: a model with its prompts, and ways to run and compare (see `nsp.conformance`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.budget import Budget
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.site_recordings import record_counterfactuals
from nsp.interventions import Intervention, Patch
from nsp.models.geometry import submodule
from nsp.models.tables import INFERRED
from nsp.sites import Site

_LENGTH = 10
# A prompt is made longer than the sliding window where that is cheap, so that a forgotten window shows.
_LONGEST = 40


class NotApplicable(Exception):  # noqa: N818  (it is an outcome, not an error)
    """A line that says nothing about this model, and why."""


@dataclass(frozen=True)
class Off:
    """A deviation, relative to the spread of what it was compared with, and where it was found."""

    deviation: float | None
    where: str = ""


class Bench:
    """A model with two prompts of one length (and a shorter one), and what the lines share."""

    def __init__(self, runtime: Runtime, tolerance: float) -> None:
        self.runtime, self.geometry, self.tolerance = runtime, runtime.geometry, tolerance
        windows = [window for window in self.geometry.windows if window]
        length = max([_LENGTH, *(window + 5 for window in windows if window + 5 <= _LONGEST)])
        generator = torch.Generator().manual_seed(0)
        low, high = self.geometry.vocab_size // 4, self.geometry.vocab_size // 2
        ids = [torch.randint(low, high, (size,), generator=generator).tolist() for size in (length, length, length - 4)]
        self.base, self.donor, self.short = (Prompt.from_ids(one) for one in ids)
        self.budget = Budget.of(None, runtime.device)
        n_layers = self.geometry.n_layers
        self.some_layers = tuple(sorted({0, n_layers // 2, n_layers - 1}))

    # --- running --------------------------------------------------------------------------------------------------------

    def run(
        self,
        record: Sequence[str],
        *stated: Intervention,
        donor: Prompt | None = None,
        bases: Sequence[Prompt] | None = None,
    ) -> list[torch.Tensor]:
        """Record sites in one counterfactual of the plain path: tensors with axes (layer, position, unit, width).

        With several ``bases`` there is a leading axis (base).
        """
        prompts = tuple(bases or (self.base,))
        fixed = tuple(replace(one, donor=donor) if isinstance(one, Patch) and donor else one for one in stated)
        request = Request(bases=prompts, fixed=fixed)
        _, recorded = record_counterfactuals(self.runtime, request, [Site.parse(one) for one in record], self.budget)
        values = [torch.from_numpy(one.values) for one in recorded]
        return values if bases else [value[0] for value in values]

    def logits(self, *stated: Intervention, donor: Prompt | None = None, base: Prompt | None = None) -> torch.Tensor:
        """Logits with axes (position, token)."""
        found = self.run(["logits"], *stated, donor=donor, bases=[base or self.base])[0]
        return found[0, 0, :, 0]

    @cached_property
    def unchanged(self) -> torch.Tensor:
        """The base prompt's logits without any intervention, (position, token)."""
        return self.logits()

    def whole(self, component: str) -> torch.Tensor:
        """A component of the base prompt's run at every layer that has it, (layer, position, unit, width)."""
        found = self._together.get(component)
        # Where they cannot be read together, each is read alone: what cannot be had fails the lines that need it, and no other.
        return self.run([component])[0] if found is None else found

    @cached_property
    def _together(self) -> dict[str, torch.Tensor]:
        names = [name for name in self.geometry.components() if name != "pattern"]
        try:
            return dict(zip(names, self.run(names), strict=True))
        except Exception:
            return {}

    def value(self, component: str, layer: int) -> torch.Tensor:
        """A component of the base prompt's run at one layer, (position, unit, width)."""
        return self.whole(component)[self.geometry.layers_of(component).index(layer)]

    @cached_property
    def refusal(self) -> str:
        """Why the branch path is not to be used; for an inferred table the engine's own self-check decides, for a stated one the table."""
        if self.geometry.table.variant == INFERRED:
            ensure_checked(self.runtime)
            return self.runtime.branch_refusal
        return self.geometry.table.branch

    def has(self, *components: str) -> bool:
        return set(components) <= set(self.geometry.components())

    def layers(self, *components: str) -> list[int]:
        """The layers that have all of these components."""
        found = [set(self.geometry.layers_of(name)) for name in components]
        return sorted(set(range(self.geometry.n_layers)).intersection(*found))

    def need(self, *components: str) -> None:
        for name in components:
            if not self.has(name):
                raise NotApplicable(f"{self.geometry.table.name} has no {name}")

    def module(self, layer: int, path: str) -> torch.nn.Module:
        """A submodule of one layer."""
        base = f"{self.geometry.table.layers}.{layer}"
        return submodule(self.runtime.module, f"{base}.{path}" if path else base)

    def native(self, prompt: Prompt, **options: Any) -> Any:
        """The transformers model's own forward pass on one prompt."""
        ids = torch.tensor([prompt.token_ids], device=self.runtime.device)
        with torch.no_grad():
            return self.runtime.module(input_ids=ids, use_cache=False, **options)

    def through(self, path: str, states: torch.Tensor, layer: int) -> torch.Tensor:
        """What a module of a layer makes of ``states`` (position, width)."""
        given = states.to(self.runtime.device, self.runtime.dtype)
        with torch.no_grad():
            made: Any = self.module(layer, path)(given[None])
        rows: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return rows[0].float().cpu()


def apart(found: torch.Tensor, wanted: torch.Tensor, where: str) -> Off:
    """The largest difference, relative to the spread of ``wanted``."""
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    if found.shape != wanted.shape:
        raise ValueError(f"{where}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
    spread = float(wanted.std()) if wanted.numel() > 1 else float(wanted.abs().max())
    return Off(float((found - wanted).abs().max()) / max(spread, 1e-12), where)
