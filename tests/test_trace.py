"""The trace: prompts in, labelled results, recordings and receipts out; wrong statements refused in one sentence."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import (
    CLEAN,
    CORRUPT,
    HEADS,
    LAYERS,
    WIDTH,
    Both,
    both,
    model,
    module,
    one_thread,  # noqa: F401
    text,
)
from hooks_reference import Edit, computing

import nsp
from nsp.engine.receipts import Receipt
from nsp.engine.runtime import Runtime

PATHS: tuple[Literal["branch", "plain"], ...] = ("branch", "plain")


@pytest.fixture(params=["llama", "gpt2"])
def pair_of(request: pytest.FixtureRequest) -> Both:
    return both(request.param)


def llama() -> nsp.Model:
    return both("llama").model


# Prompts


def test_texts_ids_and_tensors_are_the_same_prompt(pair_of: Both) -> None:
    found = []
    for prompt in (text(CORRUPT), CORRUPT, tuple(CORRUPT), torch.tensor(CORRUPT), torch.tensor([CORRUPT])):
        with pair_of.model.trace(prompt) as t:
            t.patch("z[1] @ 3", donor=text(CLEAN) if isinstance(prompt, str) else prompt if prompt is None else CLEAN)
            t.measure(nsp.logit_diff("w4", 9))
        found.append(float(t.results["logit_diff"]))
    assert len(set(found)) == 1


def test_chat_messages_take_the_chat_template(smollm2: nsp.Model, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Name the capital of France."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    with smollm2.trace(messages) as t:
        t.measure(nsp.logit(" Paris"), nsp.entropy())
    with torch.no_grad():
        logits = smollm2.module(torch.tensor([ids])).logits[0, -1].double()
    paris = tokenizer(" Paris")["input_ids"][0]
    assert float(t.results["logit"]) == pytest.approx(float(logits[paris]), abs=1e-4)
    with pytest.raises(nsp.InputError, match="chat template"):
        llama().trace(messages)


def test_a_module_without_tokenizer_takes_token_ids() -> None:
    of = nsp.load(module("llama"))
    with of.trace(CORRUPT) as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor=CLEAN))
        t.measure(nsp.logit(4))
    with llama().trace(CORRUPT) as same:
        same.sweep(nsp.patch("resid_post[*] @ *", donor=CLEAN))
        same.measure(nsp.logit(4))
    np.testing.assert_array_equal(t.results["logit"], same.results["logit"])
    with pytest.raises(nsp.InputError, match="no tokenizer"):
        of.trace("some text")


# Batches


@pytest.mark.parametrize("sweep", [False, True])
def test_one_prompt_is_the_same_alone_and_in_any_batch(pair_of: Both, sweep: bool) -> None:
    prompts = [CORRUPT[:3], CORRUPT, [7] * 20, CORRUPT[2:], CORRUPT[:3]]

    def run(given: Any) -> xr.Dataset:
        with pair_of.model.trace(given) as t:
            if sweep:
                t.sweep(nsp.scale("k[*] @ 0:3", 0.3), nsp.ablate("mlp_out[*] @ 0:3"))
            else:
                t.scale("k[*] @ 0:3", 0.3)
                t.record("resid_post[2]")
            t.measure(nsp.logit(4), nsp.kl("base"), nsp.logit(9, position="2", name="early"))
        return t.results

    many = run(prompts)
    assert many["logit"].dims[0] == "prompt"
    for number, prompt in enumerate(prompts):
        alone = run(prompt)
        for name in ("logit", "kl", "early", "logit_base"):
            np.testing.assert_allclose(many[name].isel(prompt=number), alone[name], atol=1e-5)
        if not sweep:
            values = many["resid_post"].isel(prompt=number)
            np.testing.assert_allclose(values[:, : len(prompt)], alone["resid_post"], atol=1e-4)
            assert np.isnan(values[:, len(prompt) :]).all()


def test_a_left_padded_batch_of_transformers_agrees(pair_of: Both) -> None:
    """The reference is transformers' own way to batch: padding on the left, with position ids that skip it."""
    prompts = [CORRUPT[:3], CORRUPT, CORRUPT[2:]]
    with pair_of.model.trace(prompts) as t:
        t.record("logits @ last", "resid_post[1] @ last")
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        output = pair_of.model.module(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), output_hidden_states=True
        )
    np.testing.assert_allclose(t.results["activations/logits/logits"][:, 0], output.logits[:, -1], atol=1e-4)
    np.testing.assert_allclose(
        t.results["activations/resid_post/resid_post"][:, 0, 0], output.hidden_states[2][:, -1], atol=1e-4
    )


def test_one_donor_for_each_prompt(pair_of: Both) -> None:
    bases, donors = [CORRUPT, CORRUPT[:5]], [CLEAN, [9, 8, 7, 6, 5]]
    with pair_of.model.trace(bases) as t:
        t.patch("resid_post[1] @ 3", donor=donors)
        t.measure(nsp.logit(4))
    for number, (base, donor) in enumerate(zip(bases, donors, strict=True)):
        with pair_of.model.trace(base) as alone:
            alone.patch("resid_post[1] @ 3", donor=donor)
            alone.measure(nsp.logit(4))
        for name in ("logit", "logit_base", "logit_donor"):
            np.testing.assert_allclose(t.results[name][number], alone.results[name], atol=1e-5)
    t = pair_of.model.trace(bases)
    t.patch("resid_post[1] @ 3", donor=[CLEAN])
    with pytest.raises(nsp.InputError, match="1 donors for 2 prompts"):
        t.run()


# Spans


@pytest.mark.parametrize("path", ["branch", "plain"])
def test_named_spans_pair_prompts_of_different_length(pair_of: Both, path: Any) -> None:
    """The donor's span stands elsewhere; its values go to the base's span, in order."""
    base, donor = [1, 2, 40, 41, 5, 6], [9, 40, 41, 8, 7, 3, 2]
    spans = {"who": "w40 w41"}
    kept = pair_of.reference.values(donor, [("resid_post", layer) for layer in range(LAYERS)])
    with pair_of.model.trace(text(base), spans=spans, path=path) as t:
        t.sweep(nsp.patch("resid_post[*] @ who", donor=text(donor)))
        t.measure(nsp.logit(4))
    assert t.results["position"].values.tolist() == [2, 3]
    for layer, (here, there) in [(layer, pair) for layer in range(LAYERS) for pair in ((2, 1), (3, 2))]:
        value = kept["resid_post", layer][there]
        edit = Edit("resid_post", layer, computing(lambda _old, value=value: value[None], [here]))
        exact = pair_of.reference.logits(base, [edit])[-1, 4]
        np.testing.assert_allclose(t.results["logit"].sel(layer=layer, position=here), float(exact), atol=5e-5)


def test_positions_are_never_aligned_from_the_end() -> None:
    """Which tokens part is shown side by side."""
    t = llama().trace(text([1, 2, 3, 4, 5]))
    t.patch("resid_post[1] @ -1", donor=text([1, 2, 9, 3, 4, 5]))
    with pytest.raises(nsp.InputError) as caught:
        t.run()
    message = str(caught.value)
    assert "base has 5 tokens, the donor 6" in message
    assert "part at position 2" in message
    assert any(line.startswith(">") and "w3" in line and "w9" in line for line in message.splitlines())


def test_spans_of_unequal_length_are_refused() -> None:
    with llama().trace(text([1, 2, 40, 41, 5, 6]), spans={"who": "w40 w41"}) as t:
        t.measure(nsp.logit(4))
    t = llama().trace(text([1, 2, 40, 41, 5, 6]), spans={"who": "w40 w41"})
    t.patch("resid_post[1] @ who", donor=llama().encode(text([1, 40, 3]), {"who": "w40"}))
    with pytest.raises(nsp.InputError, match="2 tokens in the base and 1 token in the donor"):
        t.run()


# Recordings


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recordings_are_what_hooks_see(family: str) -> None:
    which = both(family)
    for component in (*which.components(), which.submodule(), "embed"):
        layered = component in which.components()
        with which.model.trace(CORRUPT) as t:
            t.record(f"{component}[*]" if layered else component)
        found = t.results[component]
        for layer in range(LAYERS) if layered else [1]:
            exact = which.reference.values(CORRUPT, [(component, layer)])[component, layer]
            value = found.sel(layer=layer) if layered else found
            np.testing.assert_allclose(
                value.values.reshape(exact.shape if exact.shape[2] > 1 else exact.shape[:2]),
                exact.squeeze(2) if exact.shape[2] == 1 else exact,
                atol=5e-5,
            )


def test_recordings_carry_their_labels() -> None:
    with llama().trace([CORRUPT, CORRUPT[:4]]) as t:
        t.record("resid_post[0,2] @ 1:4", "z[1][0,3]", "pattern[1]", "mlp_neurons[1][5,7]", "logits @ last", "embed")
    found = {name: node.to_dataset()[name] for name, node in t.results["activations"].children.items()}
    dims = {name: array.dims for name, array in found.items()}
    assert dims == {
        "resid_post": ("prompt", "layer", "position", "neuron"),
        "z": ("prompt", "layer", "position", "head", "neuron"),
        "pattern": ("prompt", "layer", "position", "head", "sender"),
        "mlp_neurons": ("prompt", "layer", "position", "neuron"),
        "logits": ("prompt", "position", "token"),
        "embed": ("prompt", "position", "neuron"),
    }
    assert found["resid_post"]["layer"].values.tolist() == [0, 2]
    assert found["resid_post"]["position"].values.tolist() == [1, 2, 3]
    assert found["z"]["head"].values.tolist() == [0, 3]
    assert found["mlp_neurons"]["neuron"].values.tolist() == [5, 7]
    texts = [str(word).strip() for word in found["resid_post"]["token_text"].values[0]]
    assert texts == [f"w{token}" for token in CORRUPT[1:4]]
    assert found["logits"]["token_position"].values.ravel().tolist() == [8, 3]
    assert all(array.attrs["units"] and array.attrs["long_name"] for array in found.values())
    assert {dim for array in found.values() for dim in array.dims} <= {
        "pair", "prompt", "layer", "target_layer", "position", "head", "neuron", "component", "sender", "receiver",
        "direction", "step", "token",
    }  # fmt: skip


def test_a_recording_shows_what_was_written_and_what_follows(pair_of: Both) -> None:
    edits = [
        Edit("z", 0, computing(torch.zeros_like, [2], [1])),
        Edit("mlp_out", 1, computing(lambda old: old * 3, [4])),
    ]
    with pair_of.model.trace(CORRUPT) as t:
        t.ablate("z[0][1] @ 2")
        t.scale("mlp_out[1] @ 4", 3.0)
        t.record("z[0]", "mlp_out[1]", "resid_post[*]", "pattern[2]", "k[1]", "v[1]")
    exact = pair_of.reference.values(
        CORRUPT,
        [("z", 0), ("mlp_out", 1), ("resid_post", 0), ("resid_post", 2), ("pattern", 2), ("k", 1), ("v", 1)],
        edits,
    )
    for (name, layer), value in exact.items():
        found = t.results[f"activations/{name}/{name}"].sel(layer=layer).values
        np.testing.assert_allclose(found.reshape(value.shape), value, atol=5e-5)


def test_recordings_in_half_precision_are_floats_that_xarray_can_hold() -> None:
    with model("llama", dtype=torch.bfloat16).trace(CORRUPT) as t:
        t.record("resid_post[*]")
    assert t.results["resid_post"].dtype == np.float32


# Properties


COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "mlp_up")
COMPONENTS += ("mlp_neurons", "embed", "module")


def selector(which: Both, name: str, layers: str = "*") -> str:
    return which.submodule() if name == "module" else "embed" if name == "embed" else f"{name}[{layers}]"


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_self_patch_changes_nothing(pair_of: Both, name: str) -> None:
    """Bit for bit in one counterfactual; to rounding in a sweep, whose passes have another shape than the base run."""
    of, site = pair_of.model, selector(pair_of, name)
    with of.trace(CORRUPT) as t:
        t.record(site)
    recording = t.results[nsp.Site.parse(site).component]
    for donor in (CORRUPT, recording):
        with of.trace(CORRUPT) as t:
            t.patch(site, donor=donor)
            t.measure(nsp.logit(4), nsp.l2("base"))
        assert t.receipts[0].fired > 0
        assert t.receipts[0].change_max == 0
        assert float(t.results["logit"]) == float(t.results["logit_base"])
        assert float(t.results["l2"]) == 0
    for path in PATHS:
        # The recording stands for another prompt, so that nothing is known to be equal and every branch runs.
        with of.trace(CORRUPT, path=path) as t:
            t.sweep(nsp.patch(f"{site} @ *", donor=recording))
            t.measure(nsp.logit(4), nsp.l2("base"))
        assert t.receipts[0].path == path
        assert t.receipts[0].fired > 0
        np.testing.assert_allclose(t.results["logit"], float(t.results["logit_base"]), rtol=0, atol=1e-5)
        np.testing.assert_allclose(t.results["l2"], 0, atol=5e-5)
        np.testing.assert_allclose(t.results["change_norm"], 0, atol=5e-5)
        with of.trace(CORRUPT, path=path) as t:
            t.sweep(nsp.patch(f"{site} @ *", donor=CORRUPT))
            t.measure(nsp.logit(4))
        assert (t.receipts[0].fired, t.receipts[0].branches) == (0, 0)
        assert (t.results["logit"] == t.results["logit_base"]).all()


@pytest.mark.parametrize("name", COMPONENTS)
def test_scaling_by_one_changes_nothing(pair_of: Both, name: str) -> None:
    site = selector(pair_of, name)
    with pair_of.model.trace(CORRUPT) as t:
        t.scale(site, 1.0)
        t.measure(nsp.logit(4))
    assert float(t.results["logit"]) == float(t.results["logit_base"])
    assert t.receipts[0].change_max == 0
    for path in PATHS:
        with pair_of.model.trace(CORRUPT, path=path) as t:
            t.sweep(nsp.scale(f"{site} @ *", 1.0))
            t.measure(nsp.logit(4))
        assert (t.results["change_norm"] == 0).all()
        np.testing.assert_allclose(t.results["logit"], float(t.results["logit_base"]), rtol=0, atol=1e-5)


def test_resid_post_at_every_position_gives_the_donors_run(pair_of: Both) -> None:
    for layer in range(LAYERS):
        with pair_of.model.trace(CORRUPT) as t:
            t.patch(f"resid_post[{layer}]", donor=CLEAN)
            t.record("logits")
        np.testing.assert_allclose(t.results["logits"], pair_of.reference.logits(CLEAN), atol=5e-5)
    for path in PATHS:
        with pair_of.model.trace(CORRUPT, path=path) as t:
            t.sweep(nsp.patch("resid_post[*]", donor=CLEAN), axes=("layer",))
            t.measure(nsp.logit(4), nsp.kl())
        np.testing.assert_allclose(t.results["effect"], 1, atol=1e-4)
        np.testing.assert_allclose(t.results["kl"], 0, atol=1e-6)


@pytest.mark.parametrize("path", ["branch", "plain"])
def test_all_heads_together_are_the_component(pair_of: Both, path: Any) -> None:
    for name in ("z", "q", "k", "v", "pattern"):
        found = []
        for site in (f"{name}[*] @ 2:9", f"{name}[*][*] @ 2:9"):
            with pair_of.model.trace(CORRUPT, path=path) as t:
                t.sweep(nsp.patch(site, donor=CLEAN), axes=("layer", "position"))
                t.measure(nsp.logit(4))
            found.append(t.results["logit"].values)
        np.testing.assert_array_equal(*found)


# Receipts


def test_a_receipt_says_what_was_written(pair_of: Both) -> None:
    with pair_of.model.trace([CORRUPT, CORRUPT[:5]]) as t:
        t.scale("resid_post[0,2] @ 1,3", 0.0)
        t.ablate("z[1][0,2] @ -1")
    first, second = t.receipts
    assert (first.op, first.site, first.path) == ("scale", "resid_post[0,2] @ 1,3", "plain")
    assert (first.fired, first.branches, first.unchanged, first.rows) == (8, 2, 0, 2)
    assert (first.layers, first.positions) == ((0, 2), (1, 3))
    assert (second.fired, second.branches, second.positions) == (4, 2, (4, 8))
    norms = []
    for ids in (CORRUPT, CORRUPT[:5]):
        kept = pair_of.reference.values(ids, [("resid_post", 0)])["resid_post", 0][[1, 3]]
        edits = [Edit("resid_post", 0, computing(torch.zeros_like, [1, 3]))]
        later = pair_of.reference.values(
            ids, [("resid_post", 2)], [*edits, Edit("z", 1, computing(torch.zeros_like, [-1], [0, 2]))]
        )
        norms.append(float(torch.cat([kept, later["resid_post", 2][[1, 3]]]).norm()))
    assert first.change_mean == pytest.approx(np.mean(norms), rel=1e-4)
    assert first.change_max == pytest.approx(max(norms), rel=1e-4)
    assert str(first).startswith("scale resid_post[0,2] @ 1,3: fired 8x in 2 branches")


@pytest.mark.parametrize("path", ["branch", "plain"])
def test_a_receipt_counts_what_ran_and_what_was_pruned(pair_of: Both, path: Any) -> None:
    with pair_of.model.trace(CORRUPT, path=path) as t:
        t.sweep(nsp.patch("z[*][*] @ *", donor=CLEAN))
        t.measure(nsp.logit(4, position="5"))
    (receipt,) = t.receipts
    # Two shared tokens; nothing after position 5 reaches it; in the last layer only position 5 does.
    live = HEADS * ((LAYERS - 1) * 4 + 1)
    assert (receipt.fired, receipt.branches, receipt.unchanged) == (live, live, LAYERS * 9 * HEADS - live)
    assert receipt.positions == (2, 3, 4, 5)
    assert receipt.path == path
    assert receipt.reason
    changed = t.results["change_norm"].values > 0
    assert changed.sum() <= live
    assert (t.results["logit"].values[~changed] == float(t.results["logit_base"])).all()


def test_the_receipt_names_the_path_that_ran() -> None:
    for path in ("auto", "branch", "plain"):
        with llama().trace(CORRUPT, path=path) as t:  # type: ignore[arg-type]
            t.patch("resid_post[1] @ 3", donor=CLEAN)
            t.measure(nsp.logit(4))
        assert t.receipts[0].path == "plain"
        assert t.results.attrs["path"] == "plain"


def test_a_site_that_never_runs_is_an_error() -> None:
    of = nsp.load(module("llama"), tokenizer=llama().tokenizer)
    of.module.model.layers[1].unused = torch.nn.Linear(WIDTH, WIDTH)  # type: ignore[union-attr,index]
    for state in (False, True):
        t = nsp.load(of.module, tokenizer=of.tokenizer).trace(CORRUPT)
        if state:
            t.sweep(nsp.ablate("module:model.layers.1.unused @ 3"))
        else:
            t.ablate("module:model.layers.1.unused @ 3")
        t.measure(nsp.logit(4))
        with pytest.raises(nsp.NspError, match=r"model\.layers\.1\.unused.*never run"):
            t.run()


def test_a_write_that_does_not_happen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine may lose on the way is noticed before a number is handed out."""
    whole = Runtime.execute

    def forgetful(self: Runtime, program: Any) -> Any:
        outputs = whole(self, program)
        return {**outputs, "norms": outputs["norms"][:-1]}

    monkeypatch.setattr(Runtime, "execute", forgetful)
    t = llama().trace(CORRUPT)
    t.sweep(nsp.scale("z[*] @ *", 0.0))
    t.measure(nsp.logit(4))
    with pytest.raises((nsp.NspError, ValueError)):
        t.run()


# Results


def test_a_sweep_is_labelled() -> None:
    spans = {"who": "w40 w12"}
    with llama().trace(text(CORRUPT), spans=spans) as t:
        t.sweep(nsp.patch("z[2,0][3,1] @ who,last", donor=text(CLEAN)))
        t.measure(nsp.logit_diff("w4", "w9"), nsp.kl())
    found = t.results
    assert found["logit_diff"].dims == ("layer", "position", "head")
    assert found["layer"].values.tolist() == [2, 0]
    assert found["head"].values.tolist() == [3, 1]
    assert found["position"].values.tolist() == [4, 5, 8]
    assert found["token_text"].values.tolist() == ["w40", "w12", "w44"] or found["token_text"].values.tolist() == [
        " w40",
        " w12",
        " w44",
    ]
    assert {"effect", "effect_kl", "change_norm", "logit_diff_base", "logit_diff_donor"} <= set(found.data_vars)
    for name, array in found.data_vars.items():
        assert array.attrs["units"], name
        assert array.attrs["long_name"], name
    assert found.attrs["plan_hash"] == t.plan.hash
    assert found.attrs["prompts"] == [text(CORRUPT)]


def test_the_effect_is_blank_where_the_runs_agree() -> None:
    """No scale, no effect: a division by almost nothing would be noise."""
    with llama().trace(CORRUPT) as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor=CORRUPT))
        t.measure(nsp.logit(4))
    assert np.isnan(t.results["effect"]).all()


def test_progress_counts_branches() -> None:
    seen: list[tuple[int, int]] = []
    with llama().trace(CORRUPT, progress=lambda done, total: seen.append((done, total))) as t:
        t.sweep(nsp.patch("mlp_out[*] @ *", donor=CLEAN))
        t.measure(nsp.logit(4))
    assert seen[-1][0] == seen[-1][1] == t.receipts[0].branches


def test_an_error_in_the_block_runs_nothing() -> None:
    t = llama().trace(CORRUPT)

    def block() -> None:
        with t:
            t.scale("z[1] @ 3", 0.0)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        block()
    with pytest.raises(nsp.InputError, match="not run"):
        _ = t.results


def test_a_trace_runs_once() -> None:
    with llama().trace(CORRUPT) as t:
        t.measure(nsp.logit(4))
    for again in (t.run, lambda: t.scale("z[1]", 0.0), lambda: t.measure(nsp.kl())):
        with pytest.raises(nsp.InputError, match="has run"):
            again()


def test_the_model_is_as_it_was_after_a_trace(pair_of: Both) -> None:
    """No hook, no attention setting, no cache is left behind, also where the run failed."""
    of = pair_of.model.module
    before, setting = of(torch.tensor([CORRUPT])).logits, of.config._attn_implementation  # type: ignore[operator,union-attr]
    for function in (torch.sin, lambda _x: 1 / 0):
        t = pair_of.model.trace(CORRUPT)
        t.sweep(nsp.scale("pattern[*] @ *", 0.0), nsp.apply("resid_post[*] @ *", function))
        t.measure(nsp.logit(4))
        try:
            t.run()
        except ZeroDivisionError:
            assert function is not torch.sin
    assert of.config._attn_implementation == setting  # type: ignore[union-attr]
    torch.testing.assert_close(of(torch.tensor([CORRUPT])).logits, before, atol=0, rtol=0)  # type: ignore[operator]


# What cannot be asked for


def no_statement(_t: nsp.Trace) -> None:
    return


@pytest.mark.parametrize(
    ("prompt", "state", "message"),
    [
        ("", no_statement, "empty"),
        ([], no_statement, "empty"),
        ([1, 2, 61], no_statement, "61"),
        ([1, -2], no_statement, "-2"),
        ([1.5, 2.0], no_statement, "1.5"),
        (5, no_statement, "prompt"),
        ([*range(50), *range(15)], no_statement, "64"),  # GPT-2's learned positions end at 64
        (CORRUPT, lambda t: t.sweep(nsp.scale("z[*]", 0.0)), "measure"),
        (CORRUPT, lambda t: t.sweep(), "intervention"),
        (CORRUPT, lambda t: t.sweep("z[*]"), "nsp.patch"),
        (CORRUPT, lambda t: t.sweep(nsp.scale("z[*]", 0.0), axes=("layers",)), "layer, position, unit"),
        (CORRUPT, lambda t: t.sweep(nsp.scale("z[*]", 0.0), axes=()), "axis"),
        (CORRUPT, lambda t: (t.sweep(nsp.scale("z[*]", 0.0)), t.sweep(nsp.scale("q[*]", 0.0))), "one sweep"),
        (CORRUPT, lambda t: (t.sweep(nsp.scale("z[*]", 0.0)), t.measure(nsp.logit(4)), t.record("z[1]")), "record"),
        (CORRUPT, lambda t: t.measure("logit"), "nsp.logit_diff"),
        (CORRUPT, lambda t: t.measure(nsp.logit(4), nsp.logit(9)), "name="),
        (CORRUPT, lambda t: t.record("z[0]", "z[1]"), "twice"),
        (CORRUPT, lambda t: t.record("z[5]"), "0 to 2"),
        (CORRUPT, lambda t: t.record("residual[1]"), "unknown component"),
        (CORRUPT, lambda t: t.patch("resid_post[1] @", donor=CLEAN), "column"),
    ],
)
def test_wrong_input_is_one_clear_message(prompt: Any, state: Any, message: str) -> None:
    def run() -> None:
        t = both("gpt2").model.trace(prompt)
        state(t)
        t.run()

    with pytest.raises(nsp.InputError, match=message) as caught:
        run()
    assert len(str(caught.value)) < 1200


def test_options_of_a_trace_are_checked() -> None:
    with pytest.raises(nsp.InputError, match="'auto', 'branch' or 'plain'"):
        llama().trace(CORRUPT, path="fast")  # type: ignore[arg-type]
    with pytest.raises(nsp.InputError, match="occurs 2 times"):
        llama().trace("w1 w2 w1", spans={"it": "w1"})


def test_a_receipt_is_plain_data() -> None:
    with llama().trace(CORRUPT) as t:
        t.scale("z[1] @ 3", 0.0)
    data = t.receipts[0].to_dict()
    assert Receipt(**{**data, "layers": tuple(data["layers"]), "positions": tuple(data["positions"])}) == t.receipts[0]
