"""What is known of a run's jobs on a server: those that were answered, and those that wait there for somebody to come back.

A unit of work is a function of the answers to its requests. So a run that was left alone is taken up by running its
units again: a request whose answer is known is answered from the ledger, one that waits on the server is looked for
there, and the first one that is new is sent. A request is known by what it asks, not by who asked it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsp.errors import BackendError
from nsp.models.cache import cache_dir

DONE, WAITING, FAILED = "done", "waiting", "failed"


class WaitingError(BackendError):
    """A request lies on a server and its answer is not there yet; whoever collects later goes on from there."""


@dataclass
class JobRecord:
    """One job, as the store keeps it.

    Attributes:
        id, host: its id, and the server's address.
        sent, received: bytes of its payload and of its result.
        seconds: how long it was waited for; ``attempts`` how many times it was sent.
        state: ``done``, ``waiting`` (handed over, not collected) or ``failed``; ``request`` what it asks, of a job
            that was handed over.
    """

    id: str = ""
    host: str = ""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    attempts: int = 1
    state: str = DONE
    request: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> JobRecord:
        """A record as the store has it, with the unit and whatever else stands beside it left out."""
        return cls(**{one.name: stored[one.name] for one in fields(cls) if one.name in stored})


@dataclass
class Ledger:
    """The jobs of one run.

    Attributes:
        made: records since they were last taken with `drain`.
        known: jobs that were handed over, by request.
        active: requests are told apart; otherwise every job is sent and waited for.
        detach: what is new is handed over and not waited for.
    """

    made: list[JobRecord] = field(default_factory=list)
    known: dict[str, JobRecord] = field(default_factory=dict)
    active: bool = False
    detach: bool = False
    _fresh: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @contextmanager
    def taken_up(self, stored: Sequence[Mapping[str, Any]], *, detach: bool = False) -> Iterator[None]:
        """While the block runs, go on with a run whose store has these records; afterwards every job is sent and waited
        for again."""
        records = [JobRecord.of(one) for one in stored]
        self.known = {one.request: one for one in records if one.request and one.state != FAILED}
        self.active, self.detach = detach or bool(self.known), detach
        try:
            yield
        finally:
            self.known, self.active, self.detach = {}, False, False
            self._fresh.clear()

    def note(self, record: JobRecord) -> None:
        """A job was sent, or its record has changed."""
        self.made.append(record)
        if record.request:
            self.known[record.request] = record
            if record.state == FAILED:
                del self.known[record.request]

    def drain(self) -> list[dict[str, Any]]:
        """The records since the last call."""
        taken = [record.to_dict() for record in self.made]
        self.made.clear()
        return taken

    def answer(self, request: str) -> list[torch.Tensor] | None:
        """The values that a request was answered with, if they are here."""
        if request in self._fresh:
            return self._fresh[request]
        place = _place(request)
        if not place.exists():
            return None
        found: list[torch.Tensor] = torch.load(place, weights_only=True)
        return found

    def keep(self, request: str, values: list[torch.Tensor]) -> None:
        """Remember an answer until its unit is settled."""
        self._fresh[request] = values

    def settle(self, committed: bool) -> None:
        """A unit is done with for now. The answers of one that is not finished are kept in nsp's cache for the next
        time."""
        for request, values in () if committed else self._fresh.items():
            place = _place(request)
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = place.with_suffix(f".{os.getpid()}")
            torch.save(values, beside)
            beside.replace(place)
        self._fresh.clear()

    def forget(self) -> None:
        """The run is complete: take its answers out of the cache."""
        for request in self.known:
            _place(request).unlink(missing_ok=True)


def request_id(*parts: Any) -> str:
    """What a job asks, as SHA-256 of its steps: the same in another process and on another day."""
    found = hashlib.sha256()
    for piece in _pieces(parts):
        found.update(len(piece).to_bytes(8, "little"))
        found.update(piece)
    return found.hexdigest()


def _pieces(item: Any) -> Iterator[bytes]:
    if isinstance(item, torch.Tensor):
        held = item.detach().cpu().contiguous()
        yield f"{held.dtype}{tuple(held.shape)}".encode()
        yield held.reshape(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b""
    elif isinstance(item, np.ndarray):
        yield f"{item.dtype}{item.shape}".encode()
        yield np.ascontiguousarray(item).tobytes()
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield str(key).encode()
            yield from _pieces(value)
        yield b"}"
    elif isinstance(item, list | tuple):
        for value in item:
            yield from _pieces(value)
        yield b"]"
    elif callable(item):
        yield str(getattr(item, "__qualname__", "")).encode()
    else:
        yield repr(item).encode()


def _place(request: str) -> Path:
    return cache_dir() / "answers" / f"{request}.pt"
