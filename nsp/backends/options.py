"""Where a model runs: the ``backend`` of a recipe, of ``nsp.load`` and of ``--backend``.

Written in short: ``local``, ``local-sim``, ``ndif``, ``ndif://host:port``, ``ndif+https://host``, ``ray``,
``ray://host:port``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from nsp.errors import InputError

KINDS = ("local", "local-sim", "ndif", "ray")
_URL = re.compile(r"(ndif|ndif\+https?|ray)://([\w.\-\[\]:]+?)(?::(\d+))?/?")


def named_backend(value: Any) -> Any:
    """A backend written as a text, as a mapping; a ValueError that says what would be valid."""
    if not isinstance(value, str):
        return value
    text = str(value)
    if text in KINDS:
        return {"kind": text}
    match = _URL.fullmatch(text)
    if match is None:
        raise ValueError(
            f"unknown backend {text!r}; there are {', '.join(KINDS)}, and with an address ndif://host:port and "
            "ray://host:port"
        )
    kind, host, port = match.groups()
    if kind == "ray":
        return {"kind": "ray", "host": f"ray://{host}:{port or 10001}"}
    # A bare name is a service on the web; a port, most often, a private server.
    scheme = kind.partition("+")[2] or ("http" if port else "https")
    return {"kind": "ndif", "host": f"{scheme}://{host}" + (f":{port}" if port else "")}


def _names(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


# Options are keys of dicts, so a mapping is kept as pairs.
Names = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_names, json_schema_input_type=dict[str, str]),
    PlainSerializer(dict, return_type=dict[str, str]),
]


class BackendOptions(BaseModel):
    """Which backend, and how to reach it. A bare text is the kind, or the kind with an address."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    kind: Literal["local", "local-sim", "ndif", "ray"] = "local"
    """local: this process; local-sim: a dry run of the remote path here; ndif: an NDIF server; ray: many workers."""
    host: str | None = None
    """ndif: the server, as http(s)://host:port; by default NDIF_HOST, else NDIF's own service. ray: the head's address
    ray://host:port; by default a cluster of this machine alone."""
    model: str | None = None
    """ndif: the name by which the server knows the model, where it is not the name given here."""
    models: Names = ()
    """ndif: the same for recipes with several models: {name given here: name on the server}."""
    key_variable: Annotated[str, Field(pattern=r"[A-Za-z_]\w*")] = "NDIF_API_KEY"
    """ndif: the environment variable that holds the key. A recipe never holds a key itself."""
    deadline: Annotated[float, Field(gt=0)] = 900.0
    """ndif: seconds that one job may take, the model's deployment included."""
    retries: Annotated[int, Field(ge=0, le=100)] = 6
    """ndif: how often a job is sent again after a transient fault, with pauses of 1, 2, 4 … 30 seconds."""
    workers: Annotated[int, Field(ge=1, le=4096)] = 2
    """ray: how many actors hold the model."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """ray: GPUs per actor (a fraction shares one)."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """ray: CPUs per actor."""
    inner: Annotated[BackendOptions | None, BeforeValidator(named_backend, json_schema_input_type=str | None)] = None
    """ray: the backend that each worker uses itself, such as ndif."""

    @model_validator(mode="after")
    def _fits(self) -> BackendOptions:
        fields = type(self).model_fields
        asked = {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}
        foreign = sorted(asked - _TAKES[self.kind] - {"kind"})
        if foreign:
            raise ValueError(f"backend {self.kind} takes no {foreign[0]!r}")
        if self.inner is not None and self.inner.kind == "ray":
            raise ValueError("inner: workers of ray cannot be clusters themselves; give local, local-sim or ndif")
        return self

    def server_name(self, name: str) -> str | None:
        """What the server calls the model that is ``name`` here, where the options say."""
        for here, there in self.models:
            if here == name or Path(here).expanduser().resolve() == Path(name).expanduser().resolve():
                return there
        return self.model

    def for_another(self) -> BackendOptions:
        """The same backend for a recipe's second model, which ``model`` does not name."""
        inner = None if self.inner is None else self.inner.for_another()
        return self.model_copy(update={"model": None, "inner": inner})

    @property
    def label(self) -> str:
        """The backend in short, without anything secret."""
        if self.host is None:
            return self.kind
        return self.host if self.kind == "ray" else f"{self.kind} at {self.host}"


_TAKES: dict[str, set[str]] = {
    "local": set(),
    "local-sim": set(),
    "ndif": {"host", "model", "models", "key_variable", "deadline", "retries"},
    "ray": {"host", "workers", "gpus", "cpus", "inner"},
}


Backend = Annotated[BackendOptions, BeforeValidator(named_backend, json_schema_input_type=str | BackendOptions)]


def backend_options(given: Any) -> BackendOptions:
    """The options that a text, a mapping or None (``local``) means; InputError where it means none."""
    if given is None:
        return BackendOptions()
    if isinstance(given, BackendOptions):
        return given
    try:
        return BackendOptions.model_validate(named_backend(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise InputError(f"backend: {place + ': ' if place else ''}{said}") from None
    except ValueError as error:
        raise InputError(f"backend: {error}") from None
