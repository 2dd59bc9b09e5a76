"""Jobs on an NDIF server, through nnsight's own client: deadlines, retries, and a record of what was sent."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.schema.config import CONFIG
from nnsight.schema.response import ResponseModel
from nnsight.util import to_import_path

from nsp.backends.faults import LateError, fault_of
from nsp.backends.lazy import Step
from nsp.backends.options import BackendOptions
from nsp.backends.shipping import remote_block
from nsp.backends.status import host_of
from nsp.errors import InputError

_LONGEST_PAUSE = 30.0


@dataclass
class JobRecord:
    """One job: its id on the server, bytes sent and received, seconds, and how many times it was sent."""

    id: str = ""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    attempts: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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

    def _serialize(self, tracer: Any) -> bytes:
        blob: bytes = super()._serialize(tracer)
        self.record.sent = len(blob)
        return blob

    def finalize(self, content: bytes) -> Any:
        self.record.received = len(content)
        return super().finalize(content)


class NdifSender:
    """Runs jobs on a server. ``jobs`` are the records since they were last taken with `drain`."""

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
        self.jobs: list[JobRecord] = []

    def __call__(self, envoy: Any, steps: list[Step], wanted: list[int], attention: str) -> list[torch.Tensor]:
        """Run one job; transient faults are tried again."""
        pause = 1.0
        begin = time.monotonic()
        for attempt in range(self.options.retries + 1):
            record = JobRecord(attempts=attempt + 1)
            try:
                found = self._once(envoy, steps, wanted, attention, record)
            except Exception as error:
                fault = fault_of(error, self.host)
                if not fault.transient or attempt == self.options.retries:
                    raise fault.error from error
                self.tell(f"{fault.error}; trying again in {pause:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            record.seconds = round(time.monotonic() - begin, 3)
            self.jobs.append(record)
            return found
        raise AssertionError("unreachable")  # the last attempt returns or raises

    def drain(self) -> list[dict[str, Any]]:
        """The records of the jobs since the last call."""
        taken, self.jobs = self.jobs, []
        return [record.to_dict() for record in taken]

    def _once(
        self, envoy: Any, steps: list[Step], wanted: list[int], attention: str, record: JobRecord
    ) -> list[torch.Tensor]:
        env = {"attn_implementation": attention} if attention else {}
        client = _Client(self.model_key, host=self.host, api_key=self.key, env=env)
        client.record = record
        client.display = Watch(self.host, self.options.deadline, self.tell, record)
        found: list[torch.Tensor] = remote_block()["submit"](envoy, client, steps, wanted, attention)
        return found


def model_key(name: str, revision: str | None, trust_remote_code: bool = False) -> str:
    """The key by which a server knows a model, as nnsight makes it (which would ask the hub for the name's spelling)."""
    data: dict[str, Any] = {"repo_id": name, "revision": revision}
    if trust_remote_code:
        data["trust_remote_code"] = True
    data["task"] = "text-generation"
    return f"{to_import_path(TransformersModel)}:{json.dumps(data)}"
