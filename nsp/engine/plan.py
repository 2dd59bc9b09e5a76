"""A plan: everything that decides a run's numbers, as plain data. It prints, hashes, and round-trips through YAML and
JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from nsp.engine.estimates import Schedule
from nsp.html import Table, card, ranges
from nsp.models.loaded import Provenance


@dataclass(frozen=True)
class Plan:
    """What runs, on which model.

    Attributes:
        kind: ``trace`` or a recipe kind.
        model: the model's name, revision, hashes, dtype and quantisation.
        statement: the interventions, prompts and metrics (or the resolved recipe), JSON-able.
        schedule: how the engine will run it and at what cost; no part of the hash.
    """

    kind: str
    model: Mapping[str, Any]
    statement: Mapping[str, Any]
    schedule: Schedule | None = field(default=None, compare=False)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the numbers."""
        data = {"kind": self.kind, "model": self.model, "statement": self.statement}
        return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {"kind": self.kind, "model": dict(self.model), "statement": dict(self.statement)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote."""
        return cls(data["kind"], data["model"], data["statement"])

    def __hash__(self) -> int:
        return hash(self.hash)

    def __rich__(self) -> RenderableType:
        title = Text(
            f"{self.kind} on {self.model.get('name', '?')} ({self.model.get('dtype', '?')}), plan {self.hash[:12]}",
            style="bold",
        )
        if self.schedule is None:
            return title
        return Group(title, self.schedule)

    def describe(self, width: int = 120) -> RenderableType:
        """The plan as a rich renderable; ``width`` in columns of text decides what stands beside what."""
        title = self.__rich__()
        if self.schedule is None or width >= 100:
            return title
        return Text("\n".join(str(self).splitlines()))

    def __str__(self) -> str:
        lines = [f"{self.kind} on {self.model.get('name', '?')}, plan {self.hash[:12]}"]
        if self.schedule is not None:
            lines += self.schedule.lines()
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        model = {name: value for name, value in self.model.items() if name in _MODEL_FACTS and value is not None}
        facts = [("plan", self.hash[:12]), ("model", ", ".join(map(str, model.values())))]
        facts += [(name.replace("_", " "), _in_short(value)) for name, value in self.statement.items() if value not in (None, [], False)]
        estimates = () if self.schedule is None else self.schedule.estimates
        notes = [f"{one.title}: plain path, since {one.reason}" for one in estimates if one.path == "plain"]
        tables, lines = [], []
        if self.schedule is not None:
            tables = [Table("how it will run", Schedule.COLUMNS, self.schedule.rows())]
            lines = [f"about {self.schedule.seconds:.1f} s and {self.schedule.bytes / 1e6:.0f} MB beside the model"]
        return card("Plan", self.kind, facts=facts, lines=lines, notes=notes, tables=tables)


_MODEL_FACTS = ("name", "source", "revision", "dtype", "quantization")
_MOST_ITEMS = 6


def _in_short(value: Any) -> str:
    """A part of a statement in a line: numbers as ranges, entries by what names them, long lists by their length."""
    if isinstance(value, Mapping):
        if "op" in value:
            return f"{value['op']} {value['site']}"
        named = next((value[key] for key in ("name", "title", "component", "text") if value.get(key)), None)
        return str(named) if named is not None else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        if all(isinstance(item, int) for item in value):
            return ranges(value)
        parts = [_in_short(item) for item in value[:_MOST_ITEMS]]
        more = f" and {len(value) - _MOST_ITEMS} more" if len(value) > _MOST_ITEMS else ""
        return ("\n" if any(len(part) > 30 for part in parts) else ", ").join(parts) + more
    return str(value)


def model_statement(provenance: Provenance) -> dict[str, Any]:
    """What a plan says of its model: everything but the device, which changes no plan."""
    model = asdict(provenance)
    del model["device"]
    return model
