"""``local-sim``: a dry run of the remote path. Jobs are packed as for a server, unpacked and run here."""

from __future__ import annotations

import linecache
import sys
from typing import Any

import torch
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.serialization import CustomCloudUnpickler
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import save
from nnsight.tracing.util import push

from nsp.backends.deferred_tensors import Step
from nsp.backends.shipping import remote_block

# What a server has installed.
_THERE = {"torch", "numpy", "transformers", "accelerate", "nnsight", "cloudpickle", *sys.stdlib_module_names}


class _ServerUnpickler(CustomCloudUnpickler):  # type: ignore[misc]
    """Unpacks as a server does, which finds none of this machine's other modules."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in _THERE:
            raise ModuleNotFoundError(f"a server has no module {module!r} (for {name!r})")
        return super().find_class(module, name)


class _Simulation(LocalSimulationBackend):  # type: ignore[misc]
    """nnsight's ``remote="local"``, which takes modules out of ``sys.modules`` for a moment while it unpacks.

    Another thread that imports something in that moment (the store is written in one) would get a second copy, so
    here the unpacking itself refuses them; and what was unpacked is what runs, as on a server.
    """

    def __call__(self, tracer: Any) -> None:
        pull_env()
        filename = tracer.info.frame.f_code.co_filename
        source = linecache.cache.get(filename)
        packed = RequestModel.serialize(tracer, compress=False)
        try:
            restored = RequestModel.deserialize(
                packed, self.model._remoteable_persistent_objects(), compress=False, unpickler=_ServerUnpickler
            )
        finally:
            if source is not None:
                linecache.cache[filename] = source
        before = set(restored.info.frame.f_locals)
        restored.execute(restored.info.code)
        made = {name: value for name, value in restored.info.frame.f_locals.items() if name not in before}
        for value in made.values():
            save(value)
        push(tracer.info.frame, made)


def simulate(envoy: Any, steps: list[Step], wanted: list[int], attention: str) -> list[torch.Tensor]:
    """Run one job in this process, through nnsight's packing."""
    found: list[torch.Tensor] = remote_block()["submit"](envoy, _Simulation(envoy), steps, wanted, attention)
    return found
