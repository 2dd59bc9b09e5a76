"""The model as a user holds it: loaded once, then traced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nsp.backends.ledger import Ledger
from nsp.backends.local_sim import simulate
from nsp.backends.ndif import NdifSender
from nsp.backends.options import BackendOptions, backend_options
from nsp.backends.remote_model import load_remote_model, server_name
from nsp.backends.runtime import RemoteRuntime, Sender
from nsp.conformance import Report, check
from nsp.datasets.prompts import Prompt, encode
from nsp.engine.engine import Engine
from nsp.engine.measuring import Progress
from nsp.engine.plan import Plan
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.html import Table, card
from nsp.interventions import from_dict
from nsp.metrics import Metric
from nsp.models.geometry import Geometry
from nsp.models.loaded import LoadedModel, Provenance
from nsp.models.loading import load_weights
from nsp.models.tables import SiteTable
from nsp.sites import component
from nsp.trace import Trace


class Model:
    """A language model with its tokenizer, ready to be traced.

    Attributes:
        name, tokenizer, provenance: what was loaded.
        module: the transformers model; ``nnsight`` the nnsight model around it.
        geometry: counts, widths and the site table.
    """

    def __init__(
        self, loaded: LoadedModel, sites: SiteTable | Mapping[str, Any] | None = None, sender: Sender | None = None
    ) -> None:
        self.loaded = loaded
        if isinstance(sites, Mapping):
            sites = SiteTable.from_dict(sites)
        if sender is None:
            self.runtime = Runtime(loaded.module, loaded.tokenizer, sites)
        else:
            self.runtime = RemoteRuntime(loaded.module, loaded.tokenizer, sites, sender)

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def module(self) -> torch.nn.Module:
        return self.loaded.module

    @property
    def provenance(self) -> Provenance:
        return self.loaded.provenance

    @property
    def geometry(self) -> Geometry:
        return self.runtime.geometry

    def jobs(self) -> list[dict[str, Any]]:
        """What was sent to a server since the last call: one record a job (id, bytes sent and received, seconds)."""
        sender = self._sender
        return [] if sender is None else sender.ledger.drain()

    def share_jobs(self, other: Model) -> None:
        """Have `jobs` of the other model tell what this one sends to a server too."""
        if self._sender is not None and other._sender is not None:
            self._sender.ledger = other._sender.ledger

    @property
    def ledger(self) -> Ledger | None:
        """What is known of the jobs on the server that the model runs on; None where it runs elsewhere."""
        return None if self._sender is None else self._sender.ledger

    @property
    def engine(self) -> Engine:
        """The engine on this model, with a share of the free memory; ``engine.within("4GB")`` has another budget."""
        return Engine(self.runtime)

    @property
    def _sender(self) -> NdifSender | None:
        sender = getattr(self.runtime, "sender", None)
        return sender if isinstance(sender, NdifSender) else None

    @property
    def nnsight(self) -> Any:
        """The wrapped nnsight model, for what nsp has no word for."""
        return self.runtime.envoy

    def trace(
        self,
        prompt: Any,
        *,
        spans: Mapping[str, str] | None = None,
        path: Literal["auto", "branch", "plain"] = "auto",
        memory: str | float | None = None,
        progress: Progress | None = None,
    ) -> Trace:
        """Open a trace of a prompt (text, chat messages, token ids), or of a list of prompts.

        Args:
            spans: named spans, name -> text that occurs once in the prompt; selectors then take ``@ name``.
            path: ``auto``, or insist on the ``branch`` or the ``plain`` path of the engine.
            memory: budget of the engine, such as ``4GB``.
            progress: called with (branches done, branches in all) after each pass of a sweep; by default a notebook shows
                a bar.
        """
        return Trace(self.runtime, self.loaded, prompt, spans=spans, path=path, memory=memory, progress=progress)

    def check(self, progress: Callable[[str], None] | None = None) -> Report:
        """Run the conformance list: is every component of this model what its site table says? (``nsp check`` on the
        command line.)

        ``print`` the report for a table; ``report.passed`` is the verdict. ``progress`` is told each line before it
        runs.
        """
        return check(self.runtime, self.name, progress)

    def rerun(self, plan: Plan) -> Trace:
        """Run a trace's plan again (a plan from `Trace.plan`, or read back with `Plan.from_dict`)."""
        if plan.kind != "trace":
            raise InputError(
                f"rerun takes a trace's plan; this is a plan of kind {plan.kind!r}, which `nsp run` repeats"
            )
        here = {name: value for name, value in asdict(self.provenance).items() if name in plan.model}
        other = [name for name, value in plan.model.items() if here.get(name) != value]
        if other:
            said = ", ".join(f"{name} {plan.model[name]!r} (here {here.get(name)!r})" for name in other)
            warnings.warn(
                f"the plan is of another model, so its numbers will not be the same: {said}", UserWarning, stacklevel=2
            )
        statement = plan.statement
        prompts = [self._stated(one) for one in statement["prompts"]]
        trace = self.trace(prompts if statement["batch"] else prompts[0], path=statement["path"])
        if statement["swept"]:
            trace.sweep(*(from_dict(item, self._stated) for item in statement["swept"]), axes=statement["axes"])
        for item in statement["fixed"]:
            trace.add(from_dict(item, self._stated))
        trace.record(*statement["record"])
        trace.measure(*(Metric.from_dict(item) for item in statement["metrics"]))
        if statement["generate"] is not None:
            trace.generate(**statement["generate"])
        trace.run()
        return trace

    def _stated(self, stored: Mapping[str, Any]) -> Prompt:
        # Token ids are the authority: a tokenizer that now splits the text in another way must not change the run.
        ids = tuple(stored["token_ids"])
        text = stored["text"]
        prompt = self.encode(text) if text is not None else self.encode(list(ids))
        if prompt.token_ids != ids:
            prompt = self.encode(list(ids))
        spans = tuple((name, tuple(positions)) for name, positions in stored["spans"].items())
        return replace(prompt, text=text, spans=spans)

    def encode(self, prompt: Any, spans: Mapping[str, str] | None = None) -> Prompt:
        """A prompt as nsp reads it: token ids, token texts, spans."""
        return encode(self.tokenizer, prompt, spans=spans)

    def __repr__(self) -> str:
        g = self.geometry
        dtype = str(self.loaded.dtype).removeprefix("torch.")
        return (
            f"Model({self.name!r}, {g.table.family}, {g.n_layers} layers, d_model {g.d_model}, {g.n_heads} heads ({g.n_kv_heads} key/value), "
            f"{g.d_mlp} neurons a layer, {dtype} on {self.loaded.device})"
        )

    def _repr_html_(self) -> str:
        g, origin = self.geometry, self.loaded.origin
        weights = self.loaded.quantization or str(self.loaded.dtype).removeprefix("torch.")
        facts = [
            ("family", g.table.family),
            ("layers", f"{g.n_layers}, residual stream of width {g.d_model}"),
            ("heads", f"{g.n_heads} of width {g.head_dim} ({g.n_kv_heads} key/value)"),
            ("neurons", f"{g.d_mlp} a layer"),
            ("vocabulary", f"{g.vocab_size} tokens"),
            ("weights", f"{weights} on {self.loaded.place or self.loaded.device}"),
            ("from", origin.source + (f" @ {origin.revision}" if origin.revision else "")),
        ]
        rows = []
        for known in map(component, g.components()):
            layers = len(g.layers_of(known.name)) if known.layered else None
            units = f"{g.unit_count(known.name)} {known.unit}s" if known.unit else None
            rows.append((known.name, layers, units, known.meaning))
        table = Table("what can be read and written, in forward order", ("component", "layers", "units", "what it is"), rows)
        return card("Model", self.name, facts=facts, tables=[table])


def load(
    source: str | Path | torch.nn.Module,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    sites: SiteTable | Mapping[str, Any] | None = None,
    backend: str | Mapping[str, Any] | BackendOptions | None = None,
    key: str | None = None,
) -> Model:
    """Load a model: a catalogue alias, a hub id, a directory, a ``.gguf`` file or a torch module (see `load_weights`).

    ``sites`` states the site table of an architecture that nsp does not know (or knows otherwise), as a `SiteTable`
    or as the dict that `SiteTable.to_dict` makes. Without it an unknown architecture is inferred, with a warning.
    ``backend`` says where the model runs (see `nsp.backends.options`): with ``ndif`` or ``ndif://host:port`` no
    weights are loaded here, and ``key`` (by default NDIF_API_KEY) opens the server.
    """
    chosen = backend_options(backend)
    if chosen.kind == "ray":  # workers run the units; here the model serves for the plan, as each of them has it
        chosen = chosen.inner or BackendOptions()
    if chosen.kind == "ndif":
        if isinstance(source, torch.nn.Module) or device is not None or quantization is not None:
            raise InputError("with backend ndif the server has the weights: no module, device or quantization of your own")
        outline = load_remote_model(
            source,
            chosen,
            tokenizer=tokenizer,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        name, commit = server_name(outline, source, chosen)
        return Model(outline, sites, NdifSender(chosen, name, commit, key=key, trust_remote_code=trust_remote_code))
    loaded = load_weights(
        source,
        tokenizer=tokenizer,
        revision=revision,
        device=device,
        dtype=dtype,
        quantization=quantization,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    return Model(loaded, sites, simulate if chosen.kind == "local-sim" else None)
