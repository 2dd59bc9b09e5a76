"""Metrics against float64 written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from engine_models import CLEAN, CORRUPT, both, model, one_thread  # noqa: F401
from hooks_reference import Edit, replacing

import nsp
from nsp.engine.kernels import finished, metric_values
from nsp.metrics import METRICS, Metric

Array = np.ndarray


def _p(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def _kl(here: Array, there: Array) -> float:
    positive = here > 0
    return float((here[positive] * (np.log(here[positive]) - np.log(there[positive]))).sum())


def _js(here: Array, there: Array) -> float:
    middle = (here + there) / 2
    return (_kl(here, middle) + _kl(there, middle)) / 2


# What each metric is, of the run's logits x, the reference run's r, the answer a and the distractor d.
BY_HAND: dict[str, Callable[[Array, Array, int, int], float]] = {
    "logit_diff": lambda x, _r, a, d: x[a] - x[d],
    "logit": lambda x, _r, a, _d: x[a],
    "logprob": lambda x, _r, a, _d: float(np.log(_p(x)[a])),
    "prob": lambda x, _r, a, _d: float(_p(x)[a]),
    "rank": lambda x, _r, a, _d: float((x > x[a]).sum()),
    "entropy": lambda x, _r, _a, _d: -float((_p(x)[_p(x) > 0] * np.log(_p(x)[_p(x) > 0])).sum()),
    "top1": lambda x, r, _a, _d: float(x.argmax() == r.argmax()),
    "kl": lambda x, r, _a, _d: _kl(_p(r), _p(x)),
    "kl_reverse": lambda x, r, _a, _d: _kl(_p(x), _p(r)),
    "js": lambda x, r, _a, _d: _js(_p(x), _p(r)),
    "l2": lambda x, r, _a, _d: float(np.sqrt(((x - r) ** 2).sum())),
    "mse": lambda x, r, _a, _d: float(((x - r) ** 2).mean()),
    "cosine": lambda x, r, _a, _d: float(1 - x @ r / np.sqrt((x @ x) * (r @ r))),
}


def computed(kind: str, logits: torch.Tensor, reference: torch.Tensor, tokens: tuple[int, int]) -> Array:
    rows = torch.tensor([tokens] * len(logits))
    return metric_values(kind, logits.float(), rows, reference.float()).double().numpy()


def test_every_metric_has_a_definition_here() -> None:
    assert set(BY_HAND) == set(METRICS)


@pytest.mark.parametrize("vocabulary", [7, 150_000])
@pytest.mark.parametrize("kind", METRICS)
def test_metrics_are_their_definitions(kind: str, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(3, vocabulary, generator=generator) * 4
    reference = logits + torch.randn(3, vocabulary, generator=generator) * torch.tensor([[0.01], [1.0], [5.0]])
    reference[1, 5] = logits[1, 5] = 40.0  # both runs agree on the most likely token
    found = computed(kind, logits, reference, (5, 2))
    assert found.shape == (3,)
    for row in range(3):
        exact = BY_HAND[kind](logits[row].double().numpy(), reference[row].double().numpy(), 5, 2)
        np.testing.assert_allclose(found[row], exact, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["kl", "kl_reverse", "js"])
def test_a_tiny_divergence_keeps_its_digits(kind: str) -> None:
    """150 000 tokens, one of which moves by 0.001: a float32 sum would lose all of it."""
    logits = torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0))
    reference = logits.clone()
    reference[0, 77] += 1e-3
    exact = BY_HAND[kind](logits[0].double().numpy(), reference[0].double().numpy(), 0, 0)
    assert 0 < exact < 1e-9
    np.testing.assert_allclose(computed(kind, logits, reference, (0, 0)), [exact], rtol=1e-2)
    assert computed(kind, logits, logits, (0, 0))[0] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", METRICS)
def test_half_precision_logits_do_not_overflow(kind: str, dtype: torch.dtype) -> None:
    """The exponential, the sum over the vocabulary and the square of these logits are all beyond float16."""
    raw = (torch.randn(2, 4096, generator=torch.Generator().manual_seed(1)) * 20 + 300).to(dtype)
    other = (raw.float() + 2 * torch.randn(2, 4096, generator=torch.Generator().manual_seed(2))).to(dtype)
    assert not torch.isfinite(raw.to(torch.float16).exp().sum(dim=1)).any()
    found = computed(kind, finished(raw, None, 1.0), finished(other, None, 1.0), (5, 2))
    for row in range(2):
        exact = BY_HAND[kind](raw[row].double().numpy(), other[row].double().numpy(), 5, 2)
        np.testing.assert_allclose(found[row], exact, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", [kind for kind in METRICS if kind not in ("l2", "mse", "cosine")])
def test_tokens_of_probability_zero(kind: str) -> None:
    """Some models set the logits of padding tokens to minus infinity."""
    logits, reference = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(3))
    logits[0, 40:] = reference[0, 40:] = float("-inf")
    exact = BY_HAND[kind](logits[0, :40].double().numpy(), reference[0, :40].double().numpy(), 5, 2)
    np.testing.assert_allclose(computed(kind, logits, reference, (5, 2)), [exact], rtol=1e-6)


def test_softcap_and_scale_are_the_models_own() -> None:
    raw = torch.tensor([[-50.0, 0.0, 3.0, 80.0]])
    exact = 30 * np.tanh(raw.double().numpy() * 0.5 / 30)
    np.testing.assert_allclose(finished(raw, 30.0, 0.5).numpy(), exact, rtol=1e-6)
    assert finished(raw.half(), None, 1.0).dtype == torch.float32


# On a model


ON_A_MODEL = [
    nsp.logit_diff(4, 9),
    nsp.logit(4),
    nsp.logprob(4),
    nsp.prob(4),
    nsp.rank(4),
    nsp.entropy(),
    nsp.top1(),
    nsp.kl(),
    Metric("kl_reverse"),
    nsp.js(),
    nsp.l2(),
    nsp.mse(),
    nsp.cosine(),
]


@pytest.mark.parametrize("path", ["branch", "plain"])
@pytest.mark.parametrize("against", ["donor", "base"])
def test_all_metrics_at_once_on_a_model(against: str, path: str) -> None:
    """All of them in one sweep, mixed with one that reads elsewhere: places, chunks and references stay apart."""
    which = both("llama")
    metrics = [Metric(one.kind, one.tokens, against, "last") for one in ON_A_MODEL]  # type: ignore[arg-type]
    elsewhere = [Metric(one.kind, one.tokens, against, "5", f"{one.kind}_5") for one in ON_A_MODEL]  # type: ignore[arg-type]
    with which.model.trace(CORRUPT, path=path) as t:  # type: ignore[arg-type]
        t.sweep(nsp.patch("resid_post[1] @ 2:9", donor=CLEAN))
        t.measure(*metrics, *elsewhere)
    donor, base = which.reference.logits(CLEAN).numpy(), which.reference.logits(CORRUPT).numpy()
    stated = dict.fromkeys(METRICS, (4, 9))
    kept = which.reference.values(CLEAN, [("resid_post", 1)])["resid_post", 1]
    for position in range(2, 9):
        logits = which.reference.logits(CORRUPT, [Edit("resid_post", 1, replacing(kept, [position], None))]).numpy()
        for place, suffix in ((-1, ""), (5, "_5")):
            reference = (donor if against == "donor" else base)[place]
            for kind, (answer, distractor) in stated.items():
                exact = BY_HAND[kind](logits[place], reference, answer, distractor)
                found = float(t.results[kind + suffix].sel(layer=1, position=position))
                assert found == pytest.approx(exact, abs=1e-4), (kind, position, place)
    reference = (donor if against == "donor" else base)[-1]
    for kind, (answer, distractor) in stated.items():
        for run, logits in (("base", base), ("donor", donor)):
            exact = BY_HAND[kind](logits[-1], reference, answer, distractor)
            assert float(t.results[f"{kind}_{run}"]) == pytest.approx(exact, abs=1e-4)


def test_full_vocabulary_metrics_are_projected_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model("llama")
    metrics = (nsp.kl("base"), nsp.prob(4, position="3"), nsp.logit_diff(4, 9), nsp.entropy(position="5"))

    def run() -> nsp.Trace:
        with of.trace(CORRUPT, path="branch") as t:
            t.sweep(nsp.patch("resid_post[*] @ *", donor=CLEAN))
            t.measure(*metrics)
        return t

    whole = run().results
    monkeypatch.setattr("nsp.engine.readout.chunk_rows", lambda _vocabulary: 2)
    parts = run().results
    for metric in metrics:
        np.testing.assert_allclose(parts[metric.name], whole[metric.name], atol=1e-6)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (lambda: Metric("logit_dif"), "did you mean 'logit_diff'"),
        (lambda: Metric("logit", (1, 2)), "takes 1 token"),
        (lambda: Metric("kl", (), "clean"), "'donor' or 'base'"),
        (lambda: nsp.logit(4, position="2:x"), "column"),
    ],
)
def test_a_metric_that_cannot_be_meant(stated: Callable[[], Metric], message: str) -> None:
    with pytest.raises(nsp.InputError, match=message):
        stated()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (nsp.logit(" never one token"), "token"),
        (nsp.logit(61), "61"),
        (nsp.logit(-1), "-1"),
        (nsp.logit(4, position="9"), "position"),
        (nsp.logit(4, position="2,3"), "positions"),
        (nsp.kl("donor"), "donor"),
        (Metric("logit"), "token"),
    ],
)
def test_a_metric_that_does_not_fit_the_model(metric: Metric, message: str) -> None:
    t = both("llama").model.trace(CORRUPT)
    t.scale("z[1] @ 3", 0.0)
    t.measure(metric)
    with pytest.raises(nsp.InputError, match=message):
        t.run()
