"""The JSON schema of recipe files, generated from the recipe classes.

An editor checks and completes a recipe whose first line is ``# yaml-language-server: $schema=<this schema>``. The
schema is a union over ``kind``. Keys that a recipe needs may come from the one it extends, or from its matrix, so they
are only required of a file without either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from nsp.recipe import Recipe

_FILE_KEYS: Mapping[str, Any] = {
    "extends": {
        "type": "string",
        "title": "Extends",
        "description": "Build on another recipe: a path beside this file, or the name of a shipped recipe.",
    },
    "matrix": {
        "type": "object",
        "title": "Matrix",
        "description": "Run every combination of the listed values, by (dotted) key.",
        "additionalProperties": {"type": "array", "minItems": 1},
    },
}


def recipe_schema(kinds: Mapping[str, type[Recipe]]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file of any of `kinds`."""
    references, definitions = models_json_schema([(recipe, "validation") for recipe in kinds.values()])
    defs = definitions["$defs"]
    union = []
    for kind, recipe in kinds.items():
        reference = references[recipe, "validation"]["$ref"]
        schema = defs[reference.rpartition("/")[2]]
        schema["properties"] |= _FILE_KEYS
        needed = [key for key in schema.pop("required", []) if key != "kind"]
        if needed:
            alone = {"not": {"anyOf": [{"required": ["extends"]}, {"required": ["matrix"]}]}}
            schema |= {"if": alone, "then": {"required": needed}}
        union.append(
            {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": {"$ref": reference}}
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nsp recipe",
        "type": "object",
        "properties": {"kind": {"enum": list(kinds), "description": "Which experiment this is."}, **_FILE_KEYS},
        "anyOf": [{"required": ["kind"]}, {"required": ["extends"]}],
        "allOf": union,
        # A file without kind takes it from the recipe it extends; then any kind's keys may be meant.
        "if": {"not": {"required": ["kind"]}},
        "then": {"anyOf": [{"$ref": references[recipe, "validation"]["$ref"]} for recipe in kinds.values()]},
        "$defs": defs,
    }


def schema_text(kinds: Mapping[str, type[Recipe]]) -> str:
    """`recipe_schema` as JSON text, the same for the same classes."""
    return json.dumps(recipe_schema(kinds), indent=2, ensure_ascii=False) + "\n"
