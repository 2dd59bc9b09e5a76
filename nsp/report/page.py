"""A run (or several) as one HTML page that needs nothing else: no network, no server, no library.

The page holds its data, its style and 100 lines of script: heatmaps that tell a cell's numbers under the pointer or the
keyboard's cursor, and tables that sort. It reads without the script too: findings, tables and the recipe are plain HTML.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from typing import Any

import xarray as xr

from nsp.report.panels import Panel, panels_of, same_scale
from nsp.report.summary import Summary, SummaryTable


@dataclass(frozen=True)
class Section:
    """One run of a report.

    Attributes:
        location: the store, as the user named it.
        tree: its results, with the header as attributes.
        summary: what the experiment says of it.
        recipe: the recipe as YAML.
    """

    location: str
    tree: xr.DataTree
    summary: Summary
    recipe: str


def page(sections: Sequence[Section]) -> str:
    """The HTML of a report: one section a run, side by side where there is room."""
    heading = sections[0].summary.title if len(sections) == 1 else f"{len(sections)} runs compared"
    several = " several" if len(sections) > 1 else ""
    figures = same_scale([panels_of(section.tree) for section in sections])
    body = "\n".join(
        _section(section, panels, number)
        for number, (section, panels) in enumerate(zip(sections, figures, strict=True))
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="nsp">
<title>{escape(heading)}</title>
<link rel="icon" href="data:,">
<style>
{_asset("report.css")}</style>
</head>
<body>
<main>
<h1>{escape(heading)}</h1>
<div class="runs{several}">
{body}
</div>
</main>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _section(section: Section, panels: Sequence[Panel], number: int) -> str:
    attrs = section.tree.attrs
    recipe = attrs.get("recipe_resolved")
    name = (
        str(recipe.get("name") or attrs.get("kind", "")) if isinstance(recipe, Mapping) else str(attrs.get("kind", ""))
    )
    question = str(recipe.get("description") or "") if isinstance(recipe, Mapping) else ""
    parts = [
        f'<section aria-labelledby="run-{number}">',
        f'<h2 id="run-{number}">{escape(name)}</h2>',
        f"<p>{escape(question)}</p>" if question else "",
        f'<p class="meta">{escape(_made(attrs))}</p>',
        *(f'<p class="warning">{escape(text)}</p>' for text in _warnings(section.tree)),
        "<h3>Findings</h3><ul>" + "".join(f"<li>{escape(line)}</li>" for line in section.summary.lines) + "</ul>",
        *(_figure(panel, f"{number}-{index}") for index, panel in enumerate(panels)),
        *(_table(table) for table in section.summary.tables),
        _baselines(section.tree),
        _reproduce(section),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _made(attrs: Mapping[Any, Any]) -> str:
    model = attrs.get("model") or {}
    versions = attrs.get("versions") or {}
    words = [
        f"model {model.get('name', '?')}",
        str(model.get("dtype", "?")),
        f"on {model.get('device', '?')}",
        f"nsp {versions.get('nsp', '?')}",
        f"made {attrs.get('created_at', '?')}",
        f"state {attrs.get('state', 'in memory')}",
    ]
    return ", ".join(words)


def _warnings(tree: xr.DataTree) -> list[str]:
    """What a reader must know before trusting the numbers: items left out, fallbacks, unfinished work, notes."""
    found = []
    if tree.attrs.get("state") in ("running", "failed"):
        found.append(f"this run is not complete (state {tree.attrs['state']}): cells without a value were not computed")
    for node in tree.subtree:
        where = node.path.strip("/")
        attrs = node.attrs
        if attrs.get("left_out"):
            items = attrs.get("left_out_items") or []
            found.append(f"{attrs['left_out']} item(s) were left out, such as {items[0] if items else '?'}")
        if attrs.get("path") == "plain":
            found.append(f"{where}: the plain path ran ({attrs.get('path_reason', 'no reason given')})")
        if attrs.get("note"):
            found.append(f"{where}: {attrs['note']}")
    return list(dict.fromkeys(found))


def _figure(panel: Panel, number: str) -> str:
    # "</" would end the script element early, whatever a token says.
    data = json.dumps(asdict(panel), ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    choose = ""
    if len(panel.layers) > 1:
        options = "".join(
            f'<option value="{index}">{escape(layer.name)}</option>' for index, layer in enumerate(panel.layers)
        )
        choose = f'<label class="choose">shown: <select>{options}</select></label>'
    note = f" ({escape(panel.note)})" if panel.note else ""
    units = f" [{escape(panel.units)}]" if panel.units else ""
    along = f"{panel.y} against {panel.x}" if panel.y else panel.x
    return f"""<figure class="heatmap" id="figure-{number}">
<figcaption><strong>{escape(panel.title)}</strong>: {escape(panel.meaning)}{units}; {escape(along)}{note}{choose}</figcaption>
<div class="scroll"><canvas class="grid" tabindex="0" role="img" aria-describedby="readout-{number}"
 aria-label="Heatmap of {escape(panel.title, quote=True)}, {escape(along, quote=True)}. Arrow keys move between cells."></canvas></div>
<div class="legend"><span>{-panel.reach:.3g}</span><div class="ramp"></div><span>{panel.reach:.3g}</span><span>grey, hatched: no value</span></div>
<div class="readout" id="readout-{number}" role="status" aria-live="polite">Point at a cell, or move with the arrow keys.</div>
<script type="application/json">{data}</script>
</figure>"""


def _table(table: SummaryTable) -> str:
    numeric = [
        bool(table.rows) and all(_is_number(row[index]) for row in table.rows) for index in range(len(table.columns))
    ]
    kinds = [' class="number"' if number else "" for number in numeric]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(str(name))}</button></th>'
        for kind, name in zip(kinds, table.columns, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    return f'<div class="scroll"><table class="sortable">{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(cell: Any, kind: str) -> str:
    if isinstance(cell, float):
        return f'<td{kind} data-value="{cell!r}">{"no value" if math.isnan(cell) else f"{cell:.3f}"}</td>'
    text = "-" if cell is None else str(cell)
    return f"<td{kind}>{escape(text)}</td>"


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _baselines(tree: xr.DataTree) -> str:
    """Means of the runs without interventions."""
    if "baseline" not in tree.children:
        return ""
    rows = []
    for name, array in tree["baseline"].to_dataset().data_vars.items():
        if array.dtype.kind == "f" and array.size:
            rows.append((str(name), float(array.mean()), int(array.notnull().sum()), str(array.attrs.get("units", ""))))
    return _table(SummaryTable("Baselines, means", ("run", "mean", "n", "units"), tuple(rows))) if rows else ""


def _reproduce(section: Section) -> str:
    attrs = section.tree.attrs
    model = attrs.get("model") or {}
    facts = {
        "plan": attrs.get("plan_hash"),
        "weights": model.get("weights_hash"),
        "tokenizer": model.get("tokenizer_hash"),
        "seeds": json.dumps(attrs.get("seeds")),
        "versions": ", ".join(f"{name} {found}" for name, found in (attrs.get("versions") or {}).items()),
    }
    lines = "".join(f"<li>{escape(name)}: <code>{escape(str(value))}</code></li>" for name, value in facts.items())
    return f"""<h3>How to reproduce it</h3>
<p><code>nsp rerun {escape(section.location)}</code> runs it again and compares;
the recipe below, saved as <code>recipe.yaml</code>, makes a new one with <code>nsp run recipe.yaml</code>.</p>
<ul>{lines}</ul>
<details><summary>Recipe</summary><pre>{escape(section.recipe)}</pre></details>"""


def _asset(name: str) -> str:
    return files("nsp.report").joinpath("assets", name).read_text(encoding="utf-8")
