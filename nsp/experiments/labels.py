"""Labels of results: blank groups of a store, coordinates, and the ``inputs`` that every experiment writes alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.errors import NspError

_GIVEN = {"units": "1", "method": "given, encoded by the model's tokenizer"}


@dataclass(frozen=True)
class Variable:
    """One array of results: dims, meaning, unit and dtype.

    Attributes:
        dims: names from the closed list of dims; their lengths are those of the group's coordinates.
        long_name: what a value means.
        units: its unit; ``1`` where it has none.
        method: how a value is made.
        dtype: of the values. Until they are computed, fractions are NaN, whole numbers -1 and texts empty.
        store_dtype: the dtype on disk, for a variable that must not follow the run's own ``store_dtype``.
    """

    dims: tuple[str, ...]
    long_name: str
    units: str = "1"
    method: str = ""
    dtype: npt.DTypeLike = np.float32
    store_dtype: str | None = None

    @property
    def blank(self) -> Any:
        """The value of a cell that is not computed."""
        kind = np.dtype(self.dtype).kind
        return np.asarray(np.nan if kind == "f" else -1, self.dtype) if kind in "fi" else ""

    def unfilled(self, shape: Sequence[int]) -> xr.Variable:
        """The variable with nothing computed; the array takes no memory (it is broadcast and read-only)."""
        attrs = {"long_name": self.long_name, "units": self.units, "method": self.method}
        encoding = {} if self.store_dtype is None else {"dtype": self.store_dtype}
        blank = np.empty((), dtype=object if np.dtype(self.dtype).kind in "OU" else self.dtype)
        blank[()] = self.blank
        return xr.Variable(self.dims, np.broadcast_to(blank, tuple(shape)), attrs, encoding)


@dataclass(frozen=True)
class Group:
    """One group of a store before anything is computed: its variables, the coordinates of their dims, and attributes."""

    variables: Mapping[str, Variable]
    coords: Mapping[str, xr.Variable]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each dim."""
        return {str(dim): size for coord in self.coords.values() for dim, size in coord.sizes.items()}

    def blank(self) -> xr.Dataset:
        """The group as a dataset with all labels and no result."""
        sizes = self.sizes
        unfilled = {
            name: variable.unfilled([sizes[dim] for dim in variable.dims]) for name, variable in self.variables.items()
        }
        return xr.Dataset(unfilled, dict(self.coords), dict(self.attrs))

    def filled(self, values: Mapping[str, Any]) -> xr.Dataset:
        """The group as a dataset that holds ``values``, by variable; what they do not name stays blank."""
        blank = self.blank()
        arrays = {name: (blank[name].variable, value) for name, value in values.items()}
        return blank.assign(
            {
                name: variable.copy(data=fitted(value, variable.shape, variable, name))
                for name, (variable, value) in arrays.items()
            }
        )


def fitted(values: Any, shape: Sequence[int], blank: xr.Variable, what: str) -> np.ndarray:
    """``values`` in the dtype of ``blank``, filled up with its blank value to ``shape`` where prompts are shorter.

    Raises NspError where the values have other dims, or reach beyond ``shape``.
    """
    array = np.asarray(values)
    if array.ndim != len(shape) or any(size > most for size, most in zip(array.shape, shape, strict=True)):
        expected = ", ".join(f"{dim} {size}" for dim, size in zip(blank.dims, shape, strict=True))
        raise NspError(f"{what}: computed with shape {array.shape}; expected at most ({expected})")
    dtype = blank.dtype
    empty: Any = blank.values.flat[0] if blank.size else None
    if dtype.kind in "iu" and array.dtype.kind == "f":
        array = np.where(np.isnan(array), empty, array)
    if array.shape == tuple(shape):
        return array.astype(dtype, copy=False)
    padded = np.full(tuple(shape), empty, dtype=dtype)
    padded[tuple(slice(0, size) for size in array.shape)] = array
    return padded


def index_coord(dim: str, values: Any, long_name: str) -> xr.Variable:
    """An integer coordinate of one dim; ``values`` are its labels, or how many there are from 0."""
    labels = np.arange(values) if isinstance(values, int) else np.asarray(values, dtype=np.int64)
    return xr.Variable((dim,), labels, {"long_name": long_name})


def text_coord(dim: str, texts: Sequence[str], long_name: str) -> xr.Variable:
    """A coordinate of texts along one dim."""
    return xr.Variable((dim,), text_array(texts), {"long_name": long_name})


def text_array(texts: Sequence[str]) -> np.ndarray:
    """Texts as an object array with one axis, as stores keep them."""
    array = np.empty(len(texts), dtype=object)
    array[:] = list(texts)
    return array


def given_variable(dims: Sequence[str], values: Any, long_name: str, method: str = _GIVEN["method"]) -> xr.Variable:
    """A variable of ``inputs``: known before anything runs."""
    return xr.Variable(tuple(dims), values, {"long_name": long_name, "units": "1", "method": method})


def token_table(prompts: Sequence[Prompt], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (-1: none) and token texts of prompts, each (prompt, position) with ``width`` positions."""
    ids = np.full((len(prompts), width), -1, dtype=np.int64)
    texts = np.full((len(prompts), width), "", dtype=object)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt.token_ids
        texts[row, : len(prompt)] = prompt.token_texts
    return ids, texts


def prompt_text(prompt: Prompt) -> str:
    """The prompt as it was written, or as its tokens read."""
    return prompt.text if prompt.text is not None else "".join(prompt.token_texts)


def prompts_dataset(
    prompts: Sequence[Prompt], *, dim: str = "prompt", names: Sequence[str] | None = None
) -> xr.Dataset:
    """Prompts as a Dataset.

    Variables ``text`` and ``name`` with dims (dim), ``n_tokens`` (dim), ``token_id`` (-1: none) and ``token_text`` with
    dims (dim, position). ``dim`` is ``prompt`` or ``pair``.
    """
    count, width = len(prompts), max((len(prompt) for prompt in prompts), default=0)
    ids, texts = token_table(prompts, width)
    labels = list(names) if names is not None else [f"{dim} {number}" for number in range(count)]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    variables = {
        "text": given_variable((dim,), text_array([prompt_text(prompt) for prompt in prompts]), "prompt"),
        "name": given_variable((dim,), text_array(labels), f"name of the {dim}"),
        "n_tokens": given_variable((dim,), lengths, "length of the prompt in tokens"),
        "token_id": given_variable((dim, "position"), ids, "token ids (-1: none)"),
        "token_text": given_variable((dim, "position"), texts, "tokens of the prompt"),
    }
    coords = {dim: index_coord(dim, count, f"{dim}, from 0"), "position": index_coord("position", width, "position")}
    return xr.Dataset(variables, coords)
