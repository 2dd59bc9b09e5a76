"""Interventions that belong to a run whatever else is done to it, made ready for any batch of its prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Writes
from nsp.engine.lowering import Operand, cells_of, resolve, write_columns
from nsp.engine.operands import make_operand
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.interventions import Intervention, Patch


@dataclass(frozen=True, eq=False)
class FixedInterventions:
    """Interventions that belong to a run whatever else is done to it: a model with some of its sites ablated.

    Attributes:
        interventions: in the order in which they act.
        operands: what each writes, found once for all prompts.
    """

    runtime: Runtime
    interventions: tuple[Intervention, ...]
    operands: tuple[Operand, ...]

    @classmethod
    def of(cls, runtime: Runtime, interventions: Iterable[Intervention], prompts: Sequence[Prompt]) -> FixedInterventions:
        """The interventions made ready for any batch of ``prompts`` (or of shorter ones)."""
        stated = tuple(interventions)
        for item in stated:
            if isinstance(item, Patch):
                raise InputError(f"patch {item.site}: a run's own interventions have no donor; ablate, scale or inject")
        operands = tuple(
            make_operand(runtime, item, resolve(runtime, item.site, prompts), prompts) for item in stated
        )
        return cls(runtime, stated, operands)

    def writes(self, prompts: Sequence[Prompt]) -> list[Writes]:
        """The writes in a batch of prompts; ``branch`` is the prompt's row."""
        cells = cells_of([], (), len(prompts))
        return [
            write_columns(resolve(self.runtime, item.site, prompts), operand, cells, moving=False)
            for item, operand in zip(self.interventions, self.operands, strict=True)
        ]
