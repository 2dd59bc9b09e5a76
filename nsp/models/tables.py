"""Where each component lives in an architecture: the form of a site table. The tables themselves are in `nsp.models.families`.

A table says, relative to one decoder layer, which module's input or output holds a component and, where several
components share one tensor (GPT-2's fused ``c_attn``), how the rows of heads lie in it. Everything else (counts, widths)
is read from the model itself by `nsp.models.geometry`.

Definitions that hold in every family:

- ``resid_pre[l]`` is what layer ``l`` receives, ``resid_post[l]`` what it hands on (so ``resid_post[l]`` and
  ``resid_pre[l + 1]`` are one tensor); ``embed`` is the residual stream before the first layer, positions and any
  scale of the embedding included.
- ``attn_out`` and ``mlp_out`` are what is *added* to the residual stream: after a post-norm where a family has one
  (Gemma 2 and 3, OLMo 2), times the residual multiplier where it has one (Granite).
- ``resid_mid`` is the residual stream between attention and MLP. It does not exist where both read ``resid_pre``.
- ``q``, ``k``, ``v`` are the projections' outputs with their bias, before rotary embedding and before a query/key norm.
- ``z`` is the per-head attention output before the output projection; ``mlp_neurons`` the input of the down projection.
- ``mlp_gate`` and ``mlp_up`` are the projections' outputs; the activation function acts on ``mlp_gate`` where there is
  one, else on ``mlp_up``.
- In a mixture of experts, ``mlp_neurons`` holds the neurons of every expert, expert after expert (neuron ``n`` of expert
  ``e`` is unit ``e * width + n``), before the router's weight; those of experts that a token is not sent to are zero.
  The router's logits are the output of its module, ``module:<layers>.<layer>.<router>``, and writing them changes the
  routing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from nsp.errors import InputError

Side = Literal["input", "output", "call", "experts"]
Fused = Literal["", "blocks", "interleaved", "grouped"]
Window = Literal["single", "by_type"]
INFERRED = "inferred"  # the variant of a table that no one wrote


def _always(_config: Any) -> bool:
    return True


@dataclass(frozen=True)
class Where:
    """One tensor inside a decoder layer, and which of its unit rows belong to a component.

    Attributes:
        module: path of the module relative to the layer (empty: the layer itself).
        side: whether the tensor is the module's ``input`` or its ``output``, the output of a ``call`` inside its forward
            code, or the neurons of fused ``experts``.
        index: element of a tuple output, or None where the output is the tensor.
        fused: how query, key and value heads share the tensor: ``blocks`` (all q heads, then k, then v),
            ``interleaved`` (q, k, v of head 0, then of head 1, ...), ``grouped`` (per key/value group: its q heads, k, v),
            or empty where the tensor holds one component. For gate and up, ``blocks`` is gate first.
        call: for the side ``call``: the call's name under nnsight's ``.source``.
        reused: later code adds to this very tensor in place, so that a read must copy it.
    """

    module: str
    side: Side
    index: int | None = None
    fused: Fused = ""
    call: str = ""
    reused: bool = False


@dataclass(frozen=True)
class SiteTable:
    """The sites of one family, or of a variant of it.

    Attributes:
        family: transformers' ``model_type`` of the language model.
        layers, final_norm, head, embedding: module paths from the root of the causal language model. ``final_norm`` is the
            module that receives the residual stream after the last layer.
        attention: the attention module's path relative to a layer.
        mlp: the path of an MLP that takes one tensor and returns one (the engine leaves out tokens that no longer
            matter there); empty where there is none.
        components: component name -> `Where`, in the order in which the forward pass reaches them.
        missing: component -> why it does not exist here.
        parallel: attention and MLP both read ``resid_pre``, so ``resid_mid`` does not exist.
        attention_call: what computes the attention pattern, under nnsight's ``.source`` of the attention module: a call that
            returns (output, pattern), or one that returns the pattern; ``a/b`` is call b inside the function a.
            Empty: there is no pattern to be had.
        branch: why the branch path does not apply, or empty where it does.
        window: how sliding windows enter the mask: ``single`` (one 4-D mask for all layers, windowed where the
            configuration says so) or ``by_type`` (a dict of masks by attention type).
        modules: sites that ``module:`` paths reach elsewhere than at the module's output (routers), by path in the layer.
        stream: why the residual stream is not the sum of what was added to it, or empty where it is.
        eager: why transformers' eager attention, which alone makes a pattern, is not what this model computes, or empty.
        variant, applies: the name of a variant, and whether a configuration belongs to it.
        notes: what a reader should know of this family.
    """

    family: str
    layers: str
    final_norm: str
    head: str
    embedding: str
    attention: str
    mlp: str
    components: Mapping[str, Where]
    missing: Mapping[str, str] = field(default_factory=dict)
    parallel: bool = False
    attention_call: str = "attention_interface_1"
    branch: str = ""
    window: Window = "single"
    modules: Mapping[str, Where] = field(default_factory=dict)
    stream: str = ""
    eager: str = ""
    variant: str = ""
    applies: Callable[[Any], bool] = field(default=_always, compare=False, repr=False)
    notes: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The family, with the variant where there is one."""
        return f"{self.family} ({self.variant})" if self.variant else self.family

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data; fields that hold their default are left out."""
        data: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "applies" or (
                value in ("", False, {}) and item.name not in ("attention_call", "components")
            ):
                continue
            if item.name in ("components", "modules"):
                value = {name: _where_to_dict(where) for name, where in value.items()}
            data[item.name] = dict(value) if isinstance(value, Mapping) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteTable:
        """The table that a recipe or a file states; raises InputError for keys that a table does not have."""
        known = {item.name: item for item in fields(cls) if item.name != "applies"}
        needed = ("family", "layers", "final_norm", "head", "embedding", "components")
        missing = [name for name in needed if name not in data]
        unknown = [name for name in data if name not in known]
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has unknown keys {', '.join(unknown)}"
            raise InputError(f"this site table {wrong}; its keys are {', '.join(known)}")
        values = {"attention": "", "mlp": "", **data}
        for name in ("components", "modules"):
            values[name] = {key: _where_from_dict(key, where) for key, where in values.get(name, {}).items()}
        if "attention_call" not in values:
            values["attention_call"] = cls.attention_call if values["attention"] else ""
        return cls(**values)


def _where_to_dict(where: Where) -> dict[str, Any]:
    values = {item.name: (getattr(where, item.name), item.default) for item in fields(where)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _where_from_dict(component: str, data: Mapping[str, Any]) -> Where:
    known = [item.name for item in fields(Where)]
    unknown = [name for name in data if name not in known]
    if unknown or "module" not in data or data.get("side") not in ("input", "output", "call", "experts"):
        raise InputError(
            f"site table, {component}: write module: <path in the layer>, side: input|output|call|experts and, where they "
            f"apply, {', '.join(known[2:])}; got {dict(data)}"
        )
    return Where(**data)
