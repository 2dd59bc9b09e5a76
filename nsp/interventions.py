"""The interventions: small frozen values that say what is done at a site, and run nothing.

``patch`` replaces a site's value by another run's, ``inject`` adds or sets a vector, ``ablate`` replaces by zero, a
mean, a resampled value or noise, or projects a direction out, ``scale`` multiplies, ``apply`` calls a function of one's own. A trace or a recipe
collects these values; the engine decides how to run them.
"""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import importlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
import xarray as xr

from nsp.errors import InputError
from nsp.sites import Site

AblationKind = Literal["zero", "mean", "resample", "noise", "direction"]
ABLATION_KINDS: tuple[str, ...] = ("zero", "mean", "resample", "noise", "direction")
Over = Literal["tokens", "prompts"]


@dataclass(frozen=True)
class Noise:
    """Seeded Gaussian noise as the vector of an ``inject`` (causal tracing: Meng et al. 2022).

    Attributes:
        scale: standard deviation, in units of the token embedding's standard deviation.
        seed: the draw; the same seed, site and prompt give the same noise on one machine.
    """

    scale: float = 3.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Patch:
    """Replace a site's value by the donor's value at the matching site.

    The donor is a prompt (text, chat messages, token ids: run through the same model), a floating-point tensor, or a
    labelled recording (an ``xarray.DataArray`` from another trace, of this model or of another).
    """

    site: Site
    donor: Any
    op = "patch"


@dataclass(frozen=True, eq=False)
class Inject:
    """Add ``coefficient * vector`` to a site, or set the site to it."""

    site: Site
    vector: torch.Tensor | Noise
    mode: Literal["add", "set"] = "add"
    coefficient: float = 1.0
    op = "inject"


@dataclass(frozen=True, eq=False)
class Ablate:
    """Replace a site's value by zero, a mean, a resampled value or Gaussian noise, or take a direction out of it.

    Attributes:
        kind: ``zero``; ``mean`` over the reference prompts; ``resample`` draws a value from them; ``noise`` draws
            from a Gaussian with ``scale`` times the token embedding's standard deviation; ``direction`` projects the
            value onto the complement of a direction, ``x - (x . d) d`` with ``d`` of length 1.
        reference: prompts for ``mean`` and ``resample``; None takes nsp's small set of neutral sentences. For ``mean``
            also a recording of means (an ``xarray.DataArray`` with dims (layer, neuron), or (layer, head, neuron)).
        over: ``tokens`` takes the mean (or the draw) over all tokens of all reference prompts, ``prompts`` over the
            prompts at the same position, which needs reference prompts of the base prompt's length.
        seed: for ``resample`` and ``noise``.
        direction: for ``direction``, a vector of the site's width (or of one unit's), of any length but 0; or one for
            each position, (position, width), or each base prompt, (prompt, 1 or position, width).
    """

    site: Site
    kind: AblationKind = "zero"
    reference: tuple[Any, ...] | xr.DataArray | None = None
    over: Over = "tokens"
    scale: float = 1.0
    seed: int = 0
    direction: torch.Tensor | None = None
    op = "ablate"


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply a site by ``factor``: 0 knocks out, 1 changes nothing, 2 amplifies."""

    site: Site
    factor: float
    op = "scale"


@dataclass(frozen=True, eq=False)
class Apply:
    """Call a function of one's own on a site's value.

    The function takes a tensor with dims (position, width), the value at the site's positions, one call a unit where
    the site names units, and returns a tensor of the same shape.
    """

    site: Site
    function: Callable[[torch.Tensor], torch.Tensor]
    op = "apply"


Intervention: TypeAlias = Patch | Inject | Ablate | Scale | Apply


def patch(site: str | Site, *, donor: Any) -> Patch:
    """Replace the site's value by the donor's (see `Patch`)."""
    if donor is None:
        raise InputError("patch needs a donor: a prompt, a recording of another trace, or a tensor")
    # A statement keeps its values: a buffer that the caller fills again must not reach into it.
    if isinstance(donor, torch.Tensor):
        donor = donor.clone()
    elif isinstance(donor, xr.DataArray):
        donor = donor.copy(deep=True)
    elif isinstance(donor, list):
        donor = copy.deepcopy(donor)
    return Patch(_writable(site), donor)


def inject(site: str | Site, vector: Any, *, mode: Literal["add", "set"] = "add", coefficient: float = 1.0) -> Inject:
    """Add ``coefficient * vector`` to the site, or set it (``mode="set"``).

    ``vector`` has the width of the site (or of one unit), or (position, width), or (prompt, 1 or position, width) with
    one for each base prompt; or it is a `Noise`.
    """
    if mode not in ("add", "set"):
        raise InputError(f"inject: mode is 'add' or 'set', not {mode!r}")
    if isinstance(vector, xr.DataArray):
        vector = torch.as_tensor(np.asarray(vector.values))
    if not isinstance(vector, Noise):
        vector = torch.as_tensor(vector, dtype=torch.float32).clone()
        if not torch.isfinite(vector).all():
            raise InputError("inject: the vector holds NaN or infinity")
    return Inject(_writable(site), vector, mode, float(coefficient))


def ablate(
    site: str | Site,
    kind: AblationKind = "zero",
    *,
    reference: Sequence[Any] | xr.DataArray | str | Path | None = None,
    over: Over = "tokens",
    scale: float = 1.0,
    seed: int = 0,
    direction: Any = None,
) -> Ablate:
    """Replace the site's value by zero, a mean, a resampled value or noise, or take a direction out (see `Ablate`).

    A ``reference`` that is a path is a store of mean activations (`nsp.experiments.mean_activations`).
    """
    if kind not in ABLATION_KINDS:
        raise InputError(f"ablate: kind is one of {', '.join(ABLATION_KINDS)}, not {kind!r}")
    if over not in ("tokens", "prompts"):
        raise InputError(f"ablate: over is 'tokens' or 'prompts', not {over!r}")
    place = _writable(site)
    if (direction is not None) != (kind == "direction"):
        raise InputError(f"ablate: kind {kind!r} takes {'a' if kind == 'direction' else 'no'} direction")
    if kind == "direction":
        return Ablate(place, kind, direction=_direction(direction))
    if isinstance(reference, str | Path):
        reference = _kept_means(reference, place.component)
    if isinstance(reference, xr.DataArray):
        if kind != "mean":
            raise InputError(f"ablate: a recording of means serves kind 'mean'; {kind!r} takes prompts as its reference")
        return Ablate(place, kind, reference.copy(deep=True), over, float(scale), int(seed))
    if reference is not None and len(reference) == 0:
        raise InputError("ablate: the reference prompt set is empty")
    return Ablate(place, kind, None if reference is None else tuple(reference), over, float(scale), int(seed))


def _direction(given: Any) -> torch.Tensor:
    """A direction (or several) as float32; an InputError where it points nowhere."""
    if isinstance(given, xr.DataArray):
        given = np.asarray(given.values)
    vector = torch.as_tensor(given, dtype=torch.float32).clone()
    if not torch.isfinite(vector).all():
        raise InputError("ablate: the direction holds NaN or infinity")
    if vector.dim() == 0 or vector.numel() == 0 or not vector.any(dim=-1).all():
        raise InputError("ablate: the direction is zero, so it points nowhere")
    return vector


def _kept_means(store: str | Path, component: str) -> xr.DataArray:
    """The means of one component in a store of kind mean-activations."""
    from nsp.stores import open_run

    run = open_run(store)
    if run.kind != "mean-activations":
        raise InputError(f"{store} is a run of kind {run.kind!r}; means are kept by runs of kind 'mean-activations'")
    held = list(run.tree["activations"].children)
    if component not in held:
        raise InputError(f"{store} holds no means of {component}; it has {', '.join(held)}")
    means: xr.DataArray = run.tree[f"activations/{component}"].to_dataset()["mean"].load()
    return means


def scale(site: str | Site, factor: float) -> Scale:
    """Multiply the site by ``factor``."""
    return Scale(_writable(site), float(factor))


def apply(site: str | Site, function: Callable[[torch.Tensor], torch.Tensor]) -> Apply:
    """Call ``function`` on the site's value (see `Apply`)."""
    if not callable(function):
        raise InputError(f"apply: expected a function, got {type(function).__name__}")
    return Apply(_writable(site), function)


def _writable(site: str | Site) -> Site:
    parsed = Site.parse(site) if isinstance(site, str) else site
    if parsed.component == "logits":
        raise InputError(
            "logits can be recorded and measured, not intervened on; intervene on resid_post of the last layer"
        )
    return parsed


def array_to_dict(array: torch.Tensor) -> dict[str, Any]:
    """A tensor as plain data: shape, float32 bytes in base64, and their SHA-256."""
    raw = array.detach().to(torch.float32).cpu().contiguous().numpy().tobytes()
    return {
        "shape": list(array.shape),
        "float32": base64.b64encode(raw).decode("ascii"),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def array_from_dict(data: Mapping[str, Any]) -> torch.Tensor:
    """The tensor that `array_to_dict` wrote."""
    raw = base64.b64decode(data["float32"])
    return torch.from_numpy(np.frombuffer(raw, dtype=np.float32).reshape(data["shape"]).copy())


def to_dict(intervention: Intervention) -> dict[str, Any]:
    """An intervention as plain data that YAML and JSON can hold, and that `from_dict` reads back."""
    data: dict[str, Any] = {"op": intervention.op, "site": str(intervention.site)}
    if isinstance(intervention, Patch):
        data["donor"] = _donor_to_dict(intervention.donor)
    elif isinstance(intervention, Inject):
        vector = intervention.vector
        data["vector"] = (
            {"noise": vector.scale, "seed": vector.seed} if isinstance(vector, Noise) else array_to_dict(vector)
        )
        data |= {"mode": intervention.mode, "coefficient": intervention.coefficient}
    elif isinstance(intervention, Ablate):
        reference = intervention.reference
        data |= {
            "kind": intervention.kind,
            "reference": _reference_to_dict(reference),
            "over": intervention.over,
            "scale": intervention.scale,
            "seed": intervention.seed,
        }
        if intervention.direction is not None:
            data["direction"] = array_to_dict(intervention.direction)
    elif isinstance(intervention, Scale):
        data["factor"] = intervention.factor
    else:
        data["function"] = function_identity(intervention.function)
    return data


def from_dict(data: Mapping[str, Any], prompt_of: Callable[[Mapping[str, Any]], Any] | None = None) -> Intervention:
    """The intervention that `to_dict` wrote; an ``apply`` is found again by ``module:name``.

    ``prompt_of`` makes a stored prompt (its text, token ids and spans) a prompt again; by default its token ids are
    taken.
    """
    op, site = data["op"], data["site"]
    if op == "patch":
        return patch(site, donor=_donor_from_dict(data["donor"], prompt_of))
    if op == "inject":
        vector = data["vector"]
        value = Noise(vector["noise"], vector["seed"]) if "noise" in vector else array_from_dict(vector)
        return inject(site, value, mode=data["mode"], coefficient=data["coefficient"])
    if op == "ablate":
        reference = data["reference"]
        given = _donor_from_dict(reference, prompt_of) if isinstance(reference, Mapping) else reference
        if isinstance(given, list):
            given = [_donor_from_dict(item, prompt_of) for item in given]
        if "direction" in data:
            return ablate(site, data["kind"], direction=array_from_dict(data["direction"]))
        return ablate(site, data["kind"], reference=given, over=data["over"], scale=data["scale"], seed=data["seed"])
    if op == "scale":
        return scale(site, data["factor"])
    if op == "apply":
        return apply(site, _function_from_dict(data["function"]))
    raise InputError(f"unknown intervention {op!r}; nsp has patch, inject, ablate, scale, apply")


def _reference_to_dict(reference: tuple[Any, ...] | xr.DataArray | None) -> Any:
    if reference is None or isinstance(reference, xr.DataArray):
        return None if reference is None else _recording_to_dict(reference)
    return [_donor_to_dict(item) for item in reference]


def function_identity(function: Any) -> dict[str, Any]:
    """Where a function can be imported from, and a digest of what it does where that can be read."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    found = None
    if module and name and "<" not in name and module != "__main__":
        found = f"{module}:{name}"
    digest = hashlib.sha256()
    _feed(digest, function)
    return {"name": found, "digest": digest.hexdigest()}


def _feed(digest: Any, value: Any) -> None:
    """Feed what a value does to a digest: code without addresses, tensors and arrays by their bytes, modules by their
    weights.
    """
    if isinstance(value, types.CodeType):
        digest.update(value.co_code)
        for part in (*value.co_consts, *value.co_names):
            _feed(digest, part)
    elif isinstance(value, torch.nn.Module):
        digest.update(type(value).__qualname__.encode())
        for name, tensor in value.state_dict().items():
            digest.update(name.encode())
            _feed(digest, tensor)
    elif isinstance(value, torch.Tensor):
        _feed(digest, value.detach().float().cpu().numpy())
    elif isinstance(value, np.ndarray):
        digest.update(str((value.shape, value.dtype)).encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, types.FunctionType):
        _feed(digest, value.__code__)
        for part in (*(value.__defaults__ or ()), *(cell.cell_contents for cell in value.__closure__ or ())):
            _feed(digest, part)
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *sorted(value.keywords.items())):
            _feed(digest, part)
    elif isinstance(value, tuple | list | frozenset):
        for part in sorted(value, key=repr) if isinstance(value, frozenset) else value:
            _feed(digest, part)
    elif isinstance(value, types.MethodType):
        _feed(digest, value.__func__)
        _feed(digest, value.__self__)
    elif getattr(value, "__qualname__", None):
        digest.update(f"{getattr(value, '__module__', '')}:{value.__qualname__}".encode())
    else:
        # An object's default text holds its address, which says nothing about it.
        text = repr(value)
        digest.update((type(value).__qualname__ if " at 0x" in text else text).encode())


def _function_from_dict(data: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    if data["name"] is None:
        raise InputError(
            "apply: the plan's function has no importable name (a lambda, a local or a notebook's function), so it cannot be run again"
        )
    module, _, name = data["name"].partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError):
        raise InputError(f"apply: cannot import {data['name']!r}; name a function as module:function") from None
    return cast(Callable[[torch.Tensor], torch.Tensor], function)


def prompt_to_dict(prompt: Any) -> dict[str, Any]:
    """An encoded prompt as plain data: its text, token ids and spans (name -> positions)."""
    spans = {name: list(positions) for name, positions in getattr(prompt, "spans", ())}
    return {"text": prompt.text, "token_ids": [int(token) for token in prompt.token_ids], "spans": spans}


def _donor_to_dict(donor: Any) -> Any:
    if isinstance(donor, torch.Tensor) and donor.is_floating_point():
        return {"tensor": array_to_dict(donor)}
    if isinstance(donor, xr.DataArray):
        return _recording_to_dict(donor)
    if isinstance(donor, str):
        return donor
    if hasattr(donor, "token_ids"):
        return prompt_to_dict(donor)
    if isinstance(donor, torch.Tensor):
        return {"text": None, "token_ids": [int(token) for token in donor.reshape(-1)], "spans": {}}
    if isinstance(donor, Sequence) and donor:
        if isinstance(donor[0], Mapping):
            return {"messages": [dict(message) for message in donor]}
        if isinstance(donor[0], int):
            return {"text": None, "token_ids": [int(token) for token in donor], "spans": {}}
        return {"prompts": [_donor_to_dict(one) for one in donor]}
    raise InputError(
        f"patch: a donor is a prompt, a list of prompts, a recording or a tensor, not {type(donor).__name__}"
    )


def _recording_to_dict(donor: xr.DataArray) -> dict[str, Any]:
    label = "token_position" if "token_position" in donor.coords else "position"
    names = {"layer": "layer", "position": label, "head": "head", "neuron": "neuron"}
    coords = {
        dim: [int(value) for value in donor[name].values]
        for dim, name in names.items()
        if dim in donor.dims and name in donor.coords and donor[name].ndim == 1
    }
    values = torch.as_tensor(np.ascontiguousarray(donor.values))
    return {"recording": {"name": str(donor.name), "dims": list(donor.dims), "coords": coords, **array_to_dict(values)}}


def _donor_from_dict(data: Any, prompt_of: Callable[[Mapping[str, Any]], Any] | None) -> Any:
    if isinstance(data, str):
        return data
    if "tensor" in data:
        return array_from_dict(data["tensor"])
    if "recording" in data:
        stored = data["recording"]
        return xr.DataArray(
            array_from_dict(stored).numpy(), dims=stored["dims"], coords=stored["coords"], name=stored["name"]
        )
    if "messages" in data:
        return data["messages"]
    if "prompts" in data:
        return [_donor_from_dict(one, prompt_of) for one in data["prompts"]]
    return data["token_ids"] if prompt_of is None else prompt_of(data)
