"""What can go wrong between here and a server: each fault as one clear message, and whether trying again may help."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass

import httpx
import websocket
from nnsight.intervention.backends.remote import RemoteError
from pydantic import ValidationError

from nsp.engine.kernels import APPLIED
from nsp.errors import BackendError, InputError, NspError

# What NDIF says of a job that it dropped for reasons of its own.
_DROPPED = re.compile(r"try again|preempted|evicted|reconnecting|temporarily|unavailable", re.IGNORECASE)


class LateError(Exception):
    """A job did not finish before its deadline; the text says in which state it was."""


@dataclass(frozen=True)
class Fault:
    """A fault: the error to raise, and whether the same job may go through a little later."""

    error: NspError
    transient: bool


def fault_of(error: BaseException, host: str) -> Fault:
    """What ``error``, raised by nnsight's client, means."""
    if isinstance(error, LateError):
        return Fault(BackendError(f"the server {host} did not finish a job in time: {error}"), False)
    if isinstance(error, RemoteError):
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError):
            return _refused(cause.response.status_code, str(error), host)
        if isinstance(cause, httpx.HTTPError):
            return _unreachable(cause, host)
        return _failed(str(error))
    if isinstance(error, httpx.HTTPStatusError):
        return _refused(error.response.status_code, str(error), host)
    if isinstance(error, websocket.WebSocketBadStatusException):
        return _refused(int(error.status_code), str(error), host)
    if isinstance(error, socket.gaierror):
        return Fault(
            BackendError(f"there is no host of the name in {host}; check NDIF_HOST or the backend's host"), False
        )
    if isinstance(error, ValidationError | json.JSONDecodeError):
        # nnsight's client reads a closed websocket as an empty message.
        return Fault(BackendError(f"the server {host} closed the connection while a job ran"), True)
    if isinstance(error, httpx.HTTPError | websocket.WebSocketException | OSError | EOFError):
        return _unreachable(error, host)
    return Fault(BackendError(f"the server {host} answered what nnsight cannot read: {_last_line(str(error))}"), False)


def _unreachable(error: BaseException, host: str) -> Fault:
    said = _last_line(str(error)) or type(error).__name__
    return Fault(BackendError(f"no connection to the server {host} ({said})"), True)


def _refused(code: int, text: str, host: str) -> Fault:
    said = text.removeprefix("Failed to send request: ").strip()
    if code in (401, 403) or (code == 400 and "key" in said.lower()):
        return Fault(BackendError(f"the server {host} refused the key ({said}); NDIF_API_KEY holds it"), False)
    if code == 400 and "version" in said.lower():
        return Fault(BackendError(f"the server {host} does not take this client: {said}"), False)
    if code == 429 or code >= 500:
        return Fault(BackendError(f"the server {host} cannot take jobs now ({said})"), True)
    return Fault(BackendError(f"the server {host} refused a job with status {code}: {said}"), False)


def _failed(text: str) -> Fault:
    """A job that ended in an error on the server; ``text`` is its traceback, or a sentence of the server's."""
    last = _last_line(text)
    if APPLIED in last:
        return Fault(InputError(last[last.index(APPLIED) :]), False)
    return Fault(
        BackendError(f"the job failed on the server: {last}"), bool(_DROPPED.search(last)) and "Traceback" not in text
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400].rstrip(".") if lines else ""
