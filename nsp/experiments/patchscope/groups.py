"""The groups of a patchscope's store: what every cell and every run without a patch is measured by, and the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.experiments.labels import (
    Group,
    Variable,
    given_variable,
    index_coord,
    prompt_text,
    text_array,
    text_coord,
    token_table,
)
from nsp.experiments.patchscope.grid import Grid
from nsp.experiments.patchscope.match import CLASSES
from nsp.experiments.patchscope.sources import Row, Source, Target

CELL = ("prompt", "layer", "target_layer")
PATCH = "patch"
_FIRST = "float64 softmax of the logits after the prompt"
_CLASSES = ", ".join(f"{number} {name}" for number, name in enumerate(CLASSES))
_MATCHED = "phrases found as whole words in the text up to the template's separator, without case, accents and punctuation"
_FORCED = "sum over the answer's tokens, each given the prompt and the answer so far (teacher forcing)"
_PHASE = "when the cell ran: 0 in the grid, 1 refined around a hotspot, 2 compared over templates, -1 not at all"


def text_name(variant: str) -> str:
    """The variable of ``generations`` that holds a variant's texts."""
    return "text" if variant == PATCH else f"text_{variant}"


def result_groups(
    labels: Mapping[str, xr.Variable], grid: Grid, variants: Sequence[str], steps: int, top: int, *, with_map: bool
) -> dict[str, Group]:
    """What is computed, blank. ``labels`` are the coordinates of the dim prompt (see `row_labels`)."""
    coords = {
        **labels,
        "layer": index_coord("layer", grid.layers, "source layer: its resid_post is read"),
        "target_layer": index_coord("target_layer", grid.target_layers, "target layer: its resid_post is replaced"),
        "step": index_coord("step", steps, "generated token, from 0"),
        "token": index_coord("token", top, "place among the most likely tokens, 0 the first"),
    }

    def group(variables: dict[str, Variable]) -> Group:
        used = {dim for variable in variables.values() for dim in variable.dims}
        return Group(variables, {name: coord for name, coord in coords.items() if coord.dims[0] in used})

    alone, likely, written = ("prompt",), (*CELL, "token"), (*CELL, "step")
    unpatched, patched = "generated without a patch", "generated under the patch"
    texts = {text_name(name): Variable(CELL, f"generated text, {name}", "1", patched, object) for name in variants}
    norm = "norm of the residual stream"
    groups = {
        "baseline": group(
            {
                **_measured(alone),
                "text": Variable(alone, "generated text without a patch", "1", unpatched, object),
                "token_id": Variable(("prompt", "step"), "its token ids (-1: after the end)", "1", unpatched, np.int32),
            }
        ),
        "generations": group(
            {"token_id": Variable(written, "generated token ids (-1: after the end)", "1", patched, np.int32), **texts}
        ),
        **{f"effects/{variant}": group(_measured(CELL)) for variant in variants},
        f"effects/{PATCH}": group(
            {
                **_measured(CELL),
                "first_top_id": Variable(likely, "most likely first tokens", "1", _FIRST, np.int32),
                "first_top_prob": Variable(likely, "their probability", "1", _FIRST),
                "phase": Variable(CELL, _PHASE, "1", "the recipe's preset", np.int8),
            }
        ),
        "receipts/patch": group(
            {
                "vector_norm": Variable(CELL, "norm of the vector put in", norm, "L2"),
                "change_norm": Variable(CELL, "norm of the change it makes at the placeholder", norm, "L2"),
            }
        ),
    }
    if with_map:
        method = "ridge regression on map.prompts, judged on every fifth text"
        explained = "variance of held-out target values that the map explains"
        groups["receipts/map"] = group({"r2": Variable(("layer", "target_layer"), explained, "1", method)})
    return groups


def _measured(at: tuple[str, ...]) -> dict[str, Variable]:
    """What is measured of every run, patched or not."""
    return {
        "match": Variable(at, f"match of the text: {_CLASSES}, -1 not judged", "1", _MATCHED, np.int8),
        "score": Variable(at, "log-probability of the expected answer", "nat", _FORCED),
        "first_entropy": Variable(at, "entropy of the first token's distribution", "nat", _FIRST),
        "first_logprob": Variable(at, "log-probability of the answer's first token as the first token", "nat", _FIRST),
        "first_rank": Variable(
            at, "tokens more likely than the answer's first one (-1: no answer)", "1", _FIRST, np.int32
        ),
    }


def row_labels(rows: Sequence[Row], sources: Sequence[Source], targets: Sequence[Target]) -> dict[str, xr.Variable]:
    """The coordinates of the dim prompt, whose entries are sources read into templates."""
    return {
        "source": text_coord("prompt", [sources[row.source].name for row in rows], "name of the source"),
        "kind": text_coord("prompt", [sources[row.source].entity.kind for row in rows], "kind of the source's entity"),
        "template": text_coord("prompt", [targets[row.target].template.name for row in rows], "name of the target prompt"),
        "prompt": index_coord("prompt", len(rows), "a source read into a template"),
    }


def inputs_dataset(rows: Sequence[Row], all_sources: Sequence[Source], all_targets: Sequence[Target]) -> xr.Dataset:
    """What is read where, what it is put into, and what is expected of the text: dims (prompt,) and (prompt, position)."""
    sources = [all_sources[row.source] for row in rows]
    targets = [all_targets[row.target] for row in rows]
    unrelated = [all_sources[row.unrelated] for row in rows]
    width = max(len(prompt) for prompt in (*(source.prompt for source in sources), *(target.prompt for target in targets)))
    ids, texts = token_table([source.prompt for source in sources], width)
    target_ids, target_texts = token_table([target.prompt for target in targets], width)
    columns: dict[str, tuple[str, Any]] = {
        "text": ("prompt", [prompt_text(source.prompt) for source in sources]),
        "n_tokens": ("length of the prompt in tokens", [len(source.prompt) for source in sources]),
        "token_id": ("token ids (-1: none)", ids),
        "token_text": ("tokens of the source prompt", texts),
        "source_position": ("position read", [source.position for source in sources]),
        "source_token": ("token read", [source.token for source in sources]),
        "target_text": ("target prompt", [target.template.prompt for target in targets]),
        "placeholder": ("position of the placeholder in the target prompt", [target.position for target in targets]),
        "separator": ("where an answer ends", [target.template.separator for target in targets]),
        "answer": ("expected continuation", [row.answer_text for row in rows]),
        "strong": ("phrases of a strong match", [_phrases(row, 0) for row in rows]),
        "partial": ("phrases of a partial match", [_phrases(row, 1) for row in rows]),
        "unrelated": ("the source of the unrelated control", [source.name for source in unrelated]),
        "unrelated_text": ("its prompt", [prompt_text(source.prompt) for source in unrelated]),
        "target_token_id": ("token ids of the target prompt (-1: none)", target_ids),
        "target_token_text": ("tokens of the target prompt", target_texts),
    }
    variables = {}
    for name, (meaning, values) in columns.items():
        array = text_array(values) if isinstance(values[0], str) else np.asarray(values)
        variables[name] = given_variable(("prompt", "position")[: array.ndim], array, meaning)
    coords = {**row_labels(rows, all_sources, all_targets), "position": index_coord("position", width, "position")}
    return xr.Dataset(variables, coords)


def _phrases(row: Row, which: int) -> str:
    if row.expected is None:
        return ""
    return "; ".join((row.expected.strong, row.expected.partial)[which])
