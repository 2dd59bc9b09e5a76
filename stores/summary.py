"""A run in a few lines, for a terminal and for a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsp.html import card

if TYPE_CHECKING:
    from nsp.stores.reader import Run


def lines(run: Run) -> list[tuple[str, str]]:
    """(what, value) pairs: from the header, the markers and the groups' sizes."""
    model = run.header["model"]
    total = int(run.header["units"])
    done = int(run.done.sum())
    revision = f" @ {str(model['revision'])[:12]}" if model.get("revision") else ""
    found = [
        ("state", f"{run.state}, {done} of {total} units committed"),
        ("model", f"{model['name']}{revision}, {model['dtype']} on {model['device']}"),
        ("plan", run.plan_hash[:16]),
        ("created", str(run.header["created_at"])),
    ]
    for path, node in ((node.path.strip("/"), node) for node in run.tree.subtree):
        if path and node.data_vars:
            dataset = node.to_dataset(inherit=True)
            sizes = ", ".join(f"{dim} {size}" for dim, size in dataset.sizes.items())
            found.append((path, f"{', '.join(map(str, dataset.data_vars))} ({sizes})"))
    if run.damage:
        found.append(("damage", f"{len(run.damage)} shards cannot be read; see `nsp validate {run.location}`"))
    return found


def text(run: Run) -> str:
    """Several lines of plain text."""
    rows = lines(run)
    width = max(len(name) for name, _ in rows)
    body = "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
    return f"<nsp run: {run.kind} at {run.location}>\n{body}"


def html(run: Run) -> str:
    """A card, with the run's main figure where it has one."""
    found = lines(run)
    notes = [f"{name}: {value}" for name, value in found if name == "damage"]
    if run.state != "complete":
        notes.append(f"this run is not complete ({run.state}): what was not computed reads as NaN")
    headline = (run.header.get("extra") or {}).get("headline")
    said = [headline] if isinstance(headline, str) else []
    return card("nsp run", f"{run.kind} at {run.location}", lines=said, notes=notes, facts=[fact for fact in found if fact[0] != "damage"])
