"""What a server says of itself: its models, their states, and the versions on both sides."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import httpx
from nnsight.schema.config import CONFIG

from nsp.backends.faults import fault_of
from nsp.backends.options import BackendOptions

# A difference in one of these can change numbers, or keep a job from being read.
PACKAGES = ("nnsight", "torch", "transformers", "tokenizers", "numpy")
_SECONDS = 20.0


@dataclass(frozen=True)
class ServedModel:
    """One model on a server: its name there, its revision, and how far it is (RUNNING, DEPLOYING, …; HOT, WARM, COLD)."""

    name: str
    revision: str
    state: str
    level: str


@dataclass(frozen=True)
class ServerStatus:
    """A server's answer; ``versions`` has (package, here, there)."""

    host: str
    models: tuple[ServedModel, ...]
    versions: tuple[tuple[str, str, str], ...]


def host_of(options: BackendOptions) -> str:
    """The server's address: from the options, else NDIF_HOST, else nnsight's own setting."""
    return options.host or os.environ.get("NDIF_HOST") or str(CONFIG.API.HOST)


def server_status(options: BackendOptions) -> ServerStatus:
    """Ask a server. Raises BackendError where it does not answer."""
    host = host_of(options)
    models = [
        ServedModel(
            str(entry.get("repo_id") or entry.get("model_key", "?")),
            str(entry.get("revision") or "main"),
            str(entry.get("application_state") or "UNKNOWN"),
            str(entry.get("deployment_level") or ""),
        )
        for entry in _get(host, "/status").get("deployments", {}).values()
    ]
    there = _get(host, "/env")
    packages = there.get("packages", {})
    python = str(there.get("python_version") or "unknown").split()[0]
    versions = [("python", platform.python_version(), python)]
    versions += [(name, _version(name), str(packages.get(name, "unknown"))) for name in PACKAGES]
    return ServerStatus(host, tuple(models), tuple(versions))


def job_state(options: BackendOptions, job: str) -> str:
    """The last state that the server kept of a job, or ``gone``: it keeps those of jobs that nobody waited for."""
    try:
        return str(_get(host_of(options), f"/response/{job}").get("status", "unknown")).lower()
    except LookupError:
        return "gone"


def _get(host: str, route: str) -> dict[str, Any]:
    try:
        answer = httpx.get(host + route, timeout=_SECONDS)
        if answer.status_code == 404:
            raise LookupError(route)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError, OSError) as error:
        raise fault_of(error, host).error from error
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
