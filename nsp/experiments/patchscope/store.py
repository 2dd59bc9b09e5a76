"""The store of a patchscope run: its groups, dims, labels and attributes, with results blank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.experiments.labels import index_coord, prompts_dataset, text_array
from nsp.experiments.patchscope.match import CLASSES
from nsp.experiments.patchscope.sources import Row, Source, Target

CELL = ("prompt", "layer", "target_layer")
PATCH = "patch"
_GIVEN = {"units": "1", "method": "given, encoded by the model's tokenizer"}
_FIRST = "float64 softmax of the logits after the prompt"
_MATCH = {
    "long_name": "match of the text: "
    + ", ".join(f"{number} {name}" for number, name in enumerate(CLASSES))
    + ", -1 not judged",
    "units": "1",
    "method": "phrases found as whole words in the text up to the template's separator, without case, accents and punctuation",
}
_SCORE = {
    "long_name": "log-probability of the expected answer",
    "units": "nat",
    "method": "sum over the answer's tokens, each given the prompt and the answer so far (teacher forcing)",
}


@dataclass(frozen=True)
class Layout:
    """What the dims of a run are labelled with."""

    rows: tuple[Row, ...]
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    variants: tuple[str, ...]
    steps: int
    top: int


def measured(dims: Sequence[str]) -> dict[str, tuple[tuple[str, ...], Any, dict[str, str]]]:
    """What is measured of every run, patched or not: variable -> (dims, dtype, attributes)."""
    at = tuple(dims)
    return {
        "match": (at, np.int8, _MATCH),
        "score": (at, np.float32, _SCORE),
        "first_entropy": (at, np.float32, {"long_name": "entropy of the first token's distribution", "units": "nat", "method": _FIRST}),
        "first_logprob": (
            at, np.float32, {"long_name": "log-probability of the answer's first token as the first token", "units": "nat", "method": _FIRST},
        ),
        "first_rank": (
            at, np.int32, {"long_name": "tokens more likely than the answer's first one (-1: no answer)", "units": "1", "method": _FIRST},
        ),
    }  # fmt: skip


def template(layout: Layout, *, with_map: bool) -> xr.DataTree:
    """All groups, inputs filled and results blank."""
    tree = {"inputs": _inputs(layout), "baseline": _baseline(layout), "generations": _generations(layout)}
    for variant in layout.variants:
        tree[f"effects/{variant}"] = _effects(layout, variant)
    tree["receipts/patch"] = _receipts(layout)
    if with_map:
        attrs = {
            "long_name": "variance of held-out target values that the map explains",
            "units": "1",
            "method": "ridge regression on map.prompts, judged on every fifth text",
        }
        coords = {dim: coord for dim, coord in _coords(layout).items() if dim in ("layer", "target_layer")}
        blank = np.full((len(layout.layers), len(layout.target_layers)), np.nan, np.float32)
        tree["receipts/map"] = xr.Dataset({"r2": (("layer", "target_layer"), blank, attrs)}, coords)
    return xr.DataTree.from_dict(tree)


def blank(dims: Sequence[str], dtype: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """An array in which nothing has run: NaN, -1 or no text."""
    shape = tuple(sizes[dim] for dim in dims)
    if dtype is object:
        return np.full(shape, "", dtype=object)
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -1, dtype=dtype)


def effect_variables(variant: str) -> dict[str, tuple[tuple[str, ...], Any, dict[str, str]]]:
    """The variables of ``effects/<variant>``."""
    found = measured(CELL)
    if variant == PATCH:
        place = (*CELL, "token")
        found["first_top_id"] = (
            place,
            np.int32,
            {"long_name": "most likely first tokens", "units": "1", "method": _FIRST},
        )
        found["first_top_prob"] = (
            place,
            np.float32,
            {"long_name": "their probability", "units": "1", "method": _FIRST},
        )
        found["phase"] = (
            CELL,
            np.int8,
            {
                "long_name": "when the cell ran: 0 in the grid, 1 refined around a hotspot, 2 compared over templates, -1 not at all",
                "units": "1",
                "method": "the recipe's preset",
            },
        )
    return found


def generation_variables(variants: Sequence[str]) -> dict[str, tuple[tuple[str, ...], Any, dict[str, str]]]:
    """The variables of ``generations``."""
    how = {"units": "1", "method": "generated under the patch"}
    found: dict[str, tuple[tuple[str, ...], Any, dict[str, str]]] = {
        "token_id": ((*CELL, "step"), np.int32, {"long_name": "generated token ids (-1: after the end)", **how})
    }
    for variant in variants:
        name = "text" if variant == PATCH else f"text_{variant}"
        found[name] = (CELL, object, {"long_name": f"generated text, {variant}", **how})
    return found


def receipt_variables() -> dict[str, tuple[tuple[str, ...], Any, dict[str, str]]]:
    """The variables of ``receipts/patch``."""
    unit = {"units": "norm of the residual stream", "method": "L2"}
    return {
        "vector_norm": (CELL, np.float32, {"long_name": "norm of the vector put in", **unit}),
        "change_norm": (CELL, np.float32, {"long_name": "norm of the change it makes at the placeholder", **unit}),
    }


def baseline_variables() -> dict[str, tuple[tuple[str, ...], Any, dict[str, str]]]:
    """The variables of ``baseline``: the target prompt's run without a patch."""
    how = {"units": "1", "method": "generated without a patch"}
    found = measured(("prompt",))
    found["text"] = (("prompt",), object, {"long_name": "generated text without a patch", **how})
    found["token_id"] = (("prompt", "step"), np.int32, {"long_name": "its token ids (-1: after the end)", **how})
    return found


def _coords(layout: Layout) -> dict[str, xr.Variable]:
    rows = layout.rows
    labels = {
        "source": ("name of the source", [layout.sources[row.source].name for row in rows]),
        "kind": ("kind of the source's entity", [layout.sources[row.source].entity.kind for row in rows]),
        "template": ("name of the target prompt", [layout.targets[row.target].template.name for row in rows]),
    }
    found = {
        name: xr.Variable(("prompt",), text_array(texts), {"long_name": meaning})
        for name, (meaning, texts) in labels.items()
    }
    return found | {
        "prompt": index_coord("prompt", len(rows), "a source read into a template"),
        "layer": index_coord("layer", layout.layers, "source layer: its resid_post is read"),
        "target_layer": index_coord("target_layer", layout.target_layers, "target layer: its resid_post is replaced"),
        "step": index_coord("step", layout.steps, "generated token, from 0"),
        "token": index_coord("token", layout.top, "place among the most likely tokens, 0 the first"),
    }


def _dataset(layout: Layout, variables: Mapping[str, tuple[tuple[str, ...], Any, dict[str, str]]]) -> xr.Dataset:
    coords = _coords(layout)
    sizes = {name: len(coord) for name, coord in coords.items()}
    used = {dim for dims, _, _ in variables.values() for dim in dims}
    return xr.Dataset(
        {name: (dims, blank(dims, dtype, sizes), attrs) for name, (dims, dtype, attrs) in variables.items()},
        {name: coord for name, coord in coords.items() if coord.dims[0] in used},
    )


def _effects(layout: Layout, variant: str) -> xr.Dataset:
    return _dataset(layout, effect_variables(variant))


def _generations(layout: Layout) -> xr.Dataset:
    return _dataset(layout, generation_variables(layout.variants))


def _receipts(layout: Layout) -> xr.Dataset:
    return _dataset(layout, receipt_variables())


def _baseline(layout: Layout) -> xr.Dataset:
    return _dataset(layout, baseline_variables())


def _inputs(layout: Layout) -> xr.Dataset:
    sources = [layout.sources[row.source] for row in layout.rows]
    targets = [layout.targets[row.target] for row in layout.rows]
    unrelated = [layout.sources[row.unrelated] for row in layout.rows]
    found = prompts_dataset([source.prompt for source in sources], names=[source.name for source in sources])
    width = max(found.sizes["position"], max(len(target.prompt) for target in layout.targets))
    found = found[["text", "n_tokens"]].drop_vars("position", errors="ignore")
    source_ids, source_texts = _padded([source.prompt for source in sources], width)
    found["token_id"] = (("prompt", "position"), source_ids, {"long_name": "token ids (-1: none)", **_GIVEN})
    found["token_text"] = (("prompt", "position"), source_texts, {"long_name": "tokens of the source prompt", **_GIVEN})
    found = found.assign_coords(position=index_coord("position", width, "position"))
    ids, texts = _padded([target.prompt for target in targets], width)
    columns: dict[str, tuple[str, list[Any]]] = {
        "source_position": ("position read", [source.position for source in sources]),
        "source_token": ("token read", [source.token for source in sources]),
        "target_text": ("target prompt", [target.template.prompt for target in targets]),
        "placeholder": ("position of the placeholder in the target prompt", [target.position for target in targets]),
        "separator": ("where an answer ends", [target.template.separator for target in targets]),
        "answer": ("expected continuation", [row.answer_text for row in layout.rows]),
        "strong": ("phrases of a strong match", [_phrases(row, 0) for row in layout.rows]),
        "partial": ("phrases of a partial match", [_phrases(row, 1) for row in layout.rows]),
        "unrelated": ("the source of the unrelated control", [one.name for one in unrelated]),
        "unrelated_text": ("its prompt", [one.prompt.text or "".join(one.prompt.token_texts) for one in unrelated]),
    }
    for name, (meaning, values) in columns.items():
        array = text_array(values) if isinstance(values[0], str) else np.asarray(values, dtype=np.int64)
        found[name] = (("prompt",), array, {"long_name": meaning, **_GIVEN})
    found["target_token_id"] = (
        ("prompt", "position"),
        ids,
        {"long_name": "token ids of the target prompt (-1: none)", **_GIVEN},
    )
    found["target_token_text"] = (("prompt", "position"), texts, {"long_name": "tokens of the target prompt", **_GIVEN})
    labels = {name: coord for name, coord in _coords(layout).items() if coord.dims == ("prompt",)}
    return found.assign_coords(labels)


def _padded(prompts: Sequence[Prompt], width: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(prompts), width), -1, dtype=np.int64)
    texts = np.full((len(prompts), width), "", dtype=object)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt.token_ids
        texts[row, : len(prompt)] = prompt.token_texts
    return ids, texts


def _phrases(row: Row, which: int) -> str:
    if row.expected is None:
        return ""
    return "; ".join((row.expected.strong, row.expected.partial)[which])
