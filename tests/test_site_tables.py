"""What site tables say and refuse, experts, inferred families, the check's report and command, and the generated documents."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_architectures import HIDDEN, LAYERS, VOCABULARY, WINDOW, quiet_and_alone, tiny_from, tiny_model
from tiny_models import tiny_llama, tiny_tokenizer
from torch import nn

import nsp
from nsp.cli.app import main
from nsp.conformance import check
from nsp.conformance_lines import LINES
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.models import families
from nsp.models.families import TABLES
from nsp.models.family_docs import BEGIN, families_table, renewed
from nsp.models.geometry import describe_model
from nsp.models.inference import infer_table
from nsp.models.tables import INFERRED, SiteTable

ROOT = Path(__file__).parents[1]
IDS = list(range(30, 40))
BRANCH_LINE = "branch path = plain path"
pytestmark = pytest.mark.usefixtures("quiet_and_alone")
__all__ = ["quiet_and_alone"]


# --- what is missing says why -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "site", "why"),
    [
        *(
            (case, "resid_mid[0]", "in parallel on resid_pre")
            for case in ("gptj", "gpt_neox", "phi", "falcon-new", "cohere")
        ),
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
    with pytest.raises(InputError, match=why), nsp.load(tiny_model(case)).trace(IDS) as t:
        t.record(site)


def test_everywhere_means_the_layers_that_have_it() -> None:
    model = nsp.load(tiny_model("jamba"))
    with model.trace(IDS) as t:
        t.record("z", "mlp_neurons[*]", "module:model.layers.0.mamba")
    assert list(t.results["activations/z"].z.layer.values) == [1]
    assert list(t.results["activations/mlp_neurons"].mlp_neurons.layer.values) == [0, 2]


def test_a_multimodal_wrapper_is_read_through() -> None:
    model = nsp.load(tiny_model("gemma3"))
    assert model.geometry.table.layers == "model.language_model.layers"
    assert model.geometry.vocab_size == VOCABULARY
    with model.trace(IDS) as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor=IDS[::-1]))
        t.measure(nsp.logit(5))
    assert t.results.attrs["path"] == "branch"


# --- experts ------------------------------------------------------------------------------------------------------------


def test_neurons_of_experts_that_a_token_is_not_sent_to_are_zero() -> None:
    model = nsp.load(tiny_model("mixtral"))
    with model.trace(IDS) as t:
        t.record("mlp_neurons[1]", "module:model.layers.1.mlp.gate")
    neurons = torch.tensor(t.results["activations/mlp_neurons"].mlp_neurons.values).reshape(len(IDS), 4, -1)
    (router,) = (node for name, node in t.results["activations"].children.items() if name != "mlp_neurons")
    logits = torch.tensor(next(iter(router.data_vars.values())).values).reshape(len(IDS), 4)
    chosen = torch.zeros(len(IDS), 4, dtype=torch.bool).scatter(1, logits.topk(2, dim=1).indices, True)
    assert bool((neurons[~chosen] == 0).all())
    assert bool((neurons[chosen] != 0).any(dim=-1).all())


def test_writing_the_router_changes_the_routing() -> None:
    model = nsp.load(tiny_model("gpt_oss"))
    away = torch.tensor([9.0, 8.0, -9.0, -9.0])
    with model.trace(IDS) as t:
        t.inject("module:model.layers.1.mlp.router", away, mode="set")
        t.record("mlp_neurons[1]")
    neurons = torch.tensor(t.results.mlp_neurons.values).reshape(len(IDS), 4, -1)
    assert bool((neurons[:, 2:] == 0).all())
    assert bool((neurons[:, :2] != 0).any(dim=-1).all())


def test_one_neuron_of_one_expert_can_be_ablated() -> None:
    model = nsp.load(tiny_model("qwen3_moe"))
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
            model = nsp.load(tiny_from(UNKNOWN["olmo"][0]()), sites=sites)
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
    model = nsp.load(tiny_model("llama"))
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
    return path


def test_nsp_check_prints_a_table(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "GREEN" in shown
    assert "patching a site with itself changes nothing, bit for bit" in shown


def with_gate_and_up_swapped() -> dict[str, Any]:
    data = families.LLAMA.to_dict()
    components = data["components"]
    components["mlp_gate"], components["mlp_up"] = components["mlp_up"], components["mlp_gate"]
    return data


def test_nsp_check_as_json_and_red(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = tmp_path / "table.json"
    stated.write_text(json.dumps(with_gate_and_up_swapped()))
    assert main(["check", str(directory), "--json", "--sites", str(stated)]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is False
    assert [line["name"] for line in data["lines"] if line["verdict"] == "fail"] == [
        "each unit of mlp_gate and mlp_up is its neuron's"
    ]


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
