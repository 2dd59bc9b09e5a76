"""Every family's site table under the conformance list, on tiny random models; and tables broken on purpose, which the list must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_architectures import CASES, HIDDEN, LAYERS, WINDOW, quiet_and_alone, tiny_model
from torch import nn

import nsp
from nsp.conformance import Report, check
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.models import families
from nsp.models.families import TABLES
from nsp.models.geometry import describe_model
from nsp.models.tables import SiteTable, Where

REQUIRED = {
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe",
    "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "stablelm", "starcoder2", "cohere", "granite", "smollm3",
    "gpt_oss", "mamba", "jamba",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("quiet_and_alone")
__all__ = ["quiet_and_alone"]


def report_of(module: nn.Module, table: SiteTable | None = None) -> Report:
    return check(Runtime(module, None, table), "tiny")


# --- every family -------------------------------------------------------------------------------------------------------


def left_out(table: SiteTable) -> set[str]:
    """The lines that say nothing about a table: those, and no others, may be left out."""
    without = {
        "pattern": "the pattern is transformers' attentions",
        "resid_mid": "resid_mid is resid_pre + attn_out",
        "mlp_up": "each unit of mlp_gate and mlp_up is its neuron's",
        "q": "each head of q, k, v is that head's, and z follows",
        "z": "z through the output projection gives attn_out",
        "mlp_neurons": "mlp_neurons through the down projection give mlp_out",
    }
    names = {*table.components, *(["pattern"] if table.attention_call else [])}
    lines = {line for component, line in without.items() if component not in names}
    if table.branch:
        lines |= {"branch path = plain path", "generation without intervention is transformers' own"}
    if table.stream or "attn_out" not in names:
        lines.add("embed + attn_out + mlp_out rebuild the residual stream")
    return lines


@pytest.mark.parametrize("case", CASES)
def test_the_check_is_green(case: str) -> None:
    module = tiny_model(case)
    report = report_of(module)
    print(report)
    assert report.passed, str(report)
    assert report.family.split(" ")[0] == CASES[case][0]
    table = describe_model(module).table
    skipped = {line.name for line in report.lines if line.verdict == "n/a"}
    may = {"sdpa = eager attention"} if table.eager or not table.attention or not module._supports_sdpa else set()
    assert skipped - may == left_out(table)
    # Far below the tolerance: what remains is rounding.
    assert max(line.deviation for line in report.lines if line.deviation is not None) < 1e-5


def test_every_table_is_checked() -> None:
    checked = {describe_model(tiny_model(case)).table.name for case in CASES}
    stated = {table.name for tables in TABLES.values() for table in tables}
    assert checked == stated
    assert set(TABLES) >= REQUIRED


def test_the_tiny_models_would_expose_mistakes() -> None:
    found = {case: describe_model(tiny_model(case)) for case in CASES}
    assert {case for case, g in found.items() if any(g.windows)} >= {
        "mistral",
        "mixtral",
        "qwen2",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "phi3",
    }
    assert WINDOW < 10
    assert sum(0 < g.n_kv_heads < g.n_heads for g in found.values()) > 20
    assert sum(g.n_heads * g.head_dim not in (0, HIDDEN) for g in found.values()) > 7
    tied = {bool(tiny_model(case).config.get_text_config().tie_word_embeddings) for case in CASES}
    assert tied == {True, False}


def test_bfloat16_is_green_too() -> None:
    for case in ("llama", "gemma2"):
        report = report_of(tiny_model(case).to(torch.bfloat16))
        assert report.passed, str(report)


@pytest.mark.slow
def test_smollm2_is_green(smollm2: nsp.Model) -> None:
    report = smollm2.check()
    assert report.passed, str(report)
    assert all(line.verdict == "pass" for line in report.lines)


# --- tables broken on purpose -------------------------------------------------------------------------------------------


def swapped(table: SiteTable, one: str, other: str) -> SiteTable:
    components = dict(table.components)
    components[one], components[other] = components[other], components[one]
    return replace(table, components=components)


def moved(table: SiteTable, **components: Where) -> SiteTable:
    return replace(table, components={**table.components, **components})


class BiasApart(nn.Module):
    """A projection whose bias is added outside its linear module, so that reading the linear module's output drops it."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.inner, self.bias = nn.Linear(projection.in_features, projection.out_features, bias=False), projection.bias
        self.inner.weight = projection.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(states) + self.bias
        return made


def llama_with_bias_apart() -> nn.Module:
    module: Any = tiny_model("llama")
    for layer in module.model.layers:
        layer.self_attn.o_proj = BiasApart(layer.self_attn.o_proj)
    return module


def fused(table: SiteTable, order: Any) -> SiteTable:
    return moved(table, **{name: replace(table.components[name], fused=order) for name in ("q", "k", "v")})


HEADS_LINE = "each head of q, k, v is that head's, and z follows"
SUM_LINE = "embed + attn_out + mlp_out rebuild the residual stream"
BRANCH_LINE = "branch path = plain path"
FAULTS: dict[str, tuple[Callable[[], nn.Module] | str, SiteTable, str]] = {
    "q and k swapped": ("gptj", swapped(families.GPTJ, "q", "k"), HEADS_LINE),
    "k and v swapped": ("llama", swapped(families.LLAMA, "k", "v"), HEADS_LINE),
    "fused heads in blocks, not interleaved": ("gpt_neox", fused(families.GPT_NEOX, "blocks"), HEADS_LINE),
    "fused heads grouped, not in blocks": ("phi3", fused(families.PHI3, "grouped"), HEADS_LINE),
    "attn_out before the post-norm": ("gemma2", moved(families.GEMMA2, attn_out=Where("self_attn.o_proj", "output")), SUM_LINE),
    "mlp_out before the post-norm": ("olmo2", moved(families.OLMO2, mlp_out=Where("mlp", "output")), SUM_LINE),
    "a bias dropped": (llama_with_bias_apart, moved(
        families.LLAMA, z=Where("self_attn.o_proj.inner", "input"), attn_out=Where("self_attn.o_proj.inner", "output")), SUM_LINE),
    "mlp_out of another module": ("mistral", moved(families.MISTRAL, mlp_out=Where("post_attention_layernorm", "output")), SUM_LINE),
    "mlp_out with the residual stream in it": ("bloom", moved(families.BLOOM, mlp_out=Where("mlp", "output")), SUM_LINE),
    "a tensor that is changed in place": ("falcon-new", moved(families.FALCON, mlp_out=Where("mlp", "output")), SUM_LINE),
    "resid_mid after its norm": ("qwen3", moved(families.QWEN3, resid_mid=Where("post_attention_layernorm", "output")),
                                 "resid_mid is resid_pre + attn_out"),
    "gate and up swapped": ("llama", swapped(families.LLAMA, "mlp_gate", "mlp_up"), "each unit of mlp_gate and mlp_up is its neuron's"),
    "neurons before the activation": ("gpt2", moved(families.GPT2, mlp_neurons=Where("mlp.c_fc", "output")),
                                      "mlp_neurons through the down projection give mlp_out"),
    "one mask for two kinds of layer": ("gemma3_text", replace(families.GEMMA3, window="single"), BRANCH_LINE),
    "another norm at the end": ("llama", replace(families.LLAMA, final_norm="model.layers.2.post_attention_layernorm"),
                                "resid_post at all positions gives the donor's logits"),
    "router logits that nothing reads": ("mixtral", replace(families.MIXTRAL, modules={"mlp.gate": Where("mlp.gate", "output", 0)}),
                                         "patching a site from another prompt reaches the logits"),
    "a pattern that is not one": ("bloom", replace(families.BLOOM, attention_call="self__reshape_0"), "every component has its shape"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_table_is_red(fault: str) -> None:
    case, table, line = FAULTS[fault]
    report = report_of(tiny_model(case) if isinstance(case, str) else case(), table)
    failed = {one.name for one in report.lines if one.verdict == "fail"}
    assert line in failed, str(report)
    assert not report.passed
    assert report.verdict.startswith("RED")


def test_bias_apart_is_green_where_the_table_reads_behind_it() -> None:
    report = report_of(llama_with_bias_apart())
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("case", "change", "line"),
    [
        ("mistral", {"windows": (None,) * LAYERS}, BRANCH_LINE),
        ("granite", {"residual_multiplier": 1.0}, SUM_LINE),
        ("cohere", {"logit_scale": 1.0}, "logits are transformers' own"),
        ("gemma2", {"softcap": None}, "logits are transformers' own"),
    ],
)
def test_a_forgotten_window_or_scale_is_red(case: str, change: dict[str, Any], line: str) -> None:
    runtime = Runtime(tiny_model(case), None)
    runtime.geometry = replace(runtime.geometry, **change)
    report = check(runtime, case)
    assert line in {one.name for one in report.lines if one.verdict == "fail"}, str(report)


@pytest.mark.parametrize(
    ("case", "table", "message"),
    [
        (
            "llama",
            swapped(families.LLAMA, "q", "k"),
            "q in layer 0 .self_attn.k_proj, output. is 24 wide, where 4 x 12 was expected",
        ),
        ("llama", families.GPT2, "there are no layers at 'transformer.h'"),
        (
            "llama",
            moved(families.LLAMA, z=Where("attn.o_proj", "input")),
            "z should be at model.layers.<layer>.attn.o_proj",
        ),
        ("gpt2", replace(families.GPT2, final_norm="transformer.norm"), "its final_norm should be at transformer.norm"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(case: str, table: SiteTable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        describe_model(tiny_model(case), table)
