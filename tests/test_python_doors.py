"""The experiments called from Python: a wrong argument is an InputError that says what the command line says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import door_stubs
import pytest

import nsp
from nsp import experiments
from nsp.cli.app import main

PAIR = nsp.pair(clean="one two three", corrupt="two one three", answer=" a", distractor=" b")
FOUR = ["one", "two", "three", "four"]

WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "activation_patching": (
        lambda model: experiments.activation_patching(model, PAIR, mode="denoise"),  # type: ignore[arg-type]
        "activation-patching: mode: 'denoise' is not valid; did you mean 'denoising'?",
    ),
    "alignment_scan": (
        lambda model: experiments.alignment_scan(model, sigma=-1),
        "sigma: should be greater than 0, got -1",
    ),
    "attribution": (
        lambda model: experiments.attribution(model, "one", select={"topk": 5}),
        "attribution: unknown key 'topk' in select; did you mean 'top_k'?",
    ),
    "attribution of no prompts": (
        lambda model: experiments.attribution(model, 5),
        "attribution: prompts: should be a text, got 5",
    ),
    "bias_scan": (lambda model: experiments.bias_scan(model, layer=3), "bias_scan takes no 'layer'; did you mean 'layers'?"),
    "capture": (lambda model: experiments.capture(model, 5), "capture: prompts: should be a text, got 5"),  # type: ignore[arg-type]
    "causal_tracing": (
        lambda model: experiments.causal_tracing(model, noise=-1),
        "causal-tracing: noise: should be greater than 0, got -1",
    ),
    "contrast": (lambda model: experiments.contrast(model, FOUR, "nowhere.csv"), "nowhere.csv does not exist"),
    "discover": (
        lambda model: experiments.discover(model, "one", top_k=0),
        "select.top_k: should be greater than or equal to 1",
    ),
    "find_direction": (
        lambda model: experiments.find_direction(model, FOUR, FOUR, behaviour={"openings": ["x"]}, positions="first"),
        "direction: positions: should be template, or a whole number, got 'first'",
    ),
    "find_feature": (
        lambda model: nsp.find_feature(model, name="x", prompt="one", top_k=-1),
        "select.top_k: should be",
    ),
    "layer_recovery": (
        lambda model: experiments.layer_recovery(model, "one", "two", metric="lk"),
        "unknown metric 'lk'",
    ),
    "logit_attribution": (
        lambda model: experiments.logit_attribution(model, "one", " a", by="layer"),
        "logit-attribution: by: 'layer' is not valid (one of component, head, neuron)",
    ),
    "logit_lens": (
        lambda model: experiments.logit_lens(model, "one", top=0),
        "top: should be greater than or equal to 1, got 0",
    ),
    "mean_activations": (
        lambda model: experiments.mean_activations(model, over="x"),  # type: ignore[arg-type]
        "over: 'x' is not valid (one of tokens, prompts)",
    ),
    "patchscope": (
        lambda model: experiments.patchscope(model, "Paris", layer=3),
        "patchscope takes no 'layer'; did you mean 'layers'?",
    ),
    "path_patching": (
        lambda model: experiments.path_patching(model, PAIR, senders=5),
        "path-patching: senders: should be a valid list, got 5",
    ),  # type: ignore[arg-type]
    "steering": (
        lambda model: experiments.steering(model, "one", neurons=["L99"]),
        "'L99' names no neuron; write L23/N8079",
    ),
    "train_tuned_lens": (
        lambda model: experiments.train_tuned_lens(model, __file__, rate=-1),
        "train_tuned_lens: rate: should be",
    ),
}


@pytest.mark.parametrize("door", WRONG)
def test_a_wrong_argument_is_named(door: str, smollm2: Any) -> None:
    call, message = WRONG[door]
    with pytest.raises(nsp.InputError) as raised:
        call(smollm2)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_prompts_may_be_a_file(smollm2: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one two\nthree\n", encoding="utf-8")
    tree = experiments.mean_activations(smollm2, path, components="resid_post")
    assert tree["inputs"]["text"].values.tolist() == ["one two", "three"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: experiments.attribution(model, {"set": "facts", "size": 1000}),
            "the set 'facts' has 47 prompts that smollm2 answers",
        ),
        (
            lambda model: experiments.attribution(model, {"set": "facts", "size": 1000}, known=False),
            "the set 'facts' has 47 prompts, not",
        ),
        (
            lambda model: experiments.causal_tracing(model, limit=1000),
            "the set 'facts' has 47 facts that smollm2 knows, not 1000",
        ),
        (
            lambda model: experiments.bias_scan(model, pairs={"num_prompts": 1000}, ablate="mlp_out[3]"),
            "the set 'shipped' has 80 prompts",
        ),
        (
            lambda model: experiments.activation_patching(model, {"set": "capitals", "size": 100000}),
            "the set capitals has",
        ),
    ],
)
def test_no_set_gives_fewer_than_were_asked_for(call: Callable[[Any], Any], message: str, smollm2: Any) -> None:
    with pytest.raises(nsp.InputError) as raised:
        call(smollm2)
    assert message in str(raised.value)


def test_the_command_line_says_how_many_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "neuron-circuit", "--set", "prompts.size=1000", "--dry-run"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "prompts.size: the set 'fact-questions' has 26 prompts that smollm2 answers rightly, not 1000" in said


def test_a_finished_store_is_not_taken_for_one_of_another_dtype(smollm2: Any, tmp_path: Path) -> None:
    def capture(store_dtype: Any) -> Any:
        return experiments.capture(
            smollm2,
            ["one"],
            components="attn_out",
            layers=0,
            keep="summary",
            out=tmp_path / "c.zarr",
            store_dtype=store_dtype,
        )

    first = capture(None)
    with pytest.raises(nsp.InputError, match=r"c\.zarr holds this run in float32, not float16; --force"):
        capture("float16")
    for same in ("float32", None):
        assert capture(same)["activations/attn_out"]["max"].identical(first["activations/attn_out"]["max"])


def test_mean_squares_do_not_overflow_a_store_of_float16(smollm2: Any, tmp_path: Path) -> None:
    made = experiments.capture(
        smollm2,
        ["The capital of France is Paris."],
        components="resid_post",
        layers=[4, 20],
        out=tmp_path / "c.zarr",
        store_dtype="float16",
    )["activations/resid_post"].to_dataset()
    assert made["value"].dtype == "float16"
    assert made["mean_square"].dtype == "float32"
    assert float(made["mean_square"].max()) > 65504


def test_the_stub_is_what_the_recipes_make() -> None:
    """Editors and type checkers see each door's signature; the stub is made anew by ``tests/door_stubs.py --write``."""
    assert door_stubs.PLACE.read_text(encoding="utf-8") == door_stubs.stub()
