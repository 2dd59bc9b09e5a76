"""Gradient passes on every family: right gradients, rules that keep every bit of the forward pass and leave nothing behind, and
conservation where the rules promise it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_architectures import CASES, VOCABULARY, quiet_and_alone, tiny_model

from nsp.datasets.prompts import Prompt
from nsp.engine.forward_pass import padded_ids, plain_inputs
from nsp.engine.gradients import Gradients, Objective, Setting, gradient_program, gradients, run_gradients
from nsp.engine.lowering import resolve
from nsp.engine.operands import needed_slots
from nsp.engine.propagation_rules import RELP, Rules, uncovered
from nsp.engine.recording import record
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY
from nsp.errors import InputError
from nsp.sites import Site

pytestmark = pytest.mark.usefixtures("quiet_and_alone")
__all__ = ["quiet_and_alone"]
PROMPTS = [[5, 11, 23, 7, 40, 31, 3, 58], [9, 2, 33, 17, 60]]
WITHOUT_RULES = {"mamba", "jamba"}


def objective(kind: str = "logit_diff") -> Objective:
    tokens = torch.tensor([[4, 9], [12, 30]])
    return Objective(kind, tokens if kind == "logit_diff" else tokens[:, :1], (7, 4))


def every_slot(runtime: Runtime) -> list[tuple[str, int]]:
    geometry = runtime.geometry
    slots = [(BOUNDARY, layer) for layer in range(geometry.n_layers + 1)]
    for component in geometry.table.components:
        slots += [(component, layer) for layer in geometry.layers_of(component)]
    return slots


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_of_every_component(case: str) -> None:
    runtime = in_double(case)
    slots = every_slot(runtime)
    found = gradients(runtime, PROMPTS, slots, objective())
    plain = record(runtime, PROMPTS, slots)
    for slot in slots:
        for row, prompt in enumerate(PROMPTS):
            mine, theirs = (one[row, : len(prompt)] for one in (found.values[slot], plain.values[slot]))
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        assert bool((found.gradients[slot][1, len(PROMPTS[1]) :] == 0).all())
    check_directional(runtime, found, slots)


def in_double(case: str) -> Runtime:
    module: Any = tiny_model(case)
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # the grouped product knows no float64
    return Runtime(module.double(), None)


def check_directional(runtime: Runtime, found: Gradients, slots: list[tuple[str, int]]) -> None:
    """A small step of every slot's value along a random direction, measured by a pass of its own with the value set."""
    generator = torch.Generator().manual_seed(3)
    real = torch.arange(len(PROMPTS[0]))[None, :, None] < found.lengths[:, None, None]
    for slot in slots:
        if slot[0] == "resid_mid":
            # It cannot be set alone. It is resid_pre + attn_out, so its gradient is attn_out's.
            if ("attn_out", slot[1]) in slots:
                torch.testing.assert_close(found.gradients[slot], found.gradients["attn_out", slot[1]])
            continue
        direction = torch.randn(found.values[slot].shape, generator=generator, dtype=torch.float64) * real
        predicted = (found.gradients[slot] * direction).sum(dim=(1, 2))
        # Norms that compute in float32 drown a small step in rounding; a large one steps over a ReLU's kinks.
        close = []
        for step in (1e-6, 1e-5, 3e-4, 2e-3):
            ahead = measured(runtime, Setting(slot, real, found.values[slot] + step * direction))
            behind = measured(runtime, Setting(slot, real, found.values[slot] - step * direction))
            close.append(torch.allclose(predicted, (ahead - behind) / (2 * step), rtol=1e-2, atol=5e-3))
            if close[-1]:
                break
        assert any(close), (slot, predicted)


def measured(runtime: Runtime, setting: Any) -> torch.Tensor:
    ids, lengths = padded_ids(PROMPTS, 0, runtime.device)
    program, numbers = gradient_program(runtime, ids, lengths, [], objective(), [setting])
    return torch.as_tensor(run_gradients(runtime, program, numbers)["metric"])


def logits_of(runtime: Runtime) -> torch.Tensor:
    ids, lengths = padded_ids(PROMPTS, 0, runtime.device)
    with torch.no_grad():
        out = runtime.module(**plain_inputs(runtime, ids, lengths)).logits
    return out[torch.arange(2), torch.tensor([7, 4])].float()


@pytest.mark.parametrize("attention", ["frozen", "through"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_RULES])
def test_rules_keep_every_bit_of_the_forward_pass(case: str, attention: Any) -> None:
    runtime = Runtime(tiny_model(case), None)
    slots = every_slot(runtime)
    expected = record(runtime, PROMPTS, slots)
    ids, lengths = padded_ids(PROMPTS, 0, runtime.device)
    chosen = Rules(attention)
    found = gradients(runtime, PROMPTS, slots, objective(), rules=chosen)
    program, numbers = gradient_program(runtime, ids, lengths, slots, objective("logprob"), rules=chosen, logits=True)
    logits = run_gradients(runtime, program, numbers)["logits"]
    program, numbers = gradient_program(runtime, ids, lengths, slots, objective("logprob"), logits=True)
    plain = run_gradients(runtime, program, numbers)["logits"]
    for slot in slots:
        for row, prompt in enumerate(PROMPTS):
            if slot[0] == "mlp_neurons" and "experts" in runtime.locate("mlp_neurons").side:
                continue  # the experts' neurons are computed beside the forward pass, in another order of sums
            assert torch.equal(found.values[slot][row, : len(prompt)], expected.values[slot][row, : len(prompt)]), slot
    assert torch.equal(logits, plain)
    # The whole model projects every position at once: a product of another shape, which rounds differently.
    torch.testing.assert_close(logits, logits_of(runtime), rtol=1e-5, atol=1e-5)
    assert any(bool((gradient != 0).any()) for gradient in found.gradients.values())


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "mixtral"])
def test_half_precision_keeps_every_bit_too(case: str) -> None:
    runtime = Runtime(tiny_model(case).to(torch.bfloat16), None)
    slots = [(BOUNDARY, layer) for layer in range(runtime.geometry.n_layers + 1)]
    expected = record(runtime, PROMPTS, slots)
    found = gradients(runtime, PROMPTS, slots, objective(), rules=RELP)
    for slot in slots:
        assert torch.equal(found.values[slot][0], expected.values[slot][0].float())
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in found.gradients.values())


@pytest.mark.parametrize("case", sorted(WITHOUT_RULES))
def test_models_without_rules_say_so(case: str) -> None:
    runtime = Runtime(tiny_model(case), None)
    with pytest.raises(InputError, match="state-space mixer"):
        gradients(runtime, PROMPTS, [(BOUNDARY, 0)], objective(), rules=RELP)
    assert uncovered(runtime)


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "mixtral"])
def test_nothing_is_left_behind(case: str) -> None:
    module = tiny_model(case)
    runtime = Runtime(module, None)
    before, weights = logits_of(runtime), copy.deepcopy(module.state_dict())
    implementation = module.config._attn_implementation
    forwards = {name: one.forward for name, one in module.named_modules()}
    plain = gradients(runtime, PROMPTS, every_slot(runtime), objective())
    gradients(runtime, PROMPTS, every_slot(runtime), objective(), rules=RELP)
    with pytest.raises(InputError, match="vocabulary"):
        gradients(runtime, [[VOCABULARY + 5]], every_slot(runtime), objective(), rules=RELP)
    again = gradients(runtime, PROMPTS, every_slot(runtime), objective())
    assert all(torch.equal(plain.gradients[slot], again.gradients[slot]) for slot in plain.gradients)
    assert torch.equal(logits_of(runtime), before)
    assert module.config._attn_implementation == implementation
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    # nnsight wraps forward functions when a model is loaded; rules change none of them.
    assert {name for name, one in module.named_modules() if one.forward != forwards[name]} == set()


def without_biases(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name or "sinks" in name:
                parameter.zero_()


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_RULES and case != "gpt_oss"])
def test_relevance_is_conserved_where_there_are_no_biases(case: str) -> None:
    """With attention frozen the metric is linear in the stream at every layer: value x gradient sums to the metric."""
    runtime = in_double(case)
    without_biases(runtime.module)
    slots = [(BOUNDARY, layer) for layer in range(runtime.geometry.n_layers + 1)]
    found = gradients(runtime, PROMPTS, slots, objective(), rules=RELP)
    plain = gradients(runtime, PROMPTS, slots, objective())
    sums = torch.stack([(found.values[slot] * found.gradients[slot]).sum(dim=(1, 2)) for slot in slots])
    other = torch.stack([(plain.values[slot] * plain.gradients[slot]).sum(dim=(1, 2)) for slot in slots])
    expected = found.metric.double().expand_as(sums)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-3)  # plain gradients conserve nothing
    positions = [Prompt.from_ids(prompt) for prompt in PROMPTS]
    assert needed_slots(resolve(runtime, Site.parse("resid_post[*]"), positions)) <= set(slots)


def test_relevance_is_conserved_on_the_biases_too() -> None:
    """gpt-oss shifts its up projection by one, a bias inside the product: what is missing is what it and biases carry."""
    runtime = in_double("gpt_oss")
    found = gradients(runtime, PROMPTS, [(BOUNDARY, 0), (BOUNDARY, 3)], objective(), rules=RELP)
    final = (found.values[BOUNDARY, 3] * found.gradients[BOUNDARY, 3]).sum(dim=(1, 2))
    torch.testing.assert_close(final, found.metric.double(), rtol=1e-5, atol=1e-6)
