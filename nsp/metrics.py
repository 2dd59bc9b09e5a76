"""What is measured on a run: frozen values, computed in float32 (or better) by the engine.

Each metric is one row of the table at the end, which is also what makes one: ``nsp.logit(" Mary")`` is the `Metric` that a
recipe writes ``{kind: logit, tokens: [" Mary"]}``. Most metrics read the logits at one position (the last by default) and are
one branch of `nsp.engine.kernels.metric_values`; ``cross_entropy`` reads as many positions as its continuation has tokens,
and ``projection`` reads the residual stream.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from nsp.errors import InputError, suggestion
from nsp.sites import Selection

Token = str | int
Reference = Literal["donor", "base"]
Needs = Literal["tokens", "full", "stream"]


@dataclass(frozen=True)
class Metric:
    """One metric of a run.

    Attributes:
        kind: a key of `METRICS`.
        tokens: the answer (and the distractor), as text that is one token, or as token ids; empty where a pair
            supplies them. For ``cross_entropy`` the continuation: a text of several tokens, or several.
        reference: for distances, the run that they are measured from: ``donor`` (the run patched from) or ``base``.
        position: the position whose next-token distribution (for ``projection``: residual stream) is measured, as a
            selector ("last", "-1", "9", a span). A continuation begins after the last token.
        name: the variable's name in results; the kind unless several metrics share it.
        layer: for ``projection``, the layer whose ``resid_post`` is read.
        direction: for ``projection``, numbers of dims (width); only where it points matters.
        function: for ``function``, ``module:function``, or the function: it takes float32 logits (row, token), in as
            many calls as it takes to cover all rows, and returns one number per row, (row,).
    """

    kind: str
    tokens: tuple[Token, ...] = ()
    reference: Reference = "donor"
    position: str = "last"
    name: str = ""
    layer: int | None = None
    direction: tuple[float, ...] = ()
    function: str | Callable[[Any], Any] = ""

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            raise InputError(f"unknown metric {self.kind!r}{suggestion(self.kind, METRICS)} (nsp has {', '.join(METRICS)})")
        kind = METRICS[self.kind]
        # numpy's integers are numbers too, but not plain data.
        tokens = tuple(token if isinstance(token, str) else operator.index(token) for token in self.tokens)
        object.__setattr__(self, "tokens", tokens)
        if self.tokens and not (len(self.tokens) == kind.tokens or ((kind.several or kind.anyof) and len(self.tokens) > kind.tokens)):
            raise InputError(f"{self.kind} takes {kind.tokens} token(s), got {len(self.tokens)}: {list(self.tokens)}")
        if self.reference not in ("donor", "base"):
            raise InputError(f"{self.kind}: reference is 'donor' or 'base', not {self.reference!r}")
        if kind.change:
            object.__setattr__(self, "reference", "base")
        _ = self.selection  # an error where it is none
        if kind.several and self.position not in ("last", "-1"):
            raise InputError(f"{self.kind}: the continuation begins after the last token; leave position out")
        self._check_settings(kind)
        if not self.name:
            object.__setattr__(self, "name", self.kind)

    def _check_settings(self, kind: MetricKind) -> None:
        for setting, given in (("direction", len(self.direction) > 0), ("function", bool(self.function))):
            if given != (kind.setting == setting):
                raise InputError(f"{self.kind} {'takes no' if given else 'needs a'} {setting}")
        if (self.layer is not None) != (kind.setting == "direction"):
            raise InputError(f"{self.kind} {'takes no layer' if self.layer is not None else 'needs a layer, such as 12'}")
        if self.layer is not None:
            object.__setattr__(self, "layer", operator.index(self.layer))
        object.__setattr__(self, "direction", _direction(self.direction))
        if isinstance(self.function, str) and self.function and not all(self.function.partition(":")):
            raise InputError(f"function: write module:function, not {self.function!r}")

    @property
    def needs(self) -> Literal["tokens", "full", "stream"]:
        return METRICS[self.kind].needs

    @property
    def selection(self) -> Selection:
        return Selection.of(self.position)

    def called(self) -> Callable[[Any], Any]:
        """The function of a ``function``, imported (the working directory's modules too)."""
        return _imported(self.function) if isinstance(self.function, str) else self.function

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "kind": self.kind,
            "tokens": list(self.tokens),
            "reference": self.reference,
            "position": self.position,
            "name": self.name,
        }
        if self.layer is not None:
            data |= {"layer": self.layer, "direction": list(self.direction)}
        if self.function:
            named = self.function
            data["function"] = named if isinstance(named, str) else f"{named.__module__}:{named.__qualname__}"
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Metric:
        return cls(**{**data, "tokens": tuple(data["tokens"]), "direction": tuple(data.get("direction", ()))})


def _direction(given: Any) -> tuple[float, ...]:
    values = given.tolist() if hasattr(given, "tolist") else list(given)
    if any(isinstance(value, list) for value in values):
        raise InputError("direction: give one vector, of dims (width)")
    numbers = tuple(map(float, values))
    if not all(map(math.isfinite, numbers)):
        raise InputError("direction: it holds NaN or infinity")
    if numbers and not any(numbers):
        raise InputError("direction: all its numbers are zero, so it points nowhere")
    return numbers


def _imported(name: str) -> Callable[[Any], Any]:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path  # nsp as a command does not look for modules where it was started
    if added:
        sys.path.append(here)
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"function: cannot import {name!r} ({error}); name a function as module:function, in a module that Python "
            "finds (installed, or in the working directory)"
        ) from None
    finally:
        if added:
            sys.path.remove(here)
    if not callable(function):
        raise InputError(f"function: {name!r} is a {type(function).__name__}, not a function")
    imported: Callable[[Any], Any] = function
    return imported


@dataclass(frozen=True, repr=False)
class MetricKind:
    """A row of the table of metrics. Calling it makes a `Metric`; the subclasses say with which arguments.

    Attributes:
        kind: its name in recipes and results.
        needs: how much of the vocabulary is projected: ``tokens`` only the named entries, ``full`` all of it (in chunks),
            ``stream`` none.
        units, long_name: as results say them.
        tokens: how many tokens it takes; ``several``: that many or more, one after another; ``anyof``: a set of that many
            or more.
        reference: it is measured from another run's logits, the base run's wherever ``change`` is set.
        distance: it is zero where the run is the reference run.
        setting: the field of `Metric` that it cannot do without, or empty.
        takes: what its arguments mean.
    """

    kind: str
    needs: Needs
    units: str
    long_name: str
    tokens: ClassVar[int] = 0
    several: ClassVar[bool] = False
    anyof: ClassVar[bool] = False
    reference: ClassVar[bool] = False
    change: ClassVar[bool] = False
    distance: bool = False
    setting: ClassVar[str] = ""
    takes: ClassVar[Mapping[str, str]] = {}
    __call__: ClassVar[Callable[..., Metric]]

    def __post_init__(self) -> None:
        units = "" if self.units == "1" else f", in {self.units}"
        text = f"{self.long_name[0].upper()}{self.long_name[1:]}{units}.\n\nArgs:\n"
        taken = {name: _ARGUMENTS.get(name, self.takes.get(name, "")) for name in inspect.signature(self).parameters}
        text += "".join(f"    {name}: {meaning}\n" for name, meaning in taken.items())
        object.__setattr__(self, "__doc__", text)

    @property
    def constructor(self) -> str:
        """Its name in `nsp`."""
        return "from_function" if self.kind == "function" else self.kind

    def __repr__(self) -> str:
        taken = inspect.signature(self).parameters.values()
        short = inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in taken])
        return f"nsp.{self.constructor}{short}"


_ARGUMENTS = {
    "position": "the position whose next-token distribution (for a projection: residual stream) is measured, as a selector.",
    "name": "the variable's name in results; by default the metric's.",
    "reference": "the run that it is measured from: donor (the run patched from) or base.",
}
_ONE_TOKEN = "a text that is one token, with its leading space where the model's tokens have one, or a token id."


class TwoTokenMetric(MetricKind):
    """A metric of an answer and a distractor."""

    tokens = 2
    takes: ClassVar[Mapping[str, str]] = {"answer": _ONE_TOKEN, "distractor": "the same for the token that the answer is compared with."}

    def __call__(self, answer: Token, distractor: Token, *, position: str = "last", name: str = "") -> Metric:
        return Metric(self.kind, (answer, distractor), position=position, name=name)


class TokenMetric(MetricKind):
    """A metric of one token."""

    tokens = 1
    takes: ClassVar[Mapping[str, str]] = {"token": _ONE_TOKEN}

    def __call__(self, token: Token, *, position: str = "last", name: str = "") -> Metric:
        return Metric(self.kind, (token,), position=position, name=name)


class TokenChangeMetric(TokenMetric):
    """A metric of one token that is measured from the base run."""

    reference, change = True, True


class TokenSetMetric(MetricKind):
    """A metric of a set of tokens."""

    tokens, anyof = 1, True
    takes: ClassVar[Mapping[str, str]] = {"tokens": "texts that are one token each, or token ids."}

    def __call__(self, *tokens: Token, position: str = "last", name: str = "") -> Metric:
        return Metric(self.kind, tokens, position=position, name=name)


class ContinuationMetric(MetricKind):
    """A metric of what is written after the prompt."""

    tokens, several = 1, True
    takes: ClassVar[Mapping[str, str]] = {
        "continuation": "one text, of any number of tokens, or several tokens. Each is predicted from the prompt and the "
        "continuation's tokens before it (teacher forcing)."
    }

    def __call__(self, *continuation: Token, name: str = "") -> Metric:
        return Metric(self.kind, continuation, name=name)


class DistributionMetric(MetricKind):
    """A metric of the next-token distribution alone."""

    def __call__(self, *, position: str = "last", name: str = "") -> Metric:
        return Metric(self.kind, position=position, name=name)


class ReferenceMetric(MetricKind):
    """A metric of the next-token distribution beside another run's."""

    reference = True

    def __call__(self, reference: Reference = "donor", *, position: str = "last", name: str = "") -> Metric:
        return Metric(self.kind, reference=reference, position=position, name=name)


class ProjectionMetric(MetricKind):
    """A metric of the residual stream."""

    setting = "direction"
    takes: ClassVar[Mapping[str, str]] = {
        "direction": "a tensor, array or list of dims (width); only where it points matters.",
        "layer": "the layer whose resid_post is read.",
    }

    def __call__(self, direction: Any, layer: int, *, position: str = "last", name: str = "") -> Metric:
        return Metric(self.kind, position=position, name=name, layer=layer, direction=direction)


class FunctionMetric(MetricKind):
    """A metric that the user wrote."""

    setting = "function"
    takes: ClassVar[Mapping[str, str]] = {
        "function": "a function, or its module:function. It takes float32 logits (row, token), in as many calls as it takes "
        "to cover all rows, and returns one number per row, (row,)."
    }

    def __call__(self, function: str | Callable[[Any], Any], *, position: str = "last", name: str = "") -> Metric:
        return Metric(self.kind, position=position, name=name, function=function)


logit_diff = TwoTokenMetric("logit_diff", "tokens", "logits", "logit of the answer minus logit of the distractor")
logit = TokenMetric("logit", "tokens", "logits", "logit of the answer")
logprob = TokenMetric("logprob", "full", "nats", "log-probability of the answer")
prob = TokenMetric("prob", "full", "1", "probability of the answer")
rank = TokenMetric("rank", "full", "1", "rank of the answer among all tokens (0: most likely)")
rank_change = TokenChangeMetric(
    "rank_change", "full", "1", "rank of the answer minus its rank in the base run (below 0: more likely)"
)
log_odds = TokenSetMetric(
    "log_odds", "full", "nats", "log-odds that the next token is one of a set, log P - log(1 - P)"
)
entropy = DistributionMetric("entropy", "full", "nats", "entropy of the next-token distribution")
top1 = ReferenceMetric("top1", "full", "1", "1 where the most likely token is the reference run's, else 0")
top1_change = TokenChangeMetric(
    "top1_change", "full", "1", "1 where the answer has become the most likely token, -1 where it no longer is, else 0"
)
kl = ReferenceMetric(
    "kl", "full", "nats", "KL divergence from the reference run's distribution, KL(reference || run)", distance=True
)
kl_reverse = ReferenceMetric(
    "kl_reverse", "full", "nats", "KL divergence to the reference run's distribution, KL(run || reference)", distance=True
)
js = ReferenceMetric(
    "js", "full", "nats", "Jensen-Shannon divergence from the reference run's distribution", distance=True
)
l2 = ReferenceMetric("l2", "full", "logits", "L2 distance of the logits from the reference run's", distance=True)
mse = ReferenceMetric(
    "mse", "full", "logits^2", "mean squared distance of the logits from the reference run's", distance=True
)
cosine = ReferenceMetric(
    "cosine", "full", "1", "cosine distance (1 - cosine similarity) of the logits from the reference run's", distance=True
)
cross_entropy = ContinuationMetric(
    "cross_entropy", "full", "nats", "cross-entropy of the continuation, mean over its tokens"
)
projection = ProjectionMetric(
    "projection", "stream", "activation", "projection of the residual stream on a direction of length 1"
)
from_function = FunctionMetric("function", "full", "1", "value of a function of the logits")

METRICS: Mapping[str, MetricKind] = {row.kind: row for row in tuple(globals().values()) if isinstance(row, MetricKind)}
"""Every metric by its name in recipes."""
