"""A run (or several) as one HTML page that needs nothing else: no network, no server, no library.

The page holds its data, its style and a short script: heatmaps and charts that tell the numbers under the pointer or the
keyboard's cursor, and tables that sort. It reads without the script too: findings, tables and the recipe are plain HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import xarray as xr

from nsp.report.default_figures import figures_by_dims
from nsp.report.drawing.page import Views, figures_html, shown_views, table_html
from nsp.report.figures import Figure
from nsp.report.labels import short
from nsp.report.summary import Summary, SummaryTable

_FINDINGS = 4  # sentences of figures
_LONGEST = 90  # characters of a recipe's value, where runs are compared


@dataclass(frozen=True)
class Section:
    """One run of a report.

    Attributes:
        location: the store, as the user named it.
        tree: its results, with the header as attributes.
        summary: what the experiment says of it.
        recipe: the recipe as YAML.
        figures: what it shows; by default `figures_by_dims`.
    """

    location: str
    tree: xr.DataTree
    summary: Summary
    recipe: str
    figures: Sequence[Figure] | None = None


def page(sections: Sequence[Section]) -> str:
    """The HTML of a report: one section a run, side by side where there is room."""
    heading = sections[0].summary.title if len(sections) == 1 else f"{len(sections)} runs compared"
    several = " several" if len(sections) > 1 else ""
    drawn = [figures_by_dims(one.tree) if one.figures is None else one.figures for one in sections]
    drawn = [[figure for figure in figures if figure.in_report] for figures in drawn]
    shown = shown_views(drawn)
    body = "\n".join(map(_section, sections, drawn, shown, range(len(sections))))
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
{_differences(sections)}
<div class="runs{several}">
{body}
</div>
</main>
<script>
{_asset("report.js")}{_asset("heatmap.js")}{_asset("chart.js")}</script>
</body>
</html>
"""


def _section(section: Section, figures: Sequence[Figure], shown: Sequence[Views], number: int) -> str:
    attrs = section.tree.attrs
    recipe = attrs.get("recipe_resolved")
    told = recipe if isinstance(recipe, Mapping) else {}
    name, question = str(told.get("name") or attrs.get("kind", "")), str(told.get("description") or "")
    drawn = figures_html(figures, shown, number)
    tables = [one for one in (*section.summary.tables, *_baselines(section.tree)) if not _is_drawing(one)]
    parts = [
        f'<section aria-labelledby="run-{number}">',
        f'<h2 id="run-{number}">{escape(name)}</h2>',
        f"<p>{escape(question)}</p>" if question else "",
        f'<p class="meta">{escape(_made(attrs))}</p>',
        _contents(number, bool(drawn), bool(tables)),
        *(f'<p class="warning">{escape(text)}</p>' for text in _warnings(section.tree)),
        f'<h3 id="findings-{number}">Findings</h3>',
        _findings(section.summary, [figure for figure, views in zip(figures, shown, strict=True) if views]),
        f'<h3 id="figures-{number}">Figures</h3>' if drawn else "",
        *drawn,
        f'<h3 id="tables-{number}">Tables</h3>' if tables else "",
        *(table_html(table.title, table.columns, table.rows) for table in tables),
        _reproduce(section, number),
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
        left = attrs.get("left_out")
        items = list(attrs.get("left_out_items") or (left if isinstance(left, list) else []))
        if left:
            found.append(f"{len(items) or left} item(s) were left out, such as {items[0] if items else '?'}")
        if attrs.get("bad_rows"):
            named = "; ".join(str(row) for row in list(attrs.get("bad_row_list", []))[:3])
            found.append(f"{attrs['bad_rows']} row(s) of the data were left out: {named}")
        if attrs.get("path") == "plain":
            found.append(f"{where}: the plain path ran ({attrs.get('path_reason', 'no reason given')})")
        if attrs.get("note"):
            found.append(f"{where}: {attrs['note']}")
    return list(dict.fromkeys(found))


def _is_drawing(table: SummaryTable) -> bool:
    """Whether a table draws a heatmap with characters, for terminals; the page has the heatmap itself."""
    return any(set(cell) & set("░▒▓█") for row in table.rows for cell in row if isinstance(cell, str))


def _contents(number: int, figures: bool, tables: bool) -> str:
    names = [("findings", "Findings"), *([("figures", "Figures")] if figures else [])]
    names += [*([("tables", "Tables")] if tables else []), ("reproduce", "How to reproduce it")]
    links = "".join(f'<a href="#{name}-{number}">{text}</a>' for name, text in names)
    return f'<nav aria-label="Parts of this run">{links}</nav>'


def _findings(summary: Summary, figures: Sequence[Figure]) -> str:
    """What the figures show, in a sentence each, and what the experiment says."""
    seen = dict.fromkeys(finding for one in figures if (finding := one.finding))
    lines = [f'<li class="finding">{escape(text)}</li>' for text in list(seen)[:_FINDINGS]]
    lines += [f"<li>{escape(line)}</li>" for line in summary.lines]
    return f"<ul>{''.join(lines)}</ul>"


def _differences(sections: Sequence[Section]) -> str:
    """The recipes' keys that differ between runs."""
    recipes = [section.tree.attrs.get("recipe_resolved") for section in sections]
    if len(sections) < 2 or not all(isinstance(recipe, Mapping) for recipe in recipes):
        return ""
    given = [dict(recipe) for recipe in recipes if isinstance(recipe, Mapping)]
    rows = []
    for key in dict.fromkeys(key for recipe in given for key in recipe):
        told = [json.dumps(recipe.get(key), ensure_ascii=False) if key in recipe else None for recipe in given]
        if len(set(told)) > 1:
            rows.append((key, *(None if text is None else short(text, _LONGEST) for text in told)))
    columns = ("key", *(section.location for section in sections))
    return table_html("What differs between the recipes", columns, rows) if rows else ""


def _baselines(tree: xr.DataTree) -> list[SummaryTable]:
    """Means of the runs without interventions."""
    if "baseline" not in tree.children:
        return []
    rows = []
    for name, array in tree["baseline"].to_dataset().data_vars.items():
        if array.dtype.kind == "f" and array.size:
            rows.append((str(name), float(array.mean()), int(array.notnull().sum()), str(array.attrs.get("units", ""))))
    return [SummaryTable("Baselines, means", ("run", "mean", "n", "units"), tuple(rows))] if rows else []


def _reproduce(section: Section, number: int) -> str:
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
    return f"""<h3 id="reproduce-{number}">How to reproduce it</h3>
<p><code>nsp rerun {escape(section.location)}</code> runs it again and compares;
the recipe below, saved as <code>recipe.yaml</code>, makes a new one with <code>nsp run recipe.yaml</code>.</p>
<ul>{lines}</ul>
<details class="recipe"><summary>Recipe</summary><pre>{escape(section.recipe)}</pre></details>"""


def _asset(name: str) -> str:
    return files("nsp.report").joinpath("assets", name).read_text(encoding="utf-8")
