"""Every family's site table under the conformance list, on tiny random models; and tables broken on purpose, which the list must find."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_architectures import CASES, HIDDEN, LAYERS, VOCABULARY, WINDOW, tiny_from, tiny_model
from tiny_models import WORDS, tiny_llama, tiny_tokenizer
from torch import nn

import nsp
from nsp.cli.app import main
from nsp.conformance import Report, check
from nsp.conformance_lines import LINES
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.models import families
from nsp.models.families import TABLES
from nsp.models.family_docs import BEGIN, families_table, renewed
from nsp.models.geometry import describe_model
from nsp.models.inference import infer_table
from nsp.models.tables import INFERRED, SiteTable, Where

ROOT = Path(__file__).parents[1]
REQUIRED = set(
    """gpt2 gpt_neo gpt_neox gptj opt bloom falcon llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text phi phi3
    olmo2 stablelm starcoder2 cohere granite smollm3 gpt_oss mamba jamba""".split()
)
IDS = list(range(30, 40))


@pytest.fixture(autouse=True)
def _quiet_and_alone() -> Iterator[None]:
    """One thread: tiny matrices gain nothing from more, and lose much where cores are shared. No advice from transformers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(before)


def report_of(module: nn.Module, table: SiteTable | None = None) -> Report:
    return check(Runtime(module, None, table), "tiny")


def traced(module: nn.Module, **options: Any) -> nsp.Model:
    return nsp.load(module, **options)


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
    assert {case for case, g in found.items() if any(g.windows)} >= {"mistral", "mixtral", "qwen2", "gemma2", "gemma3_text", "gpt_oss", "phi3"}
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
        ("llama", swapped(families.LLAMA, "q", "k"), "q in layer 0 .self_attn.k_proj, output. is 24 wide, where 4 x 12 was expected"),
        ("llama", families.GPT2, "there are no layers at 'transformer.h'"),
        ("llama", moved(families.LLAMA, z=Where("attn.o_proj", "input")), "z should be at model.layers.<layer>.attn.o_proj"),
        ("gpt2", replace(families.GPT2, final_norm="transformer.norm"), "its final_norm should be at transformer.norm"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(case: str, table: SiteTable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        describe_model(tiny_model(case), table)


# --- what is missing says why -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "site", "why"),
    [
        *((case, "resid_mid[0]", "in parallel on resid_pre") for case in ("gptj", "gpt_neox", "phi", "falcon-new", "cohere")),
        ("opt-post-norm", "resid_mid[0]", "normalised after attention"),
        ("gpt2", "mlp_gate[0]", "its MLP is not gated"),
        ("mixtral", "mlp_gate[0]", "fused tensor"),
        ("falcon-alibi", "pattern[0]", "twice under eager"),
        ("mamba", "q[0]", "mamba has no q; it has: embed, resid_pre, resid_post, logits"),
        ("jamba", "z[0]", "layer 0 of this jamba has no z; layers that have it: 1"),
        ("qwen3_moe", "mlp_neurons[1]", "layers that have it: 0, 2"),
    ],
)
def test_a_missing_component_says_why(case: str, site: str, why: str) -> None:
    with pytest.raises(InputError, match=why), traced(tiny_model(case)).trace(IDS) as t:
        t.record(site)


def test_everywhere_means_the_layers_that_have_it() -> None:
    model = traced(tiny_model("jamba"))
    with model.trace(IDS) as t:
        t.record("z", "mlp_neurons[*]", "module:model.layers.0.mamba")
    assert list(t.results["activations/z"].z.layer.values) == [1]
    assert list(t.results["activations/mlp_neurons"].mlp_neurons.layer.values) == [0, 2]


def test_a_multimodal_wrapper_is_read_through() -> None:
    model = traced(tiny_model("gemma3"))
    assert model.geometry.table.layers == "model.language_model.layers"
    assert model.geometry.vocab_size == VOCABULARY
    with model.trace(IDS) as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor=IDS[::-1]))
        t.measure(nsp.logit(5))
    assert t.results.attrs["path"] == "branch"


# --- experts ------------------------------------------------------------------------------------------------------------


def test_neurons_of_experts_that_a_token_is_not_sent_to_are_zero() -> None:
    model = traced(tiny_model("mixtral"))
    with model.trace(IDS) as t:
        t.record("mlp_neurons[1]", "module:model.layers.1.mlp.gate")
    neurons = torch.tensor(t.results["activations/mlp_neurons"].mlp_neurons.values).reshape(len(IDS), 4, -1)
    (router,) = (node for name, node in t.results["activations"].children.items() if name != "mlp_neurons")
    logits = torch.tensor(next(iter(router.data_vars.values())).values).reshape(len(IDS), 4)
    chosen = torch.zeros(len(IDS), 4, dtype=torch.bool).scatter(1, logits.topk(2, dim=1).indices, True)
    assert bool((neurons[~chosen] == 0).all())
    assert bool((neurons[chosen] != 0).any(dim=-1).all())


def test_writing_the_router_changes_the_routing() -> None:
    model = traced(tiny_model("gpt_oss"))
    away = torch.tensor([9.0, 8.0, -9.0, -9.0])
    with model.trace(IDS) as t:
        t.inject("module:model.layers.1.mlp.router", away, mode="set")
        t.record("mlp_neurons[1]")
    neurons = torch.tensor(t.results.mlp_neurons.values).reshape(len(IDS), 4, -1)
    assert bool((neurons[:, 2:] == 0).all())
    assert bool((neurons[:, :2] != 0).any(dim=-1).all())


def test_one_neuron_of_one_expert_can_be_ablated() -> None:
    model = traced(tiny_model("qwen3_moe"))
    with model.trace(IDS) as t:
        t.record("mlp_neurons[2]", "logits")
    neurons = torch.tensor(t.results["activations/mlp_neurons"].mlp_neurons.values).reshape(len(IDS), -1)
    unit = int(neurons[-1].abs().argmax())
    idle = int((neurons[-1] == 0).nonzero()[0])
    before = t.results["activations/logits"].logits.values
    for chosen, moves in ((unit, True), (idle, False)):
        with model.trace(IDS) as t:
            t.ablate(f"mlp_neurons[2][{chosen}] @ -1")
            t.record("logits")
        changed = (t.results.logits.values != before).any(axis=-1).reshape(-1)
        assert list(changed) == [False] * (len(IDS) - 1) + [moves]


# --- families without a table -------------------------------------------------------------------------------------------

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNKNOWN: dict[str, tuple[Callable[[], Any], set[str], bool]] = {
    # model_type -> configuration, components that must be found, whether sweeps may take the branch path
    "olmo": (lambda: hf.OlmoConfig(**_SMALL), {"q", "k", "v", "z", "pattern", "attn_out", "resid_mid", "mlp_gate", "mlp_out"}, True),
    "glm4": (lambda: hf.Glm4Config(**_SMALL, head_dim=8), {"q", "k", "v", "attn_out", "mlp_gate", "mlp_up", "mlp_out"}, True),
    "persimmon": (lambda: hf.PersimmonConfig(**{**_SMALL, "num_key_value_heads": 4}), {"q", "k", "v", "z", "mlp_neurons"}, True),
    "cohere2": (lambda: hf.Cohere2Config(**_SMALL, sliding_window=WINDOW), {"q", "k", "v", "z", "attn_out", "mlp_out"}, True),
    "olmoe": (lambda: hf.OlmoeConfig(**_SMALL, num_experts=4, num_experts_per_tok=2), {"q", "k", "v", "mlp_neurons", "mlp_out"}, True),
    "mpt": (lambda: hf.MptConfig(d_model=HIDDEN, n_heads=4, n_layers=LAYERS, vocab_size=VOCABULARY), {"q", "k", "v", "attn_out"}, False),
    "lfm2": (lambda: hf.Lfm2Config(**_SMALL, layer_types=["conv", "full_attention", "conv"]), {"resid_pre", "resid_post"}, False),
}  # fmt: skip


@pytest.mark.parametrize("family", UNKNOWN)
def test_an_unknown_family_is_inferred_with_a_warning(family: str) -> None:
    make, wanted, branch = UNKNOWN[family]
    assert family not in TABLES
    with pytest.warns(RuntimeWarning, match=f"no site table for the architecture {family!r}; it was inferred"):
        runtime = Runtime(tiny_from(make()), None)
    assert runtime.geometry.table.variant == INFERRED
    assert set(runtime.geometry.components()) >= wanted
    report = check(runtime, family)
    assert report.passed, str(report)
    assert (BRANCH_LINE in {line.name for line in report.lines if line.verdict == "pass"}) == branch


def test_inference_finds_what_the_tables_state() -> None:
    """Inferred without its table, a known family's components are the stated ones, but for equal tensors under two names."""
    for case in ("gpt2", "gemma2", "granite", "falcon-new", "gpt_oss", "phi3"):
        module = tiny_model(case)
        stated = describe_model(module)
        inferred = infer_table(module, module.config)
        assert inferred is not None
        found = inferred[0]
        assert set(found.components) == set(stated.table.components), case
        for name in {"q", "k", "v", "z", "attn_out", "mlp_gate", "mlp_up"} & set(found.components):
            assert found.components[name] == stated.table.components[name], (case, name)


def test_a_model_without_layers_is_an_error() -> None:
    class Nothing(nn.Module):
        config = hf.LlamaConfig()

    Nothing.config.model_type = "nothing"
    with pytest.raises(InputError, match="none could be inferred"):
        describe_model(Nothing())


def test_a_stated_table_is_used_as_it_is() -> None:
    table = families.LLAMA
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sites in (table, table.to_dict()):
            model = traced(tiny_from(UNKNOWN["olmo"][0]()), sites=sites)
            assert model.geometry.table == table


def test_tables_round_trip_as_data() -> None:
    for tables in TABLES.values():
        for table in tables:
            data = json.loads(json.dumps(table.to_dict()))
            assert SiteTable.from_dict(data) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "x"}, "unknown keys layer"),
        ({"head": None}, "lacks head"),
        ({"components": {"z": {"side": "input"}}}, "site table, z: write module:"),
        ({"components": {"z": {"module": "a", "side": "left"}}}, "site table, z: write module:"),
        ({"components": {"z": {"module": "a", "side": "input", "fuse": "x"}}}, "site table, z: write module:"),
    ],
)
def test_a_badly_stated_table_is_an_error(change: dict[str, Any], message: str) -> None:
    data = {key: value for key, value in {**families.LLAMA.to_dict(), **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        SiteTable.from_dict(data)


# --- the report, the command line, the documents ------------------------------------------------------------------------


def test_the_report_reads_and_serialises() -> None:
    model = traced(tiny_model("llama"))
    told: list[str] = []
    report = model.check(told.append)
    assert told == [title for title, _ in LINES]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["passed"] is True
    assert {line["name"] for line in data["lines"]} == set(told)
    assert "branch path = plain path" in str(report)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    assert len(WORDS) > 20
    return path


def test_nsp_check_prints_a_table(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "GREEN" in shown
    assert "patching a site with itself changes nothing, bit for bit" in shown


def test_nsp_check_as_json_and_red(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = tmp_path / "table.json"
    stated.write_text(json.dumps(swapped(families.LLAMA, "mlp_gate", "mlp_up").to_dict()))
    assert main(["check", str(directory), "--json", "--sites", str(stated)]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is False
    assert [line["name"] for line in data["lines"] if line["verdict"] == "fail"] == ["each unit of mlp_gate and mlp_up is its neuron's"]


def test_nsp_check_names_a_bad_file(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(directory), "--sites", str(tmp_path / "none.json")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "docs/architectures.md"])
def test_the_documents_hold_the_generated_table(name: str) -> None:
    path = ROOT / name
    if not path.exists() or BEGIN not in path.read_text(encoding="utf-8"):
        pytest.skip(f"{name} has no table of families")
    text = path.read_text(encoding="utf-8")
    assert renewed(text) == text, f"run: python -m nsp.models.family_docs {name}"


def test_the_generated_table_has_a_row_a_table() -> None:
    assert len(families_table().splitlines()) == 2 + sum(len(tables) for tables in TABLES.values())
