"""Texts that units of work fill: committed, masked, digested and resumed like numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from store_synthetic import ATTRS, PLAN, Unit, header

from nsp.errors import NspError
from nsp.stores import create_run, open_run, open_writer, validate

TEXTS = np.array([["a\nb", "é 🙂", ""], ["x\0y", "half \ud83d", "last"]], dtype=object)


def template() -> xr.DataTree:
    values = {"text": (("prompt", "layer"), np.full((2, 3), "", dtype=object), ATTRS),
              "match": (("prompt", "layer"), np.full((2, 3), -1, dtype=np.int8), ATTRS)}  # fmt: skip
    return xr.DataTree.from_dict({"generations": xr.Dataset(values, {"prompt": [0, 1], "layer": [0, 1, 2]})})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "texts.zarr"
    units = [Unit(number, {"generations": {"prompt": slice(number, number + 1)}}) for number in (0, 1)]
    create_run(path, template(), units, header=header())
    return path


def fill(path: Path, number: int, texts: Any = None) -> None:
    given = TEXTS[number : number + 1] if texts is None else texts
    with open_writer(path, PLAN) as writer, writer.claim(number) as claimed:
        assert claimed
        writer.write(number, {"generations": {"text": given, "match": np.ones((1, 3), dtype=np.int8)}})


def test_texts_are_returned_once_their_unit_is_committed(store: Path) -> None:
    fill(store, 0)
    read = open_run(store).tree["generations"]["text"]
    assert read.values.tolist() == [["a\nb", "é 🙂", ""], ["", "", ""]]
    assert open_run(store).pending == [1]
    fill(store, 1)
    # A lone surrogate is no text; it is kept as its escape.
    expected = [["a\nb", "é 🙂", ""], ["x\0y", "half \\ud83d", "last"]]
    assert open_run(store).tree["generations"]["text"].values.tolist() == expected
    assert open_run(store).tree["generations"]["text"].sel(prompt=1, layer=[2, 0]).values.tolist() == ["last", "x\0y"]
    plain = xr.open_datatree(store, engine="zarr", consolidated=False)
    assert plain["generations"]["text"].values.tolist() == expected
    assert validate(store, deep=True).ok


def test_a_damaged_text_is_found(store: Path) -> None:
    fill(store, 0)
    fill(store, 1)
    chunk = max(
        (path for path in (store / "generations" / "text").rglob("*") if path.is_file() and path.name != "zarr.json"),
        key=str,
    )
    chunk.write_bytes(chunk.read_bytes()[:-3] + b"abc")
    assert validate(store, deep=True).damaged_units == (1,)


def test_numbers_are_no_texts(store: Path) -> None:
    with pytest.raises(NspError, match="values given for a variable"):
        fill(store, 0, np.zeros((1, 3)))
