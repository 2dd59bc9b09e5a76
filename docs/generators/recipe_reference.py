"""The reference of recipe keys as Markdown, from the recipe classes: every key with its type, default and docstring."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nsp.experiments.kinds import RECIPES
from nsp.recipe import Recipe
from nsp.recipe_schema import recipe_schema

DOCS = Path(__file__).parents[1]

INTRO = """\
# Recipe keys

Every key of every kind of recipe, with its type, its default and its meaning. This page is made from the recipe classes;
`nsp schema -o recipe.schema.json` writes the same as a JSON schema, with which an editor completes and checks a recipe.
How to write one is in the [quickstart](quickstart.md); [the shipped recipes](shipped-recipes.md) are there to copy.

`--set` reaches any key, dotted where it lies in a mapping: `--set pairs.path=mine.csv`.
"""

# The page of each kind; a kind without one is described by its docstring alone.
PAGES = {
    "activation-patching": "patching.md",
    "alignment-scan": "bias-scans.md",
    "attribution": "attribution.md",
    "bias-scan": "bias-scans.md",
    "capture": "capture.md",
    "causal-tracing": "causal-tracing.md",
    "contrast": "contrast.md",
    "direction": "direction.md",
    "lens": "lenses.md",
    "logit-attribution": "lenses.md",
    "mean-activations": "contrast.md",
    "patchscope": "patchscopes.md",
    "path-patching": "path-patching.md",
    "steering": "steering.md",
}


def recipe_reference() -> str:
    """The page: keys that all kinds share, the keys of each kind, then the mappings that these take."""
    schema = recipe_schema(RECIPES)
    defs: dict[str, Any] = schema["$defs"]
    shared = [*Recipe.model_fields, *(key for key in schema["properties"] if key != "kind")]
    any_kind = defs[RECIPES[next(iter(RECIPES))].__name__]["properties"]
    common = {key: schema["properties"].get(key, any_kind[key]) for key in shared}
    parts = [INTRO, "## Keys of every recipe\n", _table(common, required=["kind"])]
    used: dict[str, None] = dict.fromkeys(name for key in shared for name in references(any_kind[key]))
    for kind, recipe in RECIPES.items():
        entry = defs[recipe.__name__]
        own = {
            key: value
            for key, value in entry["properties"].items()
            if key not in shared or (key != "kind" and value != any_kind[key])
        }
        more = f" See [{title(PAGES[kind])}]({PAGES[kind]})." if kind in PAGES else ""
        needed = entry.get("then", entry).get("required", [])
        parts += [f"## {kind}\n", _text(entry.get("description", "")) + more + "\n", _table(own, needed)]
        used |= dict.fromkeys(name for value in own.values() for name in references(value))
    parts.append("## Mappings\n")
    shown: set[str] = set()
    while left := [name for name in used if name not in shown]:
        for name in left:
            shown.add(name)
            used |= dict.fromkeys(references(defs[name].get("properties", {})))
    for name in sorted(shown):
        entry = defs[name]
        table = _table(entry["properties"], entry.get("required", [])) if "properties" in entry else _type(entry)
        parts += [f"### {name}\n", _text(entry.get("description", "")) + "\n", table]
    return "\n".join(parts)


def title(page: str) -> str:
    """The title of a page of docs/."""
    return (DOCS / page).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def references(schema: Any) -> Iterator[str]:
    """The names of the definitions that a part of a schema refers to."""
    if isinstance(schema, Mapping):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def _table(properties: Mapping[str, Any], required: list[str]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, value in properties.items():
        cells = [f"`{key}`", _type(value), _default(value, key in required), _text(value.get("description", ""))]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(value: Mapping[str, Any], needed: bool) -> str:
    if needed:
        return "needed"
    if "default" not in value or value["default"] is None:
        return ""
    if isinstance(value["default"], dict) and value["default"]:
        return "the mapping's own defaults"
    return f"`{json.dumps(value['default'], ensure_ascii=False)}`"


def _type(schema: Mapping[str, Any]) -> str:
    """A part of a schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key]))
    if "allOf" in schema:
        return " and ".join(_type(one) for one in schema["allOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return "list of " + ", ".join(_type(one) for one in schema["prefixItems"])
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {_type(inner)}" if isinstance(inner, Mapping) else "mapping"
    words = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema)
    return words.get(str(kind), "anything") + (f" ({limits})" if limits else "")


def _text(text: str) -> str:
    """A docstring in one line. Outside code it is plain text, not Markdown: brackets and stars stand for themselves."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\[\]*<>_])", r"\\\1", part) for part in parts)
