"""A run in a few lines, for a terminal and for a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

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
    """A small table."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in lines(run)
    )
    return f"<b>nsp run: {escape(run.kind)}</b> <code>{escape(run.location)}</code><table>{rows}</table>"
