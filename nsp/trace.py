"""``with model.trace(prompt) as t:`` collects statements; leaving the block runs them.

Everything stated is applied together in one counterfactual. ``t.sweep(...)`` instead makes one counterfactual for
each cell of the selectors' axes, with the other statements in every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Literal, Self

import torch
import xarray as xr

from nsp import interventions as make
from nsp.datasets.prompts import Prompt, encode
from nsp.datasets.tokens import continuation_ids, single_token
from nsp.engine.engine import Engine
from nsp.engine.estimates import Schedule
from nsp.engine.generation import Decoding, When
from nsp.engine.measured import Measured
from nsp.engine.measuring import Progress
from nsp.engine.plan import Plan, model_statement
from nsp.engine.receipts import Receipts, receipts_table
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.site_recordings import Recorded, record_counterfactuals
from nsp.errors import InputError
from nsp.html import card
from nsp.interventions import Ablate, Apply, Inject, Intervention, Patch, Scale
from nsp.metrics import METRICS, Metric
from nsp.models.loaded import LoadedModel
from nsp.progress import branch_bar
from nsp.results import baseline_variables, generated_dataset, overview, recorded_array, sweep_dataset
from nsp.sites import Site

_AXES = ("layer", "position", "unit")
_MOST_PROMPTS = 3  # that a notebook shows with their tokens


class Trace:
    """One counterfactual (or, with `sweep`, one for each cell), described in a ``with`` block and run on exit.

    After the block: ``results`` (an ``xarray.Dataset``, or a ``DataTree`` where several components were
        recorded), ``receipts`` (one an
    intervention) and ``plan``.
    """

    def __init__(
        self,
        runtime: Runtime,
        loaded: LoadedModel,
        prompt: Any,
        *,
        spans: Mapping[str, str] | None = None,
        path: Literal["auto", "branch", "plain"] = "auto",
        memory: str | float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._engine, self._loaded = Engine(runtime, memory), loaded
        self._many = is_batch(prompt)
        given = list(prompt) if self._many else [prompt]
        self._prompts = tuple(encode(loaded.tokenizer, one, spans=spans) for one in given)
        self._spans = spans
        if path not in ("auto", "branch", "plain"):
            raise InputError(f"trace: path is 'auto', 'branch' or 'plain', not {path!r}")
        self._path, self._progress = path, progress
        self._fixed: list[Intervention] = []
        self._swept: list[Intervention] = []
        self._axes: tuple[str, ...] = ()
        self._records: list[Site] = []
        self._metrics: list[Metric] = []
        self._decoding: tuple[Decoding, When] | None = None
        self._encoded: dict[int, Patch] = {}
        self._finished = False
        self._results: xr.Dataset | xr.DataTree | None = None
        self._receipts = Receipts()

    # --- statements -------------------------------------------------------------------------------------------------

    def patch(self, site: str | Site, *, donor: Any) -> None:
        """Replace the site by the donor's value: a prompt (one for each base prompt, or one for all), a recording or a
        tensor.
        """
        self._state(make.patch(site, donor=donor))

    def inject(
        self, site: str | Site, vector: Any, *, mode: Literal["add", "set"] = "add", coefficient: float = 1.0
    ) -> None:
        """Add ``coefficient * vector`` to the site, or set it."""
        self._state(make.inject(site, vector, mode=mode, coefficient=coefficient))

    def ablate(self, site: str | Site, kind: make.AblationKind = "zero", **options: Any) -> None:
        """Replace the site by zero, a mean, a resampled value or noise (options as in `nsp.ablate`)."""
        self._state(make.ablate(site, kind, **options))

    def scale(self, site: str | Site, factor: float) -> None:
        """Multiply the site by ``factor``."""
        self._state(make.scale(site, factor))

    def apply(self, site: str | Site, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Call a function of your own on the site's value (see `nsp.apply`)."""
        self._state(make.apply(site, function))

    def record(self, *sites: str | Site) -> None:
        """Keep the sites' values in the counterfactual run, as labelled arrays in ``results``."""
        self._open()
        self._records += [Site.parse(site) if isinstance(site, str) else site for site in sites]

    def measure(self, *metrics: Metric) -> None:
        """Measure metrics on the counterfactual run and on the base run."""
        self._open()
        for metric in metrics:
            if not isinstance(metric, Metric):
                raise InputError(
                    f"measure takes metrics such as nsp.logit_diff(' Mary', ' John'), not {type(metric).__name__}"
                )
            if metric.name in {other.name for other in self._metrics}:
                raise InputError(f"two metrics are named {metric.name!r}; give one of them name='…'")
            self._metrics.append(metric)

    def generate(
        self,
        max_new_tokens: int = 20,
        *,
        when: When = "prompt",
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: bool = True,
    ) -> None:
        """Generate text under the interventions: ``text`` and ``token_id`` (with dim step, -1 after the end) in ``results``.

        Args:
            when: whether interventions act on the ``prompt``, on every ``generated`` token (their layers and units, whatever
                their positions), or on ``both``.
            temperature, top_k, top_p, seed, stop: see `nsp.engine.generation.Decoding`; temperature 0 is greedy.
        """
        self._open()
        if when not in ("prompt", "generated", "both"):
            raise InputError(f"generate: when is 'prompt', 'generated' or 'both', not {when!r}")
        self._decoding = Decoding(max_new_tokens, temperature, top_k, top_p, seed, stop), when

    def sweep(self, *interventions: Intervention, axes: str | Sequence[str] | None = None) -> None:
        """One counterfactual for each cell of the selectors' axes.

        Axes are ``layer`` and ``position``, and ``unit`` (head or neuron) where the selector names units; ``axes``
        picks some, and the others are then applied together. Several interventions move together, cell by cell.
        """
        self._open()
        if self._swept:
            raise InputError("a trace has one sweep; give it several interventions, or open another trace")
        if not interventions:
            raise InputError("sweep needs an intervention, for example nsp.patch('resid_post[*] @ *', donor=…)")
        for item in interventions:
            if not isinstance(item, Patch | Inject | Ablate | Scale | Apply):
                raise InputError(f"sweep takes interventions such as nsp.patch(...), not {type(item).__name__}")
        if isinstance(axes, str):
            axes = (axes,)
        chosen = tuple(axes) if axes is not None else default_axes(interventions[0].site)
        for axis in chosen:
            if axis not in _AXES:
                raise InputError(f"sweep: unknown axis {axis!r}; axes are {', '.join(_AXES)}")
        if not chosen:
            raise InputError("sweep needs at least one axis; without one, state the intervention itself")
        self._swept = list(interventions)
        self._axes = tuple(axis for axis in _AXES if axis in chosen)

    def add(self, *interventions: Intervention) -> None:
        """State interventions made elsewhere (`nsp.patch`, `nsp.ablate`, ...)."""
        for item in interventions:
            self._state(item)

    def _state(self, intervention: Intervention) -> None:
        self._open()
        self._fixed.append(intervention)

    def _open(self) -> None:
        if self._finished:
            raise InputError("this trace has run; open another one to state more")

    # --- running ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.run()

    def run(self) -> xr.Dataset | xr.DataTree:
        """Run what was stated (leaving the ``with`` block does this)."""
        self._open()
        request = self.request()
        self._finished = True
        if self._swept:
            if self._decoding is not None and not self._metrics:
                self._results = self._generated(request)
                return self._results
            with self._bar() as advance:
                measured = self._engine.measure(self._engine.plan(request), progress=advance)
            self._results = sweep_dataset(
                measured, self._metrics, self._prompts, outer=self._outer, interventions=[*self._swept, *self._fixed]
            )
        else:
            measured, recorded = record_counterfactuals(self._engine.runtime, request, self._records, self._engine.budget)
            self._results = self._single_results(measured, recorded)
        self._receipts = Receipts(measured.receipts)
        if self._decoding is not None:
            if not isinstance(self._results, xr.Dataset):
                raise InputError("generate and several records do not fit one trace; generate in a trace of its own")
            self._results = self._results.merge(self._generated(request))
        self._results.attrs |= self._attrs(measured)
        return self._results

    def _generated(self, request: Request) -> xr.Dataset:
        assert self._decoding is not None
        decoding, when = self._decoding
        ensure_checked(self._engine.runtime)
        branches = self._engine.plan(replace(request, metrics=(), tokens=(), reference=None, path="auto"))
        with self._bar() as advance:
            tokens = self._engine.generate(branches, decoding, when=when, progress=advance)
        method = f"{'greedy' if decoding.temperature == 0 else 'sampled'} generation, interventions on {when}"
        return generated_dataset(tokens, self._prompts, self._loaded.tokenizer, method, outer=self._outer)

    def _bar(self) -> AbstractContextManager[Progress | None]:
        return branch_bar() if self._progress is None else nullcontext(self._progress)

    def request(self) -> Request:
        """What the engine will run."""
        if self._swept and self._records:
            raise InputError("record keeps one counterfactual's values; a sweep has many: record in a trace without sweep")
        if self._swept and not self._metrics and self._decoding is None:
            raise InputError("a sweep needs something to measure: add a metric, for example logit_diff(' Mary', ' John')")
        swept, fixed = tuple(map(self._with_prompts, self._swept)), tuple(map(self._with_prompts, self._fixed))
        donors = [item.donor for item in (*swept, *fixed) if isinstance(item, Patch) and isinstance(item.donor, tuple)]
        return Request(
            bases=self._prompts,
            swept=swept,
            fixed=fixed,
            axes=self._axes,
            reference=donors[0] if donors else None,
            metrics=tuple(self._metrics),
            tokens=tuple(self._tokens_of(metric) for metric in self._metrics),
            path=self._path,
        )

    @property
    def _outer(self) -> str | None:
        return "prompt" if self._many else None

    def _with_prompts(self, item: Intervention) -> Intervention:
        """The intervention with its donor prompts encoded, one for each base: equal plans are equal counterfactuals."""
        if not isinstance(item, Patch):
            return item
        known = self._encoded.get(id(item))
        if known is None:
            known = self._encoded[id(item)] = Patch(item.site, self._donor_of(item))
        return known

    def _donor_of(self, item: Patch) -> Any:
        donor = item.donor
        if isinstance(donor, Trace):
            raise InputError(
                "patch: give a recording of the other trace, for example donor=other.results['resid_post']"
            )
        if isinstance(donor, xr.DataArray) or (isinstance(donor, torch.Tensor) and donor.is_floating_point()):
            return donor
        if isinstance(donor, xr.Dataset | xr.DataTree):
            raise InputError("patch: name the recorded component, for example donor=other.results['resid_post']")
        given = list(donor) if is_batch(donor) else [donor] * len(self._prompts)
        if len(given) != len(self._prompts):
            raise InputError(
                f"patch: {len(given)} donors for {len(self._prompts)} prompts; give one donor, or one for each prompt"
            )
        return tuple([encode(self._loaded.tokenizer, prompt, spans=self._spans_in(prompt)) for prompt in given])

    def _spans_in(self, donor: Any) -> Mapping[str, str] | None:
        # A donor has the trace's spans where their text occurs in it; alignment complains where one is needed and
        # missing.
        if self._spans is None or not isinstance(donor, str):
            return None
        return {name: text for name, text in self._spans.items() if donor.count(text) == 1}

    def _tokens_of(self, metric: Metric) -> torch.Tensor | None:
        if METRICS[metric.kind].tokens == 0:
            return None
        if not metric.tokens:
            raise InputError(f"{metric.name}: name its token(s), for example nsp.{metric.kind}(' Mary'…)")
        return torch.tensor([token_ids(self._loaded.tokenizer, metric)] * len(self._prompts))

    def _single_results(self, measured: Measured, recorded: Sequence[Recorded]) -> xr.Dataset | xr.DataTree:
        variables = {}
        for number, metric in enumerate(self._metrics):
            values = measured.by_branch[number]
            kind = METRICS[metric.kind]
            variables[metric.name] = xr.DataArray(
                values if self._many else values[0],
                dims=["prompt"] if self._many else [],
                attrs={
                    "long_name": kind.long_name,
                    "units": kind.units,
                    "method": "one exact counterfactual; plain path",
                },
            )
        variables |= baseline_variables(measured, self._metrics, self._outer)
        root = xr.Dataset(variables)
        arrays = [
            recorded_array(one, self._prompts, self._outer, has_units=one.resolved.site.spec.has_heads)
            for one in recorded
        ]
        names = [array.name for array in arrays]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{repeated} is recorded twice; select all its layers and positions in one record")
        if len(arrays) <= 1:
            return root.merge(arrays[0].to_dataset()) if arrays else root
        groups: dict[str, xr.Dataset] = {"/": root}
        return xr.DataTree.from_dict(
            {**groups, **{f"activations/{array.name}": array.to_dataset() for array in arrays}}
        )

    def _attrs(self, measured: Measured) -> dict[str, Any]:
        return {
            "model": self._loaded.name,
            "plan_hash": self.plan.hash,
            "path": measured.path,
            "path_reason": measured.reason,
            "prompts": [prompt.text if prompt.text is not None else "" for prompt in self._prompts],
        }

    # --- what came of it --------------------------------------------------------------------------------------------

    @property
    def results(self) -> Any:
        """The results, labelled: a Dataset, or a DataTree with groups ``activations/<component>`` where several were
        recorded.
        """
        if self._results is None:
            raise InputError("the trace has not run yet; its results are there after the with block")
        return self._results

    @property
    def receipts(self) -> Receipts:
        """The evidence of what each intervention did, swept ones first."""
        if self._results is None:
            raise InputError("the trace has not run yet; its receipts are there after the with block")
        return self._receipts

    @property
    def plan(self) -> Plan:
        """The plan: what was stated, hashable, printable, round-trips through `Plan.to_dict`."""
        statement = {
            "prompts": [make.prompt_to_dict(prompt) for prompt in self._prompts],
            "batch": self._many,
            "swept": [make.to_dict(self._with_prompts(item)) for item in self._swept],
            "axes": list(self._axes),
            "fixed": [make.to_dict(self._with_prompts(item)) for item in self._fixed],
            "record": [str(site) for site in self._records],
            "metrics": [metric.to_dict() for metric in self._metrics],
            "generate": None if self._decoding is None else {**asdict(self._decoding[0]), "when": self._decoding[1]},
            "path": self._path,
        }
        model = model_statement(self._loaded.provenance)
        return Plan("trace", model, statement)

    def dry_run(self) -> Plan:
        """The plan with its schedule: passes, branches, tokens, share of the naive cost, time and memory. Runs no
        forward pass.
        """
        title = ", ".join(str(item.site) for item in self._swept) or "one counterfactual"
        estimate = self._engine.estimate(self._engine.plan(self.request()), title)
        plan = self.plan
        return Plan(plan.kind, plan.model, plan.statement, Schedule((estimate,)))

    def __repr__(self) -> str:
        state = "ran" if self._finished else "not run yet"
        stated = [f"sweep {item.op} {item.site}" for item in self._swept] + [
            f"{item.op} {item.site}" for item in self._fixed
        ]
        return f"Trace({self._loaded.name!r}, {len(self._prompts)} prompt(s), {'; '.join(stated) or 'no intervention'}; {state})"

    def _repr_html_(self) -> str:
        facts: list[tuple[str, Any]] = [("prompt", prompt.shown()) for prompt in self._prompts[:_MOST_PROMPTS]]
        if len(self._prompts) > _MOST_PROMPTS:
            facts.append(("", f"and {len(self._prompts) - _MOST_PROMPTS} more prompts"))
        facts += [(f"sweep over {', '.join(self._axes)}", f"{item.op} {item.site}") for item in self._swept]
        facts += [("intervention", f"{item.op} {item.site}") for item in self._fixed]
        facts += [("record", str(site)) for site in self._records]
        facts += [("measure", metric.name) for metric in self._metrics]
        if self._results is None:
            return card("Trace", self._loaded.name, facts=facts, notes=["not run yet: it runs when its with block ends"])
        tables = [overview(self._results), receipts_table(self._receipts)]
        return card("Trace", self._loaded.name, facts=facts, tables=tables)


def token_ids(tokenizer: Any, metric: Metric) -> list[int]:
    """The token ids of a metric's own tokens: one token each, or a continuation's."""
    if METRICS[metric.kind].several:
        return list(continuation_ids(tokenizer, metric.tokens))
    return [single_token(tokenizer, token) for token in metric.tokens]


def default_axes(site: Site) -> tuple[str, ...]:
    """The axes a selector is swept over: layer and position where it has them, unit where it names units."""
    return (*site.spec.sweep_axes, *(("unit",) if site.units is not None else ()))


def is_batch(prompt: Any) -> bool:
    """Whether a prompt argument is several prompts: a list of texts, of `Prompt` values, of id lists or of message
    lists.
    """
    if isinstance(prompt, str | Prompt | torch.Tensor) or not isinstance(prompt, Sequence) or not prompt:
        return False
    first = prompt[0]
    if isinstance(first, str | Prompt):
        return True
    return isinstance(first, Sequence | torch.Tensor) and not isinstance(first, str)
