"""What is measured on a run's next-token distribution: frozen values, computed in float32 (or better) by the engine.

Each metric is one row of `METRICS` and one branch of `nsp.engine.kernels.metric_values`. A metric reads the logits at
one position (the last by default). ``needs`` says how much of the vocabulary it must project: ``tokens`` only the named
entries, ``full`` the whole vocabulary (in chunks).
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nsp.errors import InputError
from nsp.sites import Selection, Site

Token = str | int
Reference = Literal["donor", "base"]


@dataclass(frozen=True)
class MetricKind:
    """What a metric is: its arity in tokens, what it needs projected, and its words and units."""

    tokens: int
    needs: Literal["tokens", "full"]
    reference: bool
    units: str
    long_name: str


METRICS: dict[str, MetricKind] = {
    "logit_diff": MetricKind(2, "tokens", False, "logits", "logit of the answer minus logit of the distractor"),
    "logit": MetricKind(1, "tokens", False, "logits", "logit of the answer"),
    "logprob": MetricKind(1, "full", False, "nats", "log-probability of the answer"),
    "prob": MetricKind(1, "full", False, "1", "probability of the answer"),
    "rank": MetricKind(1, "full", False, "1", "rank of the answer among all tokens (0: most likely)"),
    "entropy": MetricKind(0, "full", False, "nats", "entropy of the next-token distribution"),
    "top1": MetricKind(0, "full", True, "1", "1 where the most likely token is the reference run's, else 0"),
    "kl": MetricKind(
        0, "full", True, "nats", "KL divergence from the reference run's distribution, KL(reference || run)"
    ),
    "kl_reverse": MetricKind(
        0, "full", True, "nats", "KL divergence to the reference run's distribution, KL(run || reference)"
    ),
    "js": MetricKind(0, "full", True, "nats", "Jensen-Shannon divergence from the reference run's distribution"),
    "l2": MetricKind(0, "full", True, "logits", "L2 distance of the logits from the reference run's"),
    "mse": MetricKind(0, "full", True, "logits^2", "mean squared distance of the logits from the reference run's"),
    "cosine": MetricKind(
        0, "full", True, "1", "cosine distance (1 - cosine similarity) of the logits from the reference run's"
    ),
}


@dataclass(frozen=True)
class Metric:
    """One metric on the logits at one position.

    Attributes:
        kind: a key of `METRICS`.
        tokens: the answer (and the distractor), as text that is one token, or as token ids; empty where a pair
            supplies them.
        reference: for distances, the run that they are measured from: ``donor`` (the run patched from) or ``base``.
        position: the position whose next-token distribution is measured, as a selector ("last", "-1", "9", a span).
        name: the variable's name in results; the kind unless several metrics share it.
    """

    kind: str
    tokens: tuple[Token, ...] = ()
    reference: Reference = "donor"
    position: str = "last"
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            close = difflib.get_close_matches(self.kind, METRICS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"unknown metric {self.kind!r}{hint} (nsp has {', '.join(METRICS)})")
        # numpy's integers are numbers too, but not plain data.
        tokens = tuple(token if isinstance(token, str) else operator.index(token) for token in self.tokens)
        object.__setattr__(self, "tokens", tokens)
        needed = METRICS[self.kind].tokens
        if self.tokens and len(self.tokens) != needed:
            raise InputError(f"{self.kind} takes {needed} token(s), got {len(self.tokens)}: {list(self.tokens)}")
        if self.reference not in ("donor", "base"):
            raise InputError(f"{self.kind}: reference is 'donor' or 'base', not {self.reference!r}")
        Site.parse(f"logits @ {self.position}")
        if not self.name:
            object.__setattr__(self, "name", self.kind)

    @property
    def needs(self) -> Literal["tokens", "full"]:
        return METRICS[self.kind].needs

    @property
    def selection(self) -> Selection | None:
        return Site.parse(f"logits @ {self.position}").positions

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tokens": list(self.tokens),
            "reference": self.reference,
            "position": self.position,
            "name": self.name,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Metric:
        return cls(**{**data, "tokens": tuple(data["tokens"])})


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
