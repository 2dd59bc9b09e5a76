"""What replaces a unit: one statement of the donor that attributions, exact effects and circuit ablations share.

``zero``; the ``mean`` over reference prompts; ``resample``, a seeded draw from them; ``counterfactual``, the value from a prompt of
its own for each base prompt. Mean and draw are over all tokens of the reference prompts, or (``over="end"``) over what stands at the same
position counted from the end: with reference prompts of one form, that keeps the form and takes away what tells them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from nsp.datasets.alignment import align
from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Source
from nsp.engine.lowering import Resolved, resolve
from nsp.engine.operands import make_operand, needed_slots, position_maps
from nsp.engine.recording import Recording, record
from nsp.engine.runtime import Runtime
from nsp.engine.slots import Slot
from nsp.errors import InputError
from nsp.interventions import Intervention, Patch, ablate, patch
from nsp.sites import Site

DonorKind = Literal["zero", "mean", "resample", "counterfactual"]
Over = Literal["tokens", "end"]
DONORS: tuple[str, ...] = ("zero", "mean", "resample", "counterfactual")


@dataclass(frozen=True, eq=False)
class Donor:
    """What replaces a unit's value.

    Attributes:
        kind: see the module's docstring.
        reference: prompts of ``mean`` and ``resample``; None takes nsp's neutral sentences. With ``over="end"`` encoded prompts.
        seed: of ``resample``.
        prompts: of ``counterfactual``, one for each base prompt.
        over: all tokens of the reference prompts, or those at the same position from the end.
    """

    kind: DonorKind = "zero"
    reference: tuple[Any, ...] | None = None
    seed: int = 0
    prompts: tuple[Prompt, ...] = ()
    over: Over = "tokens"
    _known: dict[Any, xr.DataArray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in DONORS:
            raise InputError(f"a donor is one of {', '.join(DONORS)}, not {self.kind!r}")
        if self.aligned and not self.reference:
            raise InputError("a mean over positions from the end needs reference prompts of the base prompts' form")

    @property
    def aligned(self) -> bool:
        """Whether positions correspond from the end."""
        return self.over == "end" and self.kind in ("mean", "resample")

    def rows(self, chosen: Sequence[int]) -> Donor:
        """The donor of some of the base prompts."""
        if self.kind != "counterfactual":
            return self
        return Donor(self.kind, self.reference, self.seed, tuple(self.prompts[row] for row in chosen))

    def intervention(
        self, runtime: Runtime, site: str | Site, prompts: Sequence[Prompt]
    ) -> Intervention:
        """The engine's intervention at a site. Of an aligned donor for one prompt alone."""
        if self.kind == "counterfactual":
            return patch(site, donor=self.prompts)
        if self.aligned:
            (prompt,) = prompts
            parsed = Site.parse(site) if isinstance(site, str) else site
            return patch(site, donor=self._from_end(runtime, parsed, prompt))
        return ablate(site, self.kind, reference=self.reference, seed=self.seed)

    def _from_end(self, runtime: Runtime, site: Site, prompt: Prompt) -> xr.DataArray:
        """What the reference prompts have at the same positions from the end, as a recording of the site."""
        item = resolve(runtime, site.with_(units=None), [prompt])
        back = tuple(len(prompt) - place for place in item.positions[0])
        own = prompt.token_ids if self.kind == "resample" else None
        key = (str(site.with_(units=None, positions=None)), back, own)
        if key not in self._known:
            self._known[key] = self._recorded(runtime, item, back, prompt)
        array = self._known[key]
        return array.assign_coords(position=list(item.positions[0]))

    def _recorded(self, runtime: Runtime, item: Resolved, back: Sequence[int], prompt: Prompt) -> xr.DataArray:
        given: tuple[Prompt, ...] = self.reference or ()
        if self.kind == "resample":
            given = tuple(one for one in given if one.token_ids != prompt.token_ids) or given
            name = f"{self.seed}:{','.join(map(str, prompt.token_ids))}".encode()
            given = (given[int.from_bytes(hashlib.sha256(name).digest()[:7], "big") % len(given)],)
        if max(back) > max(len(one) for one in given):
            raise InputError(
                f"{item.site}: position {len(prompt) - max(back)} lies {max(back)} tokens from the end, and no reference prompt is that long"
            )
        kept: Recording = record(runtime, [one.token_ids for one in given], needed_slots(item), stay=True)
        units = runtime.units(item.site.component)
        # For each place the prompts that reach it, and the column of each.
        places = [
            tuple(zip(*((row, len(one) - at) for row, one in enumerate(given) if at <= len(one)), strict=True))
            for at in back
        ]
        layers = []
        for layer in item.slot_layers:
            values = kept.values[item.slot_component, layer]
            mean = torch.stack([values[list(rows), list(columns)].float().mean(dim=0) for rows, columns in places])
            layers.append(mean.reshape(len(back), units.rows, units.width)[:, list(units.index)])
        whole = torch.stack(layers).cpu().numpy()
        labels = np.arange(units.count)
        coords: dict[str, Any] = {"layer": list(item.layers)}
        if item.site.spec.has_heads and units.count > 1:
            array = xr.DataArray(whole, dims=("layer", "position", "head", "neuron"), coords={**coords, "head": labels})
        else:
            flat = whole.reshape(*whole.shape[:2], -1)
            array = xr.DataArray(
                flat, dims=("layer", "position", "neuron"), coords={**coords, "neuron": np.arange(flat.shape[-1])}
            )
        return array


def donor_source(runtime: Runtime, site: Site, prompts: Sequence[Prompt], donor: Donor) -> tuple[Resolved, Source]:
    """The site on these prompts, and where the donor's values at it come from."""
    item = resolve(runtime, site, prompts)
    intervention = donor.intervention(runtime, site, prompts)

    given = None
    if isinstance(intervention, Patch) and donor.kind == "counterfactual":
        aligned = [align(base, other, site.positions) for base, other in zip(prompts, donor.prompts, strict=True)]
        recording = record(runtime, donor.prompts, needed_slots(item), stay=True)
        given = Source(recording.values.__getitem__, np.arange(len(prompts)), position_maps(aligned))
    operand = make_operand(runtime, intervention, item, prompts, given)
    return item, operand.source if operand.source is not None else zero_source(runtime, site.component)


def zero_source(runtime: Runtime, component: str) -> Source:
    """Zeros, as wide as a component's tensor."""
    units = runtime.units(component)
    zeros = torch.zeros(1, 1, units.rows * units.width, device=runtime.device, dtype=runtime.dtype)
    return Source(lambda _slot: zeros)


def donor_values(runtime: Runtime, site: Site, prompts: Sequence[Prompt], donor: Donor) -> dict[Slot, torch.Tensor]:
    """The donor's value at each slot of a site, (prompt, position, width) on the CPU, zero where the site selects nothing."""
    item, source = donor_source(runtime, site, prompts, donor)
    longest = max(len(prompt) for prompt in prompts)
    rows = np.concatenate([np.full(len(places), row) for row, places in enumerate(item.positions)]).astype(np.int64)
    places = np.concatenate([np.asarray(places, dtype=np.int64) for places in item.positions])
    nothing = np.zeros_like(rows)
    found: dict[Slot, torch.Tensor] = {}
    for layer in item.slot_layers:
        slot = (item.slot_component, layer)
        values = source.gather(slot, nothing, rows, places, nothing, 1).cpu()
        full = values.new_zeros(len(prompts), longest, values.shape[-1])
        full[torch.as_tensor(rows), torch.as_tensor(places)] = values
        found[slot] = full
    return found
