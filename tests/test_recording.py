"""Recording whole runs: what the engine keeps is what a trace records, in one batch or in many, with writes or without."""

from __future__ import annotations

import engine_models as tiny
import numpy as np
import pytest
import torch
from engine_models import one_thread  # noqa: F401

import nsp
from nsp.engine.budget import plain_token_bytes
from nsp.engine.readout import logits_at
from nsp.errors import InputError

PROMPTS = [tiny.CLEAN, tiny.CLEAN[:3], tiny.CORRUPT, tiny.CORRUPT[:5]]


@pytest.fixture(scope="module")
def llama() -> nsp.Model:
    return tiny.model("llama")


def traced(model: nsp.Model, site: str, *interventions: object) -> np.ndarray:
    """What a trace records, (prompt, layer, position, ...), NaN beyond a shorter prompt."""
    with model.trace(PROMPTS) as t:
        t.add(*interventions)  # type: ignore[arg-type]
        t.record(site)
    return np.asarray(t.results[site.split("[")[0]].values)


@pytest.mark.parametrize("component", ["resid_pre", "resid_post", "mlp_neurons", "q", "z"])
def test_a_recording_is_what_a_trace_records(llama: nsp.Model, component: str) -> None:
    expected = traced(llama, f"{component}[*]")
    kept = llama.engine.record([llama.encode(prompt) for prompt in PROMPTS], [f"{component}[*]"])
    for layer in range(llama.geometry.n_layers):
        for row, prompt in enumerate(PROMPTS):
            mine = kept.at(component, layer)[row, : len(prompt)]
            np.testing.assert_array_equal(mine.reshape(len(prompt), -1), expected[row, layer, : len(prompt)].reshape(len(prompt), -1))
        np.testing.assert_array_equal(kept.at_last(component, layer)[1], kept.at(component, layer)[1, 2])


def test_interventions_act_before_what_is_kept(llama: nsp.Model) -> None:
    stated = (nsp.ablate("mlp_out[0] @ *", "zero"), nsp.scale("resid_post[0] @ 1", 2.0))
    expected = traced(llama, "resid_post[*]", *stated)
    kept = llama.engine.record(PROMPTS, ["resid_post[*]"], writes=stated)
    for layer in range(llama.geometry.n_layers):
        np.testing.assert_array_equal(kept.at("resid_post", layer)[0], expected[0, layer])


def test_batches_hold_every_prompt_once(llama: nsp.Model) -> None:
    each = max(map(len, PROMPTS)) * plain_token_bytes(llama.runtime, max(map(len, PROMPTS)))
    engine = llama.engine.within(int(1.5 * each))
    whole = llama.engine.record(PROMPTS, ["attn_out[*]"])
    seen = []
    for part in engine.recordings(PROMPTS, ["attn_out[*]"]):
        for place, row in enumerate(part.rows):
            length = len(PROMPTS[row])
            torch.testing.assert_close(part.at("attn_out", 1)[place, :length], whole.at("attn_out", 1)[row, :length])
            assert int(part.real[place].sum()) == length
        seen += part.rows.tolist()
    assert len(seen) == len(PROMPTS) > len(list(engine.recordings(PROMPTS[:1], ["attn_out[*]"])))
    assert sorted(seen) == list(range(len(PROMPTS)))


def test_logits_are_kept_where_they_are_asked_for(llama: nsp.Model) -> None:
    kept = llama.engine.record(PROMPTS, readout=logits_at(llama.runtime, [(0, 2), (2, 1)]))
    assert kept.logits is not None
    with torch.no_grad():
        expected = [llama.module(torch.tensor([PROMPTS[row]])).logits[0, at] for row, at in ((0, 2), (2, 1))]
    torch.testing.assert_close(kept.logits, torch.stack(expected).float())


def test_what_cannot_be_recorded_is_said(llama: nsp.Model) -> None:
    with pytest.raises(InputError, match="not in the model's vocabulary"):
        llama.engine.record([[10**6]], ["resid_post[0]"])
    with pytest.raises(InputError, match="layer"):
        llama.engine.record(PROMPTS, ["resid_post[99]"])
    with pytest.raises(InputError, match="have no donor"):
        llama.engine.record(PROMPTS, ["resid_post[0]"], writes=[nsp.patch("resid_post[0] @ 1", donor=PROMPTS[2])])
