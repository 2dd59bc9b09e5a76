"""Jobs on an NDIF server, through nnsight's own client: deadlines, retries, and a record of what was sent."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

import httpx
import torch
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.config import CONFIG
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.util import push
from nnsight.util import to_import_path

from nsp.backends.deferred_tensors import TOGETHER, Step
from nsp.backends.faults import LateError, fault_of
from nsp.backends.ledger import DONE, FAILED, WAITING, JobRecord, Ledger, WaitingError, request_id
from nsp.backends.options import BackendOptions
from nsp.backends.shipping import remote_block
from nsp.backends.status import host_of
from nsp.errors import InputError

T = TypeVar("T")
_DETACHED_TOGETHER = 10_000
_LONGEST_PAUSE = 30.0
# Seconds between two looks at a job that was handed over, and how many looks that find nothing mean that it is gone.
_POLL, _UNKNOWN = 1.0, 3
# A result that was kept for a while and is no longer: what object stores answer then.
_NO_RESULT, _GONE = (403, 404, 410), object()


def say(text: str) -> None:
    """Tell the user how a job stands, on standard error."""
    print(f"nsp: {text}", file=sys.stderr, flush=True)


@dataclass
class Watch:
    """Stands where nnsight's client shows a job's states: keeps the deadline, and says what takes long."""

    host: str
    deadline: float
    tell: Callable[[str], None]
    record: JobRecord
    enabled: bool = True
    begin: float = field(default_factory=time.monotonic)
    state: str = "sent"
    told: bool = False

    def update(self, response: ResponseModel) -> None:
        """A new state of the job."""
        self.record.id = self.record.id or response.id
        self.state = response.status.value.lower()
        slow = response.status.value in ("PROVISIONING", "DEPLOYING", "QUEUED")
        if response.description and (slow and time.monotonic() - self.begin > 2.0):
            self.tell(f"{self.host}: {response.description}")
        self.refresh()

    def refresh(self) -> None:
        """Called several times a second while a job is awaited."""
        waited = time.monotonic() - self.begin
        if waited > self.deadline:
            raise LateError(
                f"it is {self.state!r} after {waited:.0f} s. A model that is not deployed yet takes minutes; "
                "`nsp status` shows it, and backend.deadline allows longer"
            )
        if waited > 5.0 and not self.told and self.state != "running":
            self.told = True
            self.tell(f"{self.host}: waiting, the job is {self.state}")


class _Client(RemoteBackend):  # type: ignore[misc]
    """nnsight's client; only looks on: how many bytes go out and come in."""

    record: JobRecord

    def __call__(self, tracer: Any = None) -> Any:
        found = super().__call__(tracer)
        if not self.blocking and tracer is not None:
            push(tracer.info.frame, {"results": None})  # the block goes on without them
        return found

    def _serialize(self, tracer: Any) -> bytes:
        blob: bytes = super()._serialize(tracer)
        self.record.sent = len(blob)
        return blob

    def finalize(self, content: bytes) -> Any:
        self.record.received = len(content)
        return super().finalize(content)


class NdifSender:
    """Runs jobs on a server. ``ledger`` has their records, and knows those that somebody handed over and left there."""

    def __init__(
        self,
        options: BackendOptions,
        name: str,
        revision: str | None,
        *,
        key: str | None = None,
        trust_remote_code: bool = False,
        tell: Callable[[str], None] = say,
    ) -> None:
        self.options, self.tell = options, tell
        self.host = host_of(options)
        if not self.host.startswith(("http://", "https://")):
            raise InputError(f"the server's address {self.host!r} must begin with http:// or https://")
        self.key = key or os.environ.get(options.key_variable) or CONFIG.API.APIKEY
        self.model_key = model_key(name, revision, trust_remote_code)
        self.ledger = Ledger()

    @property
    def together(self) -> int:
        """How many programs go in one job: as many as wait, where nobody waits for the job itself."""
        return _DETACHED_TOGETHER if self.ledger.active else TOGETHER

    def __call__(self, envoy: Any, steps: list[Step], wanted: list[int], attention: str) -> list[torch.Tensor]:
        """The values of one job; transient faults are tried again.

        Raises WaitingError where the ledger says to hand jobs over and the answer is not there yet.
        """
        ledger = self.ledger
        if not ledger.active:
            return self._run(envoy, steps, wanted, attention)
        request = request_id(self.model_key, steps, wanted, attention)
        found = ledger.answer(request)
        if found is None and request in ledger.known:
            found = self._collect(ledger.known[request])
        if found is None and ledger.detach:
            self._hand_over(envoy, steps, wanted, attention, request)
        if found is None:
            found = self._run(envoy, steps, wanted, attention)
        ledger.keep(request, found)
        return found

    def _run(self, envoy: Any, steps: list[Step], wanted: list[int], attention: str) -> list[torch.Tensor]:
        """Send a job and wait for it."""
        begin = time.monotonic()

        def once(attempt: int) -> tuple[JobRecord, list[torch.Tensor]]:
            record = JobRecord(host=self.host, attempts=attempt)
            client = self._client(record, attention)
            return record, remote_block()["submit"](envoy, client, steps, wanted, attention)

        record, found = self._tried(once)
        record.seconds = round(time.monotonic() - begin, 3)
        self.ledger.note(record)
        return found

    def _hand_over(self, envoy: Any, steps: list[Step], wanted: list[int], attention: str, request: str) -> NoReturn:
        """Send a job that nobody waits for."""

        def once(attempt: int) -> JobRecord:
            record = JobRecord(host=self.host, attempts=attempt, state=WAITING, request=request)
            client = self._client(record, attention, blocking=False)
            remote_block()["submit"](envoy, client, steps, wanted, attention)
            record.id = str(client.job_id)
            return record

        record = self._tried(once)
        self.ledger.note(record)
        raise WaitingError(f"job {record.id} was handed to {self.host}")

    def _collect(self, record: JobRecord) -> list[torch.Tensor] | None:
        """The values of a job that was handed over; None where the server has dropped it, so that it is sent again."""
        client = self._client(record, blocking=False, job_id=record.id)
        client.display.enabled = False  # which would draw a bar for every result

        def poll(_attempt: int) -> Any:
            client.status = None
            try:
                return client.poll()
            except RemoteError as error:
                if client.status is not Status.ERROR:
                    raise
                return error  # the end of the job, not of the connection
            except httpx.HTTPStatusError as error:
                if client.status is not Status.COMPLETED or error.response.status_code not in _NO_RESULT:
                    raise
                return _GONE

        begin, unknown = time.monotonic(), 0
        while True:
            found = self._tried(poll)
            if isinstance(found, dict):
                record.seconds, record.state = round(time.monotonic() - begin, 3), DONE
                self.ledger.note(record)
                values: list[torch.Tensor] = found["results"]
                return values
            if isinstance(found, RemoteError):
                fault = fault_of(found, self.host)
                self.ledger.note(replace(record, state=FAILED))
                if not fault.transient:
                    raise fault.error from found
                return None
            # A state may land a moment after the job itself.
            unknown = unknown + 1 if client.status is None else 0
            if unknown >= _UNKNOWN or found is _GONE:
                self.ledger.note(replace(record, state=FAILED))
                self.tell(f"{self.host} knows job {record.id} no more; it is sent again")
                return None
            if self.ledger.detach and not unknown:
                raise WaitingError(f"job {record.id} is {client.status.value.lower()} on {self.host}")
            time.sleep(_POLL)
            client.display.refresh()

    def _tried(self, once: Callable[[int], T]) -> T:
        """What ``once`` returns; it is called again, after a pause, where its error may pass. It is told the attempt."""
        pause = 1.0
        for attempt in range(self.options.retries + 1):
            try:
                return once(attempt + 1)
            except Exception as error:
                fault = fault_of(error, self.host)
                if not fault.transient or attempt == self.options.retries:
                    raise fault.error from error
                self.tell(f"{fault.error}; trying again in {pause:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")  # the last attempt returns or raises

    def _client(self, record: JobRecord, attention: str = "", **how: Any) -> _Client:
        env = {"attn_implementation": attention} if attention else {}
        client = _Client(self.model_key, host=self.host, api_key=self.key, env=env, **how)
        client.record = record
        client.display = Watch(self.host, self.options.deadline, self.tell, record)
        return client


def model_key(name: str, revision: str | None, trust_remote_code: bool = False) -> str:
    """The key by which a server knows a model, as nnsight makes it (which would ask the hub for the name's spelling)."""
    data: dict[str, Any] = {"repo_id": name, "revision": revision}
    if trust_remote_code:
        data["trust_remote_code"] = True
    data["task"] = "text-generation"
    return f"{to_import_path(TransformersModel)}:{json.dumps(data)}"
