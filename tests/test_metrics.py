"""Metrics against float64 written out by hand."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import CLEAN, CORRUPT, both, model, one_thread  # noqa: F401
from hooks_reference import Edit, computing, replacing

import nsp
from nsp import metrics
from nsp.engine.kernels import finished, metric_values
from nsp.experiments.metric_options import MetricOptions
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
    "rank_change": lambda x, r, a, _d: float((x > x[a]).sum() - (r > r[a]).sum()),
    "top1_change": lambda x, r, a, _d: float(x[a] == x.max()) - float(r[a] == r.max()),
    "log_odds": lambda x, _r, a, d: float(np.log(_p(x)[[a, d]].sum()) - np.log(np.delete(_p(x), [a, d]).sum())),
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
    """The others are below: they read several positions, the residual stream, or are the user's own."""
    assert {*BY_HAND, "cross_entropy", "projection", "function"} == set(METRICS)


ARGUMENTS: dict[str, Any] = {
    "answer": " a", "distractor": " b", "token": " a", "tokens": (" a", " b"), "continuation": (" a b",), "reference": "base",
    "direction": [0.0, 2.0], "layer": 1, "function": "module:function", "position": "3", "name": "mine",
}  # fmt: skip


@pytest.mark.parametrize("kind", METRICS)
def test_every_metric_is_made_by_its_row(kind: str) -> None:
    """`nsp` names it, its signature says what it takes, its docstring what it is, and a recipe writes the same."""
    row = METRICS[kind]
    assert getattr(nsp, row.constructor) is row
    assert row.constructor in nsp.__all__
    parameters = inspect.signature(row).parameters
    doc = inspect.getdoc(row)
    assert doc is not None
    assert row.long_name[1:] in doc
    for name in parameters:
        assert re.search(rf"^    {name}: \w", doc, re.MULTILINE), name
    assert repr(row).startswith(f"nsp.{row.constructor}(")
    keys = {name: ARGUMENTS[name] for name in parameters if name not in ("tokens", "continuation")}
    made = row(*ARGUMENTS.get("tokens" if row.anyof else "continuation", ()), **keys) if row.anyof or row.several else row(**keys)
    assert (made.kind, made.name) == (kind, "mine")
    assert Metric.from_dict(made.to_dict()) == made
    written = {key: value for key, value in made.to_dict().items() if value}
    assert MetricOptions.model_validate(written).to_metric() == made


@pytest.mark.parametrize("vocabulary", [7, 150_000])
@pytest.mark.parametrize("kind", BY_HAND)
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


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float16, 150_000), (torch.bfloat16, 4096)])
@pytest.mark.parametrize("kind", BY_HAND)
def test_half_precision_logits_do_not_overflow(kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    """The exponential, the sum over the vocabulary and the square of these logits are all beyond float16."""
    raw = (torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(1)) * 20 + 300).to(dtype)
    other = (raw.float() + 2 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(2))).to(dtype)
    half = raw.to(torch.float16)
    assert not torch.isfinite(half.exp().sum(dim=1)).any()
    assert not torch.isfinite((half * half).sum(dim=1)).any()
    if vocabulary == 150_000:  # even without the large offset: a naive softmax's sum is beyond 65504
        assert not torch.isfinite((half - 300).abs().mul(0).exp().sum(dim=1)).any()
    found = computed(kind, finished(raw, None, 1.0), finished(other, None, 1.0), (5, 2))
    for row in range(2):
        exact = BY_HAND[kind](raw[row].double().numpy(), other[row].double().numpy(), 5, 2)
        np.testing.assert_allclose(found[row], exact, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", [kind for kind in BY_HAND if kind not in ("l2", "mse", "cosine")])
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
    metrics.rank_change(4),
    metrics.top1_change(4),
    metrics.log_odds(4, 9),
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
    here = [Metric(one.kind, one.tokens, against, "last") for one in ON_A_MODEL]  # type: ignore[arg-type]
    elsewhere = [Metric(one.kind, one.tokens, against, "5", f"{one.kind}_5") for one in ON_A_MODEL]  # type: ignore[arg-type]
    with which.model.trace(CORRUPT, path=path) as t:  # type: ignore[arg-type]
        t.sweep(nsp.patch("resid_post[1] @ 2:9", donor=CLEAN))
        t.measure(*here, *elsewhere)
    donor, base = which.reference.logits(CLEAN).numpy(), which.reference.logits(CORRUPT).numpy()
    stated = dict.fromkeys(BY_HAND, (4, 9))
    kept = which.reference.values(CLEAN, [("resid_post", 1)])["resid_post", 1]
    for position in range(2, 9):
        logits = which.reference.logits(CORRUPT, [Edit("resid_post", 1, replacing(kept, [position], None))]).numpy()
        for place, suffix in ((-1, ""), (5, "_5")):
            for kind, (answer, distractor) in stated.items():
                origin = donor if against == "donor" and not METRICS[kind].change else base
                exact = BY_HAND[kind](logits[place], origin[place], answer, distractor)
                found = float(t.results[kind + suffix].sel(layer=1, position=position))
                assert found == pytest.approx(exact, abs=1e-4), (kind, position, place)
    for kind, (answer, distractor) in stated.items():
        for run, logits in (("base", base), ("donor", donor)):
            origin = donor if against == "donor" and not METRICS[kind].change else base
            exact = BY_HAND[kind](logits[-1], origin[-1], answer, distractor)
            assert float(t.results[f"{kind}_{run}"]) == pytest.approx(exact, abs=1e-4)


def test_full_vocabulary_metrics_are_projected_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model("llama")
    chosen = (nsp.kl("base"), nsp.prob(4, position="3"), nsp.logit_diff(4, 9), nsp.entropy(position="5"))

    def run() -> nsp.Trace:
        with of.trace(CORRUPT, path="branch") as t:
            t.sweep(nsp.patch("resid_post[*] @ *", donor=CLEAN))
            t.measure(*chosen)
        return t

    whole = run().results
    monkeypatch.setattr("nsp.engine.readout.chunk_rows", lambda _vocabulary: 2)
    parts = run().results
    for metric in chosen:
        np.testing.assert_allclose(parts[metric.name], whole[metric.name], atol=1e-6)


# Metrics that read more than the logits at one position


CONTINUATION = [4, 9, 33]
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(0))


def spread(logits: torch.Tensor) -> torch.Tensor:
    """A metric of one's own: the variance of the logits."""
    return logits.var(dim=1, unbiased=False)


@pytest.mark.parametrize("path", ["branch", "plain"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_continuations_projections_and_functions(family: str, path: str) -> None:
    """Each in every cell of a sweep, against raw hooks in float64; the prompt's own metrics beside them stay the same."""
    which = both(family)
    others = [
        metrics.projection(DIRECTION, 1, position="5"),  # reached by patches of layers 0 and 1 at positions up to 5
        metrics.projection(DIRECTION, 2, name="end"),
        metrics.from_function(f"{__name__}:spread"),
        nsp.logit_diff(4, 9),
    ]
    with which.model.trace(CORRUPT, path=path) as t:  # type: ignore[arg-type]
        t.sweep(nsp.patch("z[*][1] @ 2:9", donor=CLEAN))
        t.measure(metrics.cross_entropy(*CONTINUATION), *others)
    unit = (DIRECTION.double() / DIRECTION.double().norm()).numpy()

    def by_hand(ids: list[int], *edits: Edit) -> dict[str, float]:
        logits = which.reference.logits([*ids, *CONTINUATION[:-1]], edits).numpy()
        states = which.reference.values(ids, [("resid_post", 1), ("resid_post", 2)], edits)
        last = len(ids) - 1
        return {
            "cross_entropy": -float(
                np.mean([np.log(_p(logits[last + step])[token]) for step, token in enumerate(CONTINUATION)])
            ),
            "projection": float(states["resid_post", 1][5].reshape(-1).numpy() @ unit),
            "end": float(states["resid_post", 2][last].reshape(-1).numpy() @ unit),
            "function": float(logits[last].var()),
            "logit_diff": float(logits[last][4] - logits[last][9]),
        }

    kept = which.reference.values(CLEAN, [("z", layer) for layer in range(3)])
    for layer, position in itertools.product(range(3), range(2, 9)):
        exact = by_hand(CORRUPT, Edit("z", layer, replacing(kept["z", layer], [position], [1])))
        for name, value in exact.items():
            found = float(t.results[name].sel(layer=layer, position=position).squeeze())
            assert found == pytest.approx(value, abs=1e-4), (name, layer, position)
    for run, ids in (("base", CORRUPT), ("donor", CLEAN)):
        for name, value in by_hand(ids).items():
            assert float(t.results[f"{name}_{run}"]) == pytest.approx(value, abs=1e-4)
    # What a patch after the reading's layer or position cannot reach is the base run's, to the bit.
    unmoved = t.results["projection"].sel(layer=2).values
    assert (unmoved == float(t.results["projection_base"])).all()
    assert float(t.results["projection"].sel(layer=0, position=4).squeeze()) != float(t.results["projection_base"])


def test_a_continuation_beside_records_and_in_one_run() -> None:
    """A single counterfactual: what is recorded is the prompt's, not the continuation's."""
    which = both("llama")
    with which.model.trace(CORRUPT) as t:
        t.scale("z[1][2] @ last", 0.0)
        t.record("resid_post[0,1]")
        t.measure(metrics.cross_entropy("w4 w9", "w33"), metrics.projection(DIRECTION, 1))
    recorded = t.results["resid_post"]
    assert recorded.sizes["position"] == len(CORRUPT)
    unit = DIRECTION.double() / DIRECTION.double().norm()
    exact = float(torch.tensor(recorded.sel(layer=1).values[-1]).double() @ unit)
    assert float(t.results["projection"]) == pytest.approx(exact, abs=1e-5)
    edit = Edit("z", 1, computing(lambda old: old * 0, [len(CORRUPT) - 1], [2]))
    logits = which.reference.logits([*CORRUPT, *CONTINUATION[:-1]], [edit]).numpy()
    losses = [-np.log(_p(logits[len(CORRUPT) - 1 + step])[token]) for step, token in enumerate(CONTINUATION)]
    assert float(t.results["cross_entropy"]) == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_large_vocabulary_in_float16() -> None:
    """A model of 150 000 tokens in half precision: its metrics are those of its own logits, summed in float64."""
    of = model("llama", vocab_size=150_000, dtype=torch.float16, initializer_range=0.5)
    with of.trace(CORRUPT, path="plain") as t:
        t.sweep(nsp.patch("resid_post[1] @ 2:5", donor=CLEAN))
        t.measure(nsp.kl(), nsp.logprob(4), nsp.entropy(), nsp.l2())
        t.measure(metrics.cross_entropy(*CONTINUATION))
    with torch.no_grad():
        logits = of.module(torch.tensor([CORRUPT])).logits[0, -1]
        donor = of.module(torch.tensor([CLEAN])).logits[0, -1].double().numpy()
    assert logits.dtype == torch.float16
    assert not torch.isfinite((logits - logits.min()).exp().sum())  # a naive sum in the logits' own dtype
    for kind in ("kl", "logprob", "entropy", "l2"):
        assert np.isfinite(t.results[kind]).all()
        exact = BY_HAND[kind](logits.double().numpy(), donor, 4, 9)
        np.testing.assert_allclose(float(t.results[f"{kind}_base"]), exact, rtol=2e-2)


def test_what_is_not_finite_is_named_with_its_site() -> None:
    """Cells beyond a prompt's end are blank and no news; those that went wrong keep their NaN and are named."""
    t = model("llama").trace([CORRUPT, CORRUPT[:7]], path="plain")
    t.sweep(nsp.scale("resid_post[0,1] @ *", float("inf")))
    t.measure(nsp.logit_diff(4, 9))
    message = r"logit_diff: 32 of 32 values .* layer 0 position 1 in prompt 0 \(9 tokens.*; and 29 more"
    with pytest.warns(RuntimeWarning, match=message):
        t.run()
    assert np.isnan(t.results["logit_diff"].values[1, :, :7]).all()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (lambda: Metric("logit_dif"), "did you mean 'logit_diff'"),
        (lambda: Metric("logit", (1, 2)), "takes 1 token"),
        (lambda: Metric("kl", (), "clean"), "'donor' or 'base'"),
        (lambda: nsp.logit(4, position="2:x"), "column"),
        (lambda: Metric("projection", layer=1), "needs a direction"),
        (lambda: Metric("projection", direction=(1.0, 2.0)), "needs a layer"),
        (lambda: metrics.projection([0.0, 0.0], 1), "points nowhere"),
        (lambda: metrics.projection([[1.0], [2.0]], 1), "one vector"),
        (lambda: metrics.projection([1.0, float("nan")], 1), "NaN"),
        (lambda: Metric("logit", (4,), layer=2), "takes no layer"),
        (lambda: Metric("function"), "needs a function"),
        (lambda: metrics.from_function("spread"), "module:function"),
        (lambda: Metric("cross_entropy", (4, 9), position="3"), "after the last token"),
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
        (metrics.projection([1.0, 2.0], 1), "2 numbers, the residual stream 32"),
        (metrics.projection(DIRECTION, 3), "0 to 2"),
        (metrics.from_function("nsp.nowhere:spread"), "cannot import"),
        (metrics.from_function("nsp.metrics:METRICS"), "not a function"),
        (metrics.from_function(lambda logits: logits), "one number a row"),
        (metrics.cross_entropy(61), "61"),
        (metrics.cross_entropy(""), "empty"),
    ],
)
def test_a_metric_that_does_not_fit_the_model(metric: Metric, message: str) -> None:
    t = both("llama").model.trace(CORRUPT)
    t.scale("z[1] @ 3", 0.0)
    t.measure(metric)
    with pytest.raises(nsp.InputError, match=message):
        t.run()


def test_one_run_has_one_continuation() -> None:
    t = both("llama").model.trace(CORRUPT)
    t.measure(metrics.cross_entropy(4, 9), metrics.cross_entropy(4, 8, name="other"))
    with pytest.raises(nsp.InputError, match="cross_entropy and other"):
        t.run()
