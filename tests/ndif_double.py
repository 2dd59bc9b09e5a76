"""A server that speaks NDIF's protocol, small enough for tests: nnsight's own server-side calls behind FastAPI.

Run as a process of its own, in which nsp cannot be imported: `python ndif_double.py PORT_FILE [KEY]`. Tests tell it to
misbehave with POST /fault {"kind": ..., "times": ...}: see `FAULTS`.
"""

# ruff: noqa: E402, B008
from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import sys
import traceback
import uuid
from pathlib import Path
from typing import Any

sys.modules["nsp"] = None  # type: ignore[assignment]  # installed in this environment, but no server has it

import torch
import uvicorn
import zstandard
from fastapi import FastAPI, File, Form, Header, HTTPException, UploadFile, WebSocket, WebSocketDisconnect
from fastapi.responses import Response
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.tracer import _saves, dec, inc

FAULTS = {
    "busy": "answers a request with 503",
    "version": "answers a request with 400, the client's version being too old",
    "drop": "closes the websocket while the job runs",
    "evicted": "ends a job with NDIF's words for a job that it dropped",
    "deploying": "never gets beyond DEPLOYING",
    "die": "ends the whole process while the job runs",
    "fail": "ends a job with an error of its own",
    "hold": "keeps every job in its queue until it is told 0 times",
}
INLINE = 100_000  # bytes; a larger result is fetched by its address

app = FastAPI()
key: str | None = None
address = ""
models: dict[str, Any] = {}
sockets: dict[str, WebSocket] = {}
faults: dict[str, int] = {}
results: dict[str, bytes] = {}
responses: dict[str, str] = {}
seen: list[dict[str, Any]] = []
running = asyncio.Lock()
background: set[asyncio.Task[None]] = set()


def due(kind: str) -> bool:
    """Whether a fault is to happen now; each was asked for a number of times."""
    if faults.get(kind, 0) <= 0:
        return False
    faults[kind] -= 1
    return True


@app.post("/fault")
async def fault(asked: dict[str, Any]) -> dict[str, int]:
    assert asked["kind"] in FAULTS
    faults[asked["kind"]] = int(asked["times"])
    return faults


@app.get("/seen")
async def requests_seen() -> list[dict[str, Any]]:
    """What came in, for tests that look at it: the envelope and the unpacked bytes (latin-1)."""
    return seen


@app.get("/ping")
async def ping() -> str:
    return "pong"


@app.get("/status")
async def status() -> dict[str, Any]:
    deployments = {}
    for number, name in enumerate(models):
        data = json.loads(name.split(":", 1)[1])
        deployments[str(number)] = {
            "model_key": name, "repo_id": data["repo_id"], "revision": data["revision"], "task": data.get("task"),
            "application_state": "RUNNING", "deployment_level": "HOT",
        }  # fmt: skip
    return {"deployments": deployments}


@app.get("/env")
async def env() -> dict[str, Any]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers", "nnsight")}
    return {"python_version": sys.version, "packages": packages}


@app.get("/response/{number}")
async def response(number: str) -> Response:
    if number not in responses:
        raise HTTPException(404)
    return Response(responses[number], media_type="application/json")


@app.get("/result/{number}")
async def result(number: str) -> Response:
    return Response(results[number], media_type="application/octet-stream")


@app.websocket("/subscribe")
async def subscribe(websocket: WebSocket) -> None:
    await websocket.accept()
    session = uuid.uuid4().hex
    sockets[session] = websocket
    await websocket.send_text(json.dumps({"session_id": session}))
    try:
        while True:
            await websocket.receive_text()
    except (WebSocketDisconnect, RuntimeError):
        sockets.pop(session, None)


@app.post("/request")
async def request(
    data: str = Form(...), blob: UploadFile = File(...), ndif_api_key: str | None = Header(default=None)
) -> Response:
    if key is not None and ndif_api_key != key:
        raise HTTPException(403 if ndif_api_key else 401, detail="Invalid API key.")
    if due("busy"):
        raise HTTPException(503, detail="Service temporarily unavailable: compute backend is reconnecting.")
    if due("version"):
        raise HTTPException(400, detail="Client nnsight version 0.8.1 is below the minimum supported 9.0.")
    asked = RequestModel.model_validate_json(data)
    payload = await blob.read()
    plain = zstandard.ZstdDecompressor().decompress(payload) if asked.compress else payload
    seen.append({"envelope": data, "payload": plain.decode("latin-1"), "bytes": len(payload)})
    number = uuid.uuid4().hex
    first = ResponseModel(id=number, status=Status.RECEIVED, description="Your job has been received.")
    responses[number] = first.model_dump_json()
    task = asyncio.create_task(work(number, asked, payload))
    background.add(task)
    task.add_done_callback(background.discard)
    return Response(first.model_dump_json(), media_type="application/json")


async def work(number: str, asked: RequestModel, payload: bytes) -> None:
    """One job from its queue to its result."""

    async def tell(state: Status, text: str = "", **rest: Any) -> None:
        made = ResponseModel(id=number, status=state, description=text, **rest)
        socket_of = sockets.get(asked.session_id)
        if isinstance(made.data, bytes):
            if socket_of is not None:
                await socket_of.send_bytes(made.pickle())
            return
        responses[number] = made.model_dump_json()
        if socket_of is not None:
            await socket_of.send_text(made.model_dump_json())

    await tell(Status.QUEUED, "Moved to position 1 in queue.")
    while faults.get("hold", 0):
        await asyncio.sleep(0.02)
    if due("fail"):
        await tell(
            Status.ERROR,
            "Traceback (most recent call last):\n  a line of the server's own\nRuntimeError: out of memory",
        )
        return
    if due("deploying"):
        await tell(Status.DEPLOYING, "The model is being deployed.")
        return
    if due("evicted"):
        await tell(Status.ERROR, "Replica was evicted while processing your request. Please try again later.")
        return
    async with running:
        await tell(Status.RUNNING, "Your job has started running.")
        if due("die"):
            os._exit(1)
        if due("drop"):
            await sockets.pop(asked.session_id).close()
            return
        try:
            made = await asyncio.to_thread(execute, asked, payload)
        except Exception:
            await tell(Status.ERROR, traceback.format_exc())
            return
    if asked.session_id and len(made) <= INLINE:
        await tell(Status.COMPLETED, "done", data=made)
    else:
        results[number] = made
        await tell(Status.COMPLETED, "done", data=f"{address}/result/{number}")


def execute(asked: RequestModel, payload: bytes) -> bytes:
    """Run a job against its model, as an NDIF model actor does."""
    if asked.model_key not in models:
        models[asked.model_key] = Remotable.from_model_key(asked.model_key, dispatch=True, dtype=torch.float32)
    model = models[asked.model_key]
    model._remoteable_set_env(asked.env)
    tracer = RequestModel.deserialize(payload, model._remoteable_persistent_objects(), asked.compress)
    inc()
    try:
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
    finally:
        dec()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue()) if asked.compress else buffer.getvalue()


def main() -> None:
    global key, address
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    key = sys.argv[2] if len(sys.argv) > 2 and sys.argv[2] else None
    port = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    listening = socket.create_server(("127.0.0.1", port))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    place.with_suffix(".new").write_text(address)
    place.with_suffix(".new").rename(place)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
