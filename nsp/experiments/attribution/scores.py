"""Attribution methods: what each unit's replacement by its donor would change, estimated from gradients.

Sign: every score estimates metric(unit replaced by its donor) - metric(base), the exact effect that patching measures.

- ``atp``: gradient x (donor - base) (Nanda 2023).
- ``grad_x_act``: gradient x (0 - activation): atp with a donor of zero, whatever the donor is. (Minus the usual gradient x input.)
- ``atp_ig``: the gradient averaged along the straight line from base to donor at the component itself, one layer at a time
  (integrated gradients at activations: Marks et al. 2024).
- ``eap_ig``: the gradient averaged over runs whose *embeddings* lie on the line from base to donor (Hanna et al. 2024).
- ``relp``: atp with the gradient of the LRP rules (`nsp.engine.propagation_rules`; Jafari et al. 2025).
- ``edge``: EAP, scores of edges between heads and MLPs (`nsp.engine.edges`).

Steps are taken at the middle of equal intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.donors import Donor, donor_values
from nsp.engine.edges import edge_attribution, sender_slots
from nsp.engine.engine import Engine
from nsp.engine.gradients import Objective, Setting
from nsp.engine.lowering import Resolved, resolve
from nsp.engine.operands import needed_slots
from nsp.engine.propagation_rules import RELP, Rules
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot
from nsp.errors import InputError
from nsp.experiments.attribution.recipe import NODE_METHODS
from nsp.sites import COMPONENTS, Site


@dataclass(frozen=True, eq=False)
class Scored:
    """What is attributed on one prompt: its objective, the donor, and how methods are run."""

    prompt: Prompt
    objective: Objective
    donor: Donor
    steps: int = 5
    rules: Rules = RELP


def node_scores(engine: Engine, of: Scored, site: Site, method: str) -> np.ndarray:
    """Scores of one method at a site on one prompt, float32 (layer, position, unit); one unit where the component has none."""
    runtime = engine.runtime
    item = resolve(runtime, site, [of.prompt])
    _check_component(item)
    if item.slot_component == "pattern" and method == "atp_ig":
        raise InputError("the attention pattern cannot be interpolated in a gradient pass; take eap_ig or atp")
    if item.slot_component == "pattern" and of.donor.kind != "zero" and method != "grad_x_act":
        raise InputError(f"the attention pattern's donor is zero, not {of.donor.kind}")
    slots = sorted(needed_slots(item), key=lambda slot: slot[1])
    if method in ("atp", "relp", "grad_x_act"):
        plain = engine.gradients([of.prompt], slots, of.objective, rules=of.rules if method == "relp" else None)
        slopes, base = plain.gradients, plain.values
    elif method == "eap_ig":
        slopes, base = _input_integrated(engine, of, slots)
    elif method == "atp_ig":
        slopes, base = _site_integrated(engine, of, item, slots)
    else:
        raise InputError(f"{method!r} is no method of units; there are {', '.join(NODE_METHODS)}")
    donor = Donor() if method == "grad_x_act" else of.donor
    replaced = (
        donor_values(runtime, site, [of.prompt], donor)
        if item.slot_component != "pattern"
        else {slot: torch.zeros_like(value) for slot, value in base.items()}
    )
    return _per_unit(runtime, item, {slot: (replaced[slot] - base[slot]) * slopes[slot] for slot in slots})


def edge_scores(engine: Engine, of: Scored) -> np.ndarray:
    """Edge scores on one prompt, float32 (sender, receiver), NaN where there is no edge."""
    donors: dict[Slot, torch.Tensor] = {}
    for selector in ("embed", "z", "mlp_out"):
        donors |= donor_values(engine.runtime, Site.parse(selector), [of.prompt], of.donor)
    sent = {slot: donors[slot] for slot in sender_slots(engine.runtime)}
    return edge_attribution(engine.runtime, of.prompt.token_ids, of.objective, sent).astype(np.float32)


def _check_component(item: Resolved) -> None:
    component = item.site.component
    if component == "logits":
        raise InputError("logits are what is measured; attribute resid_post, or any component before it")
    if item.units is not None:
        raise InputError(f"{item.site}: all units are attributed at once; leave the units out, and select later")
    if component in COMPONENTS and not COMPONENTS[component].layered and component != "embed":
        raise InputError(f"{component} cannot be attributed")


def _per_unit(runtime: Runtime, item: Resolved, products: dict[Slot, torch.Tensor]) -> np.ndarray:
    """Products at each slot, (1, position, width) or (1, head, position, key), summed over each unit's width."""
    places = torch.as_tensor(item.positions[0], dtype=torch.long)
    units = runtime.units(item.site.component)
    blocks = []
    for layer in item.slot_layers:
        product = products[item.slot_component, layer][0].double()
        if item.slot_component == "pattern":
            blocks.append(product.sum(dim=-1)[:, places].T)
            continue
        split = product[places].reshape(len(places), units.rows, units.width)[:, list(units.index)]
        blocks.append(split.sum(dim=-1))
    return np.asarray(torch.stack(blocks).float().numpy())


def _midpoints(steps: int) -> list[float]:
    return [(step + 0.5) / steps for step in range(steps)]


def _input_integrated(
    engine: Engine, of: Scored, slots: Sequence[Slot]
) -> tuple[dict[Slot, torch.Tensor], dict[Slot, torch.Tensor]]:
    """The gradient at each slot, averaged over runs from embeddings between base and donor; and the base values."""
    start: Slot = (BOUNDARY, 0)
    plain = engine.gradients([of.prompt], [*slots, start], of.objective)
    there = donor_values(engine.runtime, Site.parse("embed"), [of.prompt], of.donor)[start]
    here = plain.values[start]
    blends = torch.cat([here + at * (there - here) for at in _midpoints(of.steps)])
    mask = torch.ones(of.steps, len(of.prompt), 1, dtype=torch.bool)
    blended = engine.gradients(
        [of.prompt] * of.steps,
        [*slots, start],
        of.objective.rows([0] * of.steps),
        settings=[Setting(start, mask, blends)],
    )
    return {slot: blended.gradients[slot].mean(dim=0, keepdim=True) for slot in slots}, plain.values


def _site_integrated(
    engine: Engine, of: Scored, item: Resolved, slots: Sequence[Slot]
) -> tuple[dict[Slot, torch.Tensor], dict[Slot, torch.Tensor]]:
    """The gradient at each slot, averaged over runs in which that slot alone lies between base and donor."""
    boundaries: list[Slot] = [(BOUNDARY, layer) for _, layer in slots]
    base = engine.gradients([of.prompt], [*slots, *boundaries], of.objective).values
    donors = donor_values(engine.runtime, item.site, [of.prompt], of.donor)
    mask = torch.zeros(of.steps, len(of.prompt), 1, dtype=torch.bool)
    mask[:, list(item.positions[0])] = True
    slopes: dict[Slot, torch.Tensor] = {}
    for slot in slots:
        blends = torch.cat([base[slot] + at * (donors[slot] - base[slot]) for at in _midpoints(of.steps)])
        blended = engine.gradients(
            [of.prompt] * of.steps, [slot], of.objective.rows([0] * of.steps), settings=[Setting(slot, mask, blends)],
            received=base[BOUNDARY, slot[1]].expand(of.steps, -1, -1) if slot[1] < engine.runtime.geometry.n_layers else None,
        )  # fmt: skip
        slopes[slot] = blended.gradients[slot].mean(dim=0, keepdim=True)
    return slopes, base
