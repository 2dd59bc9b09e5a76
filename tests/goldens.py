"""Goldens: what every kind of experiment gives today, kept as data, so that a change of the code is seen to change nothing.

    python tests/goldens.py --check [NAME...]    compare; exit code 1 where anything differs
    python tests/goldens.py --write [NAME...]    keep what the code gives now (a deliberate change: its own commit, with the reason)
    python tests/goldens.py --show NAME...       print what is kept
    python tests/goldens.py --list               the names

An entry (`golden_cases.py`) is a recipe run by `nsp run`, as a user runs it, or a door of `nsp.experiments` that is called once.
Shipped recipes are reduced where they are long. Kept of each run, in ``tests/goldens/NAME.json.gz``:

- the plan hash (the digest of kind, model and statement), the resolved recipe, seeds, the model's hashes, the number of units of
  work, the headline;
- of every group its attributes, and of every variable its dims, dtype, attributes and values. An array of more than 256 values
  keeps a fixed subsample of about 128 of them, its sum and norm in float64 and the count of values that are not finite; of texts
  and integers also a SHA-256 of all of them;
- what `nsp show` prints, and the tables of `nsp export --csv` where the kind has some.

Floats may differ by what the order of float32 operations changes: `RELATIVE` of a value, `OF_SCALE` of the variable's largest one,
and `FLOOR`, since an effect is a difference of logits of order ten (`PROBABILITY_FLOOR` for probabilities, which may be small).
Everything else must be equal, but that recipes may get keys, which are unset here. Left out is what differs between machines:
paths, versions, times, devices.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import nsp

sys.path.insert(0, str(Path(__file__).parent))

from golden_cases import CASES, Door, make_files

from nsp.cli.app import main as nsp_command
from nsp.experiments import EXPERIMENTS
from nsp.stores import open_run

DATA = Path(__file__).with_name("goldens")
RELATIVE, OF_SCALE, FLOOR, PROBABILITY_FLOOR = 1e-4, 1e-5, 5e-6, 1e-9
_MOST_VALUES, _SAMPLED = 256, 128
_HEADER = ("kind", "plan_hash", "recipe_resolved", "model", "seeds", "units", "state")
_MACHINE = {"device", "out", "backend", "bytes", "created_at", "versions"}
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


# What is kept


def record(name: str) -> dict[str, Any]:
    """Run an entry in the working directory and describe what came of it as plain data."""
    case = CASES[name]
    if isinstance(case, Door):
        with _quiet():
            return _plain(_described(case.call(_model)))
    store = f"{name}.zarr"
    words = ("run", case.recipe_argument(name), *case.settings(), "--device", "cpu", "--out", store, "--no-progress", "--force")
    if case.refused:
        return _plain({"error": _command(*words, refused=True)})
    _command(*words)
    kept = {"run": _tree(open_run(store).tree), "show": _show(store)}
    if case.tables:
        _command("export", store, "--csv", f"{name}-tables")
        paths = sorted(Path(f"{name}-tables").iterdir())
        kept["tables"] = {path.name: _shortened(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return _plain(kept)


@functools.cache
def _model(name: str) -> Any:
    return nsp.load(name, device="cpu", dtype="float32")


def _command(*words: str, refused: bool = False) -> str:
    """What an nsp command prints, which must end well; or its errors, where it must be ``refused``."""
    with _quiet() as (out, err):
        code = nsp_command(words)
    if code != (2 if refused else 0):
        raise RuntimeError(f"nsp {' '.join(words)} ended with {code}:\n{err.getvalue()}")
    return err.getvalue() if refused else out.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield out, err


def _show(store: str) -> list[str]:
    """What `nsp show` prints, without runs of blanks and rules, which follow the width of numbers."""
    lines = [" ".join(line.split()) for line in _command("show", store).replace("─", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("results: ")]


def _shortened(lines: list[str]) -> dict[str, Any]:
    chosen = _chosen(len(lines))
    return {"lines": len(lines), "text": lines if chosen is None else [lines[0], *(lines[place] for place in chosen)]}


def _described(value: Any) -> Any:
    """Anything that a door returns, as plain data."""
    if isinstance(value, xr.DataTree):
        said = str(value.nsp.report()).splitlines() if value.attrs.get("kind") in EXPERIMENTS else []
        tree = _tree(value)
        tree.pop("recipe_resolved", None)  # what a door leaves to the defaults is its own matter; the plan hash has what counts
        return {"run": tree, "show": [" ".join(line.split()) for line in said if line.strip()]}
    if isinstance(value, xr.Dataset):
        return {"dataset": _group(value)}
    if isinstance(value, xr.DataArray):
        return {"array": _group(value.to_dataset(name=value.name or "value"))}
    if isinstance(value, Mapping):
        return {str(key): _described(one) for key, one in value.items()}
    if hasattr(value, "detach"):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return _variable(xr.Variable([f"dim_{axis}" for axis in range(value.ndim)], value))
    if isinstance(value, tuple | list):
        return [_described(one) for one in value]
    return value


def _tree(tree: xr.DataTree) -> dict[str, Any]:
    kept: dict[str, Any] = {key: tree.attrs[key] for key in _HEADER if key in tree.attrs}
    kept["headline"] = tree.attrs.get("extra", {}).get("headline")
    kept["groups"] = {node.path: _group(node.to_dataset(inherit=False)) for node in tree.subtree if node.path != "/"}
    return kept


def _group(dataset: xr.Dataset) -> dict[str, Any]:
    variables = {str(name): {"is": "coordinate", **_variable(value.variable)} for name, value in dataset.coords.items()}
    variables |= {str(name): {"is": "variable", **_variable(value.variable)} for name, value in dataset.data_vars.items()}
    return {"attrs": dict(dataset.attrs), "variables": dict(sorted(variables.items()))}


def _variable(variable: xr.Variable) -> dict[str, Any]:
    values = np.asarray(variable.values)
    kind = "text" if values.dtype.kind in "OUT" else values.dtype.name
    kept: dict[str, Any] = {"dims": list(map(str, variable.dims)), "shape": list(values.shape), "dtype": kind, "attrs": dict(variable.attrs)}
    flat = values.reshape(-1)
    chosen = _chosen(flat.size)
    sample = flat if chosen is None else flat[chosen]
    if values.dtype.kind != "f":
        kept["values"] = [str(one) for one in sample] if kind == "text" else sample.tolist()
        if chosen is not None:
            everything = json.dumps([str(one) for one in flat] if kind == "text" else flat.tolist())
            kept["sha256"] = hashlib.sha256(everything.encode()).hexdigest()
        return kept
    wide = flat.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    kept["scale"] = float(np.abs(finite).max(initial=0.0))
    if chosen is not None:
        kept["all"] = {"finite": finite.size, "sum": float(finite.sum()), "norm": float(np.sqrt(np.square(finite).sum()))}
    kept["values"] = sample.astype(np.float64).tolist()
    return kept


def _chosen(size: int) -> np.ndarray | None:
    """Which places of a long array are kept: the ends and a fixed spread over all of it; None for a short one, kept whole."""
    if size <= _MOST_VALUES:
        return None
    spread = (np.arange(1, _SAMPLED, dtype=np.uint64) * np.uint64(2654435761)) % np.uint64(size)
    return np.unique(np.concatenate([spread.astype(np.int64), [0, size - 1]]))


def _plain(value: Any) -> Any:
    """As JSON has it, with seven digits a float and no path of this machine."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items() if key not in _MACHINE}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    if isinstance(value, str | Path):
        return str(value).replace(os.getcwd(), "<here>").replace(str(Path(nsp.__file__).parents[1]), "<repository>")
    return value if isinstance(value, int | bool | type(None)) else str(value)


# How two are compared


def differences(golden: Any, found: Any, place: str = "") -> list[str]:
    """What differs between what is kept and what is found, a line for each, by name."""
    if isinstance(golden, dict) and isinstance(found, dict):
        if "shape" in golden and "shape" in found and "scale" in golden:
            return _array_differences(golden, found, place)
        lines = [f"{_under(place, key)} is gone" for key in golden if key not in found]
        lines += [f"{_under(place, key)} is new" for key in found if key not in golden and not _unset(place, found[key])]
        for key in golden:
            if key in found:
                lines += differences(golden[key], found[key], _under(place, key))
        return lines
    if isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            lost = [one for one in golden if one not in found]
            new = [one for one in found if one not in golden]
            return [f"{place}: {len(golden)} entries are {len(found)} now; without {_brief(lost)}, with {_brief(new)}"]
        lines = [line for index, pair in enumerate(zip(golden, found, strict=True)) for line in differences(*pair, f"{place}[{index}]")]
        return lines if len(lines) <= 6 else [*lines[:5], f"{place}: and {len(lines) - 5} more"]
    if isinstance(golden, str) and isinstance(found, str):
        return [] if _same_text(golden, found) else [f"{place}: {golden!r} is {found!r} now"]
    if isinstance(golden, float) and isinstance(found, float | int) and not isinstance(found, bool):
        same = abs(golden - found) <= RELATIVE * abs(golden) + FLOOR
        return [] if same else [f"{place}: {golden} is {found} now"]
    return [] if type(golden) is type(found) and golden == found else [f"{place}: {golden!r} is {found!r} now"]


def _unset(place: str, value: Any) -> bool:
    """A recipe may have got a key since, which this one leaves unset."""
    return "recipe_resolved" in place and value in (None, [], {})


def _under(place: str, key: str) -> str:
    """Groups and variables by their path in the store."""
    if key in ("run", "groups", "variables"):
        return place
    return f"{place.rstrip('/')}/{key.lstrip('/')}" if place else key.lstrip("/")


def _brief(values: Sequence[Any]) -> str:
    shown = ", ".join(map(repr, values[:3]))
    return (shown or "nothing") + (f" and {len(values) - 3} more" if len(values) > 3 else "")


def _array_differences(golden: dict[str, Any], found: dict[str, Any], place: str) -> list[str]:
    numbers = ("scale", "values", "all")
    lines = differences(*({key: one[key] for key in one if key not in numbers} for one in (golden, found)), place)
    if lines and (golden["shape"] != found["shape"] or golden["dtype"] != found["dtype"]):
        return lines
    scale, floor = golden["scale"], PROBABILITY_FLOOR if re.search(r"(?<!log)prob", place.rpartition("/")[2]) else FLOOR
    before, now = (np.array(one["values"], dtype=np.float64) for one in (golden, found))
    with np.errstate(invalid="ignore"):
        off = ~np.isclose(now, before, rtol=RELATIVE, atol=OF_SCALE * scale + floor, equal_nan=True)
    if off.any():
        worst = int(np.nanargmax(np.where(off, np.nan_to_num(np.abs(now - before), nan=np.inf), -1.0)))
        lines.append(
            f"{place}: {int(off.sum())} of {off.size} values differ (scale {scale:.3g}); number {worst} was {before[worst]:.7g}, is {now[worst]:.7g}"
        )
    if "all" in golden and "all" in found:
        old, new = golden["all"], found["all"]
        if old["finite"] != new["finite"]:
            lines.append(f"{place}: {old['finite']} values were finite, {new['finite']} are now")
        elif abs(old["norm"] - new["norm"]) > RELATIVE * old["norm"] + floor:
            lines.append(f"{place}: the norm of all values was {old['norm']:.7g}, is {new['norm']:.7g}")
        elif abs(old["sum"] - new["sum"]) > RELATIVE * old["norm"] + floor * old["finite"]:
            lines.append(f"{place}: the sum of all values was {old['sum']:.7g}, is {new['sum']:.7g}")
    return lines


def _same_text(golden: str, found: str) -> bool:
    """Equal but for the last printed digit of numbers that are no integers."""
    if golden == found:
        return True
    if _NUMBER.sub("#", golden) != _NUMBER.sub("#", found):
        return False
    return all(map(_same_number, _NUMBER.findall(golden), _NUMBER.findall(found)))


def _same_number(golden: str, found: str) -> bool:
    if golden == found:
        return True
    before, now = float(golden), float(found)
    if max(abs(before), abs(now)) <= FLOOR:
        return True
    digits = max(map(_step, (golden, found)))
    whole = all(re.fullmatch(r"[-+]?\d+", one) for one in (golden, found))
    return not whole and abs(before - now) <= 1.01 * digits + RELATIVE * abs(before)


def _step(number: str) -> float:
    """What one in the last digit of a printed number is."""
    mantissa, _, power = number.partition("e")
    return float(10.0 ** (int(power or 0) - len(mantissa.partition(".")[2])))


# The command


def path_of(name: str) -> Path:
    """Where an entry is kept."""
    return DATA / f"{name.replace(':', '.')}.json.gz"


def read(name: str) -> Any:
    """What is kept of an entry."""
    return json.loads(gzip.decompress(path_of(name).read_bytes()))


def write(name: str, kept: Any) -> None:
    """Keep an entry. Equal entries are equal files."""
    DATA.mkdir(exist_ok=True)
    text = json.dumps(kept, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    path_of(name).write_bytes(gzip.compress(text.encode(), mtime=0))


def check(name: str) -> list[str]:
    """How an entry differs from what is kept of it, a line each; the working directory has `make_files`'s files."""
    if not path_of(name).exists():
        return ["nothing is kept of it: --write"]
    try:
        found = json.loads(json.dumps(record(name)))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return [f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {error}"]
    return differences(read(name), found)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A temporary working directory with the tiny models and the files that entries name."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="goldens-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        try:
            with _quiet():
                make_files(Path(folder))
            yield Path(folder)
        finally:
            os.chdir(before)
            _model.cache_clear()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description="What every kind of experiment gives, kept as data.")
    what = parser.add_mutually_exclusive_group(required=True)
    for option, meaning in (("check", "compare"), ("write", "keep what the code gives now"), ("show", "print what is kept"), ("list", "names")):
        what.add_argument(f"--{option}", action="store_true", help=meaning)
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries, or beginnings of their names; by default all")
    given = parser.parse_args(arguments)
    names = [name for name in CASES if not given.names or any(_named(name, one) for one in given.names)]
    if not names:
        parser.error(f"no entry {', '.join(given.names)}; --list names them")
    if given.list:
        print("\n".join(names))
        return 0
    if given.show:
        print(json.dumps({name: read(name) for name in names}, ensure_ascii=False, indent=1))
        return 0
    failed = 0
    with workplace():
        for name in names:
            began, used = time.monotonic(), time.process_time()
            lines = _kept(name) if given.write else check(name)
            failed += bool(lines)
            verdict = ("not written" if lines else "written") if given.write else ("differs" if lines else "as kept")
            spent = f"{time.monotonic() - began:.1f} s, {time.process_time() - used:.1f} s of it computing"
            print(f"{name}: {verdict} ({spent})", flush=True)
            for line in lines:
                print(f"  {name}: {line}", flush=True)
    return 1 if failed else 0


def _named(name: str, given: str) -> bool:
    return name == given if given in CASES else name.startswith(given)


def _kept(name: str) -> list[str]:
    try:
        write(name, record(name))
    except Exception:
        return traceback.format_exc().splitlines()
    return []


if __name__ == "__main__":
    sys.exit(main())
