"""What is measured on a run: frozen values, computed in float32 (or better) by the engine.

Each metric is one row of `METRICS`. Most read the logits at one position (the last by default) and are one branch of
`nsp.engine.kernels.metric_values`; ``cross_entropy`` reads as many positions as its continuation has tokens, and
``projection`` reads the residual stream. ``needs`` says how much of the vocabulary a metric must project: ``tokens``
only the named entries, ``full`` the whole vocabulary (in chunks), ``stream`` none of it.
"""

from __future__ import annotations

import importlib
import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nsp.errors import InputError, suggestion
from nsp.sites import Selection

Token = str | int
Reference = Literal["donor", "base"]


@dataclass(frozen=True)
class MetricKind:
    """What a metric is: its arity in tokens, what it needs projected, and its words and units.

    Attributes:
        tokens: how many tokens it takes; ``several``: that many or more, one after another; ``anyof``: a set of that many
            or more.
        reference: it is measured from another run's logits, the base run's wherever ``change`` is set.
        distance: it is zero where the run is the reference run.
        setting: the field of `Metric` that it cannot do without, or empty.
    """

    tokens: int
    needs: Literal["tokens", "full", "stream"]
    reference: bool
    units: str
    long_name: str
    distance: bool = False
    several: bool = False
    anyof: bool = False
    change: bool = False
    setting: str = ""


METRICS: dict[str, MetricKind] = {
    "logit_diff": MetricKind(2, "tokens", False, "logits", "logit of the answer minus logit of the distractor"),
    "logit": MetricKind(1, "tokens", False, "logits", "logit of the answer"),
    "logprob": MetricKind(1, "full", False, "nats", "log-probability of the answer"),
    "prob": MetricKind(1, "full", False, "1", "probability of the answer"),
    "rank": MetricKind(1, "full", False, "1", "rank of the answer among all tokens (0: most likely)"),
    "rank_change": MetricKind(
        1, "full", True, "1", "rank of the answer minus its rank in the base run (below 0: more likely)", change=True
    ),
    "log_odds": MetricKind(
        1, "full", False, "nats", "log-odds that the next token is one of a set, log P - log(1 - P)", anyof=True
    ),
    "entropy": MetricKind(0, "full", False, "nats", "entropy of the next-token distribution"),
    "top1": MetricKind(0, "full", True, "1", "1 where the most likely token is the reference run's, else 0"),
    "top1_change": MetricKind(
        1, "full", True, "1", "1 where the answer has become the most likely token, -1 where it no longer is, else 0",
        change=True,
    ),
    "kl": MetricKind(
        0, "full", True, "nats", "KL divergence from the reference run's distribution, KL(reference || run)", True
    ),
    "kl_reverse": MetricKind(
        0, "full", True, "nats", "KL divergence to the reference run's distribution, KL(run || reference)", True
    ),
    "js": MetricKind(0, "full", True, "nats", "Jensen-Shannon divergence from the reference run's distribution", True),
    "l2": MetricKind(0, "full", True, "logits", "L2 distance of the logits from the reference run's", True),
    "mse": MetricKind(
        0, "full", True, "logits^2", "mean squared distance of the logits from the reference run's", True
    ),
    "cosine": MetricKind(
        0, "full", True, "1", "cosine distance (1 - cosine similarity) of the logits from the reference run's", True
    ),
    "cross_entropy": MetricKind(
        1, "full", False, "nats", "cross-entropy of the continuation, mean over its tokens", several=True
    ),
    "projection": MetricKind(
        0, "stream", False, "activation", "projection of the residual stream on a direction of length 1",
        setting="direction",
    ),
    "function": MetricKind(0, "full", False, "1", "value of a function of the logits", setting="function"),
}  # fmt: skip


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
            many calls as it takes to cover all rows, and returns one number a row, (row,).
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
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"function: cannot import {name!r} ({error}); name a function as module:function, in a module that Python "
            "finds (installed, or in the working directory)"
        ) from None
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise InputError(f"function: {name!r} is a {type(found).__name__}, not a function")
    made: Callable[[Any], Any] = found
    return made


def logit_diff(answer: Token, distractor: Token, *, position: str = "last", name: str = "") -> Metric:
    """Logit of ``answer`` minus logit of ``distractor``, in logits."""
    return Metric("logit_diff", (answer, distractor), position=position, name=name)


def logit(token: Token, *, position: str = "last", name: str = "") -> Metric:
    """Logit of one token, in logits."""
    return Metric("logit", (token,), position=position, name=name)


def logprob(token: Token, *, position: str = "last", name: str = "") -> Metric:
    """Log-probability of one token, in nats."""
    return Metric("logprob", (token,), position=position, name=name)


def prob(token: Token, *, position: str = "last", name: str = "") -> Metric:
    """Probability of one token."""
    return Metric("prob", (token,), position=position, name=name)


def rank(token: Token, *, position: str = "last", name: str = "") -> Metric:
    """Rank of one token among the whole vocabulary, 0 for the most likely."""
    return Metric("rank", (token,), position=position, name=name)


def log_odds(*tokens: Token, position: str = "last", name: str = "") -> Metric:
    """Log-odds that the next token is one of a set of tokens, log P(set) - log(1 - P(set)), in nats."""
    return Metric("log_odds", tokens, position=position, name=name)


def rank_change(token: Token, *, position: str = "last", name: str = "") -> Metric:
    """Rank of one token minus its rank in the base run: below 0 where it has become more likely."""
    return Metric("rank_change", (token,), position=position, name=name)


def top1_change(token: Token, *, position: str = "last", name: str = "") -> Metric:
    """1 where one token has become the most likely, -1 where it no longer is, 0 where nothing changed."""
    return Metric("top1_change", (token,), position=position, name=name)


def cross_entropy(*continuation: Token, name: str = "") -> Metric:
    """Cross-entropy of a continuation in nats: the mean over its tokens of minus their log-probability.

    The continuation is one text (of any number of tokens) or several tokens. Each token is predicted from the prompt
    and the continuation's tokens before it (teacher forcing).
    """
    return Metric("cross_entropy", continuation, name=name)


def projection(direction: Any, layer: int, *, position: str = "last", name: str = "") -> Metric:
    """Projection of ``resid_post[layer]`` on a direction (tensor, array or list of dims (width)), scaled to length 1."""
    return Metric("projection", position=position, name=name, layer=layer, direction=direction)


def from_function(function: str | Callable[[Any], Any], *, position: str = "last", name: str = "") -> Metric:
    """A function of float32 logits (row, token) that returns one number a row, or its ``module:function``."""
    return Metric("function", position=position, name=name, function=function)


def entropy(*, position: str = "last", name: str = "") -> Metric:
    """Entropy of the next-token distribution, in nats."""
    return Metric("entropy", position=position, name=name)


def kl(reference: Reference = "donor", *, position: str = "last", name: str = "") -> Metric:
    """KL(reference run || run) of the next-token distribution, in nats."""
    return Metric("kl", reference=reference, position=position, name=name)


def js(reference: Reference = "donor", *, position: str = "last", name: str = "") -> Metric:
    """Jensen-Shannon divergence from the reference run's next-token distribution, in nats."""
    return Metric("js", reference=reference, position=position, name=name)


def l2(reference: Reference = "donor", *, position: str = "last", name: str = "") -> Metric:
    """L2 distance of the logits from the reference run's."""
    return Metric("l2", reference=reference, position=position, name=name)


def mse(reference: Reference = "donor", *, position: str = "last", name: str = "") -> Metric:
    """Mean squared distance of the logits from the reference run's."""
    return Metric("mse", reference=reference, position=position, name=name)


def cosine(reference: Reference = "donor", *, position: str = "last", name: str = "") -> Metric:
    """Cosine distance of the logits from the reference run's (0: same direction)."""
    return Metric("cosine", reference=reference, position=position, name=name)


def top1(reference: Reference = "donor", *, position: str = "last", name: str = "") -> Metric:
    """1 where the most likely token is the reference run's, else 0."""
    return Metric("top1", reference=reference, position=position, name=name)
