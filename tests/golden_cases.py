"""What `goldens.py` runs: the shipped recipes, variants of them, and the doors of `nsp.experiments`.

Shipped recipes run on smollm2, reduced where they are long. Variants and doors run on tiny models with smollm2's tokenizer and
weights that are the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

# How doors spell what may be spelled in another way one day; the numbers stay the same.
ATTRIBUTION_ANSWER, ATTRIBUTION_PIECES, DISCOVERED_ANSWER = "answer", "target", "target"
STEERED_BY = "vector"
BEHAVIOUR: dict[str, Any] = {"behaviour": {"openings": [" the"], "phrases": ["a"]}}
NOISE: dict[str, Any] = {"noise": {"scale": 2.0, "draws": 2}}


@dataclass(frozen=True)
class Run:
    """A recipe that `nsp run` runs.

    Attributes:
        recipe: the name of a shipped one, or its keys.
        change: what is set on top, key by key.
        tables: its kind has tables of its own (`nsp export --csv`).
        options: further options of `nsp run`.
        refused: it is an error of the input, and its message is kept.
    """

    recipe: str | Mapping[str, Any]
    change: Mapping[str, Any] = field(default_factory=dict)
    tables: bool = False
    options: tuple[str, ...] = ()
    refused: bool = False

    def recipe_argument(self, name: str) -> str:
        """What stands for the recipe on the command line; keys are written into a file of the working directory."""
        if isinstance(self.recipe, str):
            return self.recipe
        path = Path(f"{name}.yaml")
        path.write_text(json.dumps(self.recipe, ensure_ascii=False), encoding="utf-8")
        return str(path)

    def settings(self) -> list[str]:
        """The options of the command line."""
        changes = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.change.items())
        return [*(word for change in changes for word in ("--set", change)), *self.options]


@dataclass(frozen=True)
class Door:
    """A call of a door; it is given what loads a model by name, and gives anything that `goldens.py` can describe."""

    call: Callable[[Callable[[str], Any]], Any]


# Models and files


def make_files(folder: Path) -> None:
    """The tiny models, as checkpoints, and the data files that entries name."""
    import nsp

    tokenizer = nsp.load("smollm2", device="cpu", dtype="float32").tokenizer
    for seed, (name, config) in enumerate(_configurations(len(tokenizer)).items()):
        module = hf.AutoModelForCausalLM.from_config(config).eval()
        fill(module, seed)
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(_TEXT, encoding="utf-8")
    (folder / "prompts.txt").write_text("The river runs past the old mill.\nShe counted the coins twice.\n", encoding="utf-8")
    (folder / "crows.csv").write_text(_CROWS, encoding="utf-8")
    (folder / "pairs.csv").write_text(_PAIRS, encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps({"Zorb": {"strong": ["planet"], "partial": ["star"], "answer": "planet"}}), encoding="utf-8")


def _configurations(vocabulary: int) -> dict[str, Any]:
    tokens = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    llama = {
        **tokens, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }  # fmt: skip
    narrow = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 12}
    return {
        "tiny-llama": hf.LlamaConfig(**llama, **narrow, attention_bias=True, mlp_bias=True),
        "tiny-sister": hf.LlamaConfig(**llama, **narrow, attention_bias=True, mlp_bias=True),
        "tiny-wide": hf.LlamaConfig(**llama, hidden_size=40, intermediate_size=56, head_dim=8),
        "tiny-gpt2": hf.GPT2Config(**tokens, n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=512),
        "tiny-gemma": hf.Gemma2Config(
            **llama, **narrow, sliding_window=5, query_pre_attn_scalar=12, final_logit_softcapping=5.0,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        "tiny-mamba": hf.MambaConfig(**tokens, hidden_size=32, num_hidden_layers=3, state_size=4),
    }  # fmt: skip


def fill(module: torch.nn.Module, seed: int) -> None:
    """Weights of order one in every part, from a generator whose numbers no library and no machine changes."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
            if name.endswith(("A_log", ".D")):
                continue  # a state-space model's own, the same in every model
            raw = np.random.PCG64(1000 * seed + number).random_raw(parameter.numel())
            even = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0  # from -1 to 1
            noise = torch.from_numpy(even.astype(np.float32)).reshape(parameter.shape)
            if name.endswith("dt_proj.bias"):
                parameter.copy_(noise - 3.0)  # a state-space model's time steps: small
            elif parameter.dim() == 1:
                parameter.copy_((1.0 if "norm" in name or "ln_" in name else 0.0) + 0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.8 * noise)
            else:
                parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)
        module.tie_weights()


_TEXT = (
    "The river runs past the old mill, and in the evening the miller counts the sacks that are left. "
    "She had read every book in the house twice before the winter was over. Nobody knew where the letter came from, "
    "but all of them had heard of the man who wrote it. In the first year they planted wheat; in the second, barley. "
    "A ship came into the harbour with salt and left with wool, and the price of bread rose again. "
) * 6
_CROWS = """,sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators
0,The old man could not use the phone.,The young man could not use the phone.,stereo,age,[],a0,[]
1,Women cannot drive a car.,Men cannot drive a car.,stereo,gender,[],a0,[]
2,The rich man stole the bread.,The poor man stole the bread.,antistereo,socioeconomic,[],a1,[]
"""
_PAIRS = """clean,corrupt,answer,distractor
When Mary and John went out John thanked,When Mary and John went out Mary thanked, Mary, John
When Anna and Paul went out Paul thanked,When Anna and Paul went out Anna thanked, Anna, Paul
"""
MARY, JOHN = "When Mary and John went out, John gave a drink to", "When Mary and John went out, Mary gave a drink to"
ONE_PAIR = [{"clean": MARY, "corrupt": JOHN, "answer": " Mary", "distractor": " John"}]
FIVE = ["Who are you?", "Where are you?", "How are you?", "What is it?", "Why not?"]
OTHER_FIVE = ["I am here.", "You are there.", "It is late.", "We are two.", "So what."]
HARMFUL, NORMAL = ["Steal it", "Break it", "Hit him", "Cheat her"], ["Buy it", "Mend it", "Help him", "Thank her"]
GOOD = ["A good day and", "The warm sun is", "I like the red", "We won and they"]
BAD = ["A bad day and", "The cold rain is", "I hate the red", "We lost and they"]
BOTH_SETS = {"positive": FIVE, "negative": OTHER_FIVE}


# Shipped recipes

TINY = {"model": "tiny-llama"}
_SHORT_SEARCH = {**TINY, **BOTH_SETS, "positions": 2, "layers": "1:3", "select.max_kl": 5, "generate.max_new_tokens": 4}
_FEW_REQUESTS = {"harmful_txt": HARMFUL, "normal_txt": NORMAL}
SHIPPED: dict[str, Run] = {
    "ioi": Run("ioi", {"layers": "0:30:6"}),
    "ioi-heads": Run("ioi-heads", {"layers": [23], "positions": [9, -1]}),
    "ioi-set": Run("ioi-set", {**TINY, "pairs.size": 8, "statistics.resamples": 99}),
    "layer-recovery": Run("layer-recovery", {**TINY, "pairs.size": 4}),
    "causal-tracing": Run("causal-tracing", {"limit": 1, "noise.draws": 1, "layers": [5, 20]}),
    "path-patching": Run("path-patching", {"pairs.size": 1, "senders": ["z[22][*]", "mlp_out[21]"]}),
    "direction": Run("direction", _SHORT_SEARCH),
    "refusal": Run("refusal", {**_SHORT_SEARCH, "patch.pairs": 2}),
    "neuron-circuit": Run(
        "neuron-circuit",
        {
            "prompts.size": 1, "layers": [18, 24], "methods": ["atp", "relp"], "verify.exact": "top", "verify.top": 5,
            "verify.ablations": ["mean"], "verify.sizes": [0.01, 1], "verify.curve_draws": 0, "verify.draws": 1, "select.top_k": 20,
        },
    ),
    "contrast": Run("contrast", {**TINY, "resamples": 200}),
    "steering": Run("steering", {**TINY, "vector.layers": 2, "decoding.max_new_tokens": 6}),
    "patchscope": Run(
        "patchscope", {"sources.entities": ["Paris"], "layers": [2, 6], "target_layers": [2], "generation.max_new_tokens": 4}
    ),
    "logit-lens": Run("logit-lens", {"layers": [5, 29]}),
    "logit-attribution": Run("logit-attribution"),
    "bias-scan": Run(
        "bias-scan",
        {
            "models": {"aligned": "tiny-llama"}, "ablate": ["mlp_neurons[*][0:20] @ *"], "pairs.num_prompts": 8, "neurons.prompts": 4,
            "neurons.top": 4, **{f"alignment.{key}": value for key, value in _FEW_REQUESTS.items()},
        },
        tables=True,
    ),
    "bias-scan-crows": Run(
        "bias-scan-crows",
        {
            "models": {"aligned": "tiny-llama", "base": "tiny-sister"}, "ablate": [], "neurons.prompts": 2, "neurons.top": 4,
            "pairs": {"path": "crows.csv", "num_prompts": 4}, "alignment": None,
        },
        tables=True,
    ),
    "alignment-scan": Run("alignment-scan", {**TINY}),
    "capture": Run("capture", {"layers": [3, 20]}),
    "mean-activations": Run("mean-activations", {**TINY}),
}  # fmt: skip


# Variants: modes and options that no shipped recipe has as it stands


def largest_logit(logits: torch.Tensor) -> torch.Tensor:
    """A metric of a user's own."""
    return logits.amax(dim=-1)


CHATTY = {"template": True, "system": "You are brief.", "response": "Answer:"}
TWO_TEXTS = ["The capital of France is", "She wrote a letter to her"]
CIRCUIT = {
    "format": "nsp circuit", "version": 1, "name": "two", "component": "mlp_neurons", "prompt": MARY, "target": " Mary", "counterfactual": " John",
    "metric": "logit_diff", "metric_value": 2.0, "provenance": {}, "units": [[1, 2, 7, 1.5, ""], [2, 3, 5, -0.5, ""]],
}  # fmt: skip
EVERY_METRIC = [
    "logit_diff", "logit", "logprob", "prob", "rank", "rank_change", "entropy", "top1", "top1_change", "kl", "kl_reverse", "js", "l2",
    "mse", "cosine", {"kind": "log_odds", "tokens": [" Mary", " John"]}, {"kind": "kl", "reference": "base", "name": "kl_base"},
    {"kind": "logit", "tokens": [" the"], "position": "3", "name": "the_at_3"},
    {"kind": "projection", "layer": 2, "direction": [1.0, -1.0] * 16}, "golden_cases:largest_logit",
]  # fmt: skip


def _patching(model: str = "tiny-llama", pairs: Any = None, **keys: Any) -> Run:
    return Run({"kind": "activation-patching", "model": model, "pairs": ONE_PAIR if pairs is None else pairs, **keys})


def _lens(**keys: Any) -> Run:
    return Run({"kind": "lens", "model": "tiny-llama", "prompts": TWO_TEXTS, "tokens": [" Paris", " the"], "top": 3, **keys})


def _patchscope(**keys: Any) -> Run:
    given = {"kind": "patchscope", "model": "tiny-llama", "generation": {"max_new_tokens": 4}, "sources": {"entities": ["Paris", "piano"]}}
    return Run({**given, **keys})


def _bias(**keys: Any) -> Run:
    models = {"aligned": "tiny-llama", "base": "tiny-sister"}
    return Run({"kind": "bias-scan", "models": models, "pairs": {"num_prompts": 6}, "neurons": None, **keys}, tables=True)


def _attribution(**keys: Any) -> Run:
    return Run({"kind": "attribution", "model": "tiny-llama", "prompts": _ANSWERED, **keys})


def _contrast(**keys: Any) -> Run:
    sets = {"positive": GOOD, "negative": BAD, "components": ["resid_post", "mlp_out"], "resamples": 100}
    return Run({"kind": "contrast", "model": "tiny-llama", **sets, **keys})


def _direction(**keys: Any) -> Run:
    behaviour = {"name": "glee", "openings": [" good", " the"], "phrases": ["a", "e"], "match": "anywhere"}
    return Run({"kind": "direction", "model": "tiny-llama", **BOTH_SETS, "behaviour": behaviour, "select": {"max_kl": 9}, "layers": "1:4", **keys})


def _steering(**keys: Any) -> Run:
    given = {"kind": "steering", "model": "tiny-llama", "prompts": TWO_TEXTS, "tokens": [" the"], "top_k": 3}
    return Run({**given, "decoding": {"max_new_tokens": 5}, **keys})


_ANSWERED = [
    {"prompt": MARY, "answer": " Mary", "distractor": " John", "donor": JOHN},
    {"prompt": JOHN, "answer": " John", "distractor": " Mary", "donor": MARY, "name": "turned"},
]
_FACTS = [
    {"prompt": "The Eiffel Tower is in the city of", "subject": "Eiffel Tower", "answer": " Paris"},
    {"prompt": "The capital of Japan is", "subject": "Japan", "answer": " Tokyo"},
]
_ALL_METHODS = ["atp", "atp_ig", "eap_ig", "grad_x_act", "relp"]
_VERIFIED = {
    "exact": "all", "top": 5, "ablations": ["mean", "resample", "zero", "counterfactual"], "sizes": [0.02, 0.2, 1.0], "curve_draws": 2,
    "draws": 3,
}  # fmt: skip

VARIANTS: dict[str, Run] = {
    "patching-every-metric": _patching(components=["resid_post", "attn_out"], metric=EVERY_METRIC, mode="noising"),
    "patching-interchange": _patching(
        components=["mlp_neurons", "z"], neurons="0:48:5", heads="all", layers=[1, 2], positions=[9, -1], mode="interchange"
    ),
    "patching-heads": _patching(components=["q", "k", "v", "z", "pattern"], heads="all", layers=[0, 2], positions="last"),
    "patching-whole": _patching(components=["q", "k", "v", "mlp_gate", "mlp_up", "resid_mid", "resid_pre", "embed"], layers="1:3", positions="9:"),
    "patching-cumulative": _patching(components=["mlp_out", "attn_out"], cumulative=True, together=["position"], metric=["kl", "logit_diff"]),
    "patching-cumulative-noising": _patching(components=["mlp_out"], cumulative=True, positions=["-1"], mode="noising"),
    "patching-together": _patching(components=["z", "resid_post"], heads="all", together=["layer", "position"]),
    "patching-together-layers": _patching(components=["attn_out"], together=["layer"]),
    "patching-sites": _patching(sites=["z[1][3] @ last", "mlp_neurons[2][5,7] @ 8:", "module:model.layers.1.mlp.gate_proj @ name"],
        pairs=[{**ONE_PAIR[0], "spans": {"name": {"clean": "John gave", "corrupt": "Mary gave"}}, "name": "spanned"}]),
    "patching-continuation": _patching(
        pairs=[{**ONE_PAIR[0], "answer": " Mary and the book", "distractor": None}], components=["resid_post", "mlp_out"],
        metric=["cross_entropy", "kl"], layers=[0, 3],
    ),
    "patching-file": _patching(pairs="pairs.csv", metric="logprob", threshold=0.05, split=0.5, statistics={"correction": "bh", "bootstrap": 200}),
    "patching-set": _patching(pairs={"set": "capitals", "size": 5}, components=["attn_out"], positions="last", statistics={"correction": "none"}),
    "patching-small-budget": _patching(components=["resid_post", "mlp_neurons"], neurons="all", layers=[1], positions="last", memory="64MB"),
    "patching-float16-store": Run(_patching(components=["resid_post"]).recipe, options=("--store-dtype", "float16")),
    "patching-gpt2": _patching("tiny-gpt2", components=["resid_post", "z", "mlp_neurons"], heads="all", neurons="0:48:9", positions=[9, -1]),
    "patching-gemma": _patching("tiny-gemma", components=["resid_post", "attn_out", "z"], heads="all"),
    "patching-mamba": _patching("tiny-mamba", components=["resid_post"]),
    "patching-local-sim": _patching(components=["z"], heads="all", layers=[2], positions="last", backend="local-sim"),
    "patching-seeds": _patching(pairs={"set": "ioi", "size": 4, "seed": 3}, components=["mlp_out"], positions="s2", seed=7),
    "lens-tuned": _lens(method="tuned", train={"text": "text.txt", "tokens": 256, "sequence": 32, "steps": 3}),
    "lens-patchscope": _lens(method="patchscope", layers=[0, 2], positions=[0, -1]),
    "lens-patchscope-identity": _lens(method="patchscope", template="identity", target_layer=1, layers="1:3", positions="last"),
    "lens-chat": _lens(chat=CHATTY, positions="last"),
    "lens-gpt2": Run({"kind": "lens", "model": "tiny-gpt2", "prompts": "prompts.txt", "positions": "1:"}),
    "logit-attribution-neurons": Run(
        {"kind": "logit-attribution", "model": "tiny-llama", "prompts": {"set": "ioi", "size": 2}, "by": ["component", "head", "neuron"]}
    ),
    "logit-attribution-gpt2": Run(
        {"kind": "logit-attribution", "model": "tiny-gpt2", "prompts": [{"prompt": MARY, "answer": " Mary"}], "position": 4}
    ),
    "patchscope-map": _patchscope(
        source_model="tiny-wide", layers=[1, 2], target_layers=[0, 1], templates=["few_shot"],
        map={"prompts": [part for part in _TEXT.split(". ")[:12] if part]},
    ),
    "patchscope-sister": _patchscope(source_model="tiny-sister", layers=[1], target_layers=[1], templates="translate"),
    "patchscope-quick": _patchscope(preset="quick", templates=["few_shot"], controls=[]),
    "patchscope-targeted": _patchscope(preset="targeted", templates=["name_then_describe"], controls=["random"]),
    "patchscope-comprehensive": _patchscope(preset="comprehensive", templates=["describe", "attribute"]),
    "patchscope-own": _patchscope(
        sources=[
            {"prompt": "I live on Zorb", "entity": "Zorb"},
            {"prompt": "The piano is old", "position": "thing", "spans": {"thing": "piano"}, "strong": ["music"], "answer": "music"},
            "A volcano",
        ],
        facts="facts.json", layers="all", target_layers=[1],
        templates=[{"name": "own", "prompt": "All that I know of ? is", "expects": "name", "answer": " {name}", "separator": "."}],
        generation={"max_new_tokens": 3, "temperature": 0.7, "seed": 5},
    ),
    "bias-map": _bias(
        models={"aligned": "tiny-wide", "base": "tiny-llama"}, map="linear", components=["resid_post", "mlp_out"], mean_over_positions=True
    ),
    "bias-together": _bias(patch="together", components=["mlp_out", "attn_out"], layers="1:4"),
    "bias-single": _bias(
        patch="single", components=["attn_out"], mean_over_positions=True, neurons={"positions": "all", "top": 3, "ablation": "mean"}
    ),
    "bias-alignment": _bias(
        components=["mlp_out"], neurons={"layer": 2, "prompts": 4, "top": 3}, pairs={"bias_type": ["gender", "age"]},
        alignment={"auto": "pairs", "reduce": "max", "min_precision": 0.5, "sigma": 0.5, "level": 0.9},
    ),
    "bias-gap": _bias(components=[], pairs={"path": "crows.csv"}),
    "alignment-pairs": Run(
        {
            "kind": "alignment-scan", "model": "tiny-llama", "auto": "pairs", "reduce": "last", "layers": "1:", "sigma": 0.5,
            "min_precision": 0.5, "level": 0.9,
        },
        tables=True,
    ),
    "alignment-refusals": Run({"kind": "alignment-scan", "model": "tiny-llama", "auto": "refusals", **_FEW_REQUESTS}, refused=True),
    "attribution-verified": _attribution(methods=_ALL_METHODS, donor="counterfactual", verify=_VERIFIED, select={"method": "atp", "top_k": 10}),
    "attribution-edges": _attribution(methods=["edge", "relp"], steps=2, positions="last"),
    "attribution-positions": _attribution(
        components=["mlp_neurons", "z"], positions="all", methods=["relp", "atp"], attention="through", donor="mean",
        select={"share": 0.3, "top_k": None, "over": "mean", "sign": "positive", "drop_first": True},
        verify={"exact": "top", "top": 4, "sizes": [0.01, 1], "curve_draws": 1, "draws": 1},
    ),
    "attribution-pieces": _attribution(
        prompts=[{"prompt": "Ask the", "answer": " extraordinary volcanologist"}, {"prompt": MARY, "answer": " Mary"}], target="all",
        counterfactual="none",
        measure="logprob", methods=["grad_x_act"], donor="resample", reference=["One old text.", "And one more."], reference_over="end",
        select={"method": "grad_x_act", "per_layer": 3, "over": "any"},
    ),
    "attribution-first": _attribution(
        prompts=[{"prompt": "Ask the", "answer": " extraordinary volcanologist"}], target="first", counterfactual=" the", chat={"response": " very"},
        layers=[1, 3], position="last", select={"percent": 1, "top_k": None},
    ),
    "attribution-gpt2": Run(
        {
            "kind": "attribution", "model": "tiny-gpt2", "prompts": TWO_TEXTS, "methods": ["relp", "atp_ig"], "steps": 3,
            "verify": {**_VERIFIED, "ablations": ["zero"]},
        }
    ),
    "attribution-facts": _attribution(prompts={"set": "facts", "size": 2}, known=False, counterfactual="runner-up", methods=["atp", "relp"]),
    "capture-summary": Run(
        {
            "kind": "capture", "model": "tiny-llama", "prompts": {"path": "prompts.txt"}, "keep": "summary", "max_tokens": 6,
            "components": ["mlp_neurons", "z", "resid_post"], "chat": {"response": " so"},
        }
    ),
    "capture-bfloat16": Run(
        {"kind": "capture", "model": "tiny-llama", "prompts": TWO_TEXTS, "components": ["q", "k", "v", "attn_out", "mlp_gate"], "layers": "::2"},
        options=("--store-dtype", "bfloat16"),
    ),
    "causal-tracing-subjects": Run(
        {
            "kind": "causal-tracing", "model": "tiny-llama", "facts": _FACTS, "known_only": False, "window": 2,
            "noise": {"scale": 2, "of": "subjects", "draws": 3}, "metric": ["logprob", "prob", "entropy", "kl"], "seed": 4,
        }
    ),
    "causal-tracing-gpt2": Run(
        {
            "kind": "causal-tracing", "model": "tiny-gpt2", "facts": "facts", "limit": 2, "known_only": False, "noise": 4, "window": 3,
            "positions": "subject", "components": ["resid_post", "mlp_out"], "metric": "logit",
        }
    ),
    "contrast-pca": _contrast(paired=True, vectors="pca", at="mean", correction="bh"),
    "contrast-unpaired": _contrast(positive=[*GOOD, "They sang all night"], correction="none", at="mean", drop_first=2, decompose=False, seed=2),
    "contrast-chat": _contrast(paired=True, chat=CHATTY, correction="by", components=["resid_pre", "mlp_neurons"], layers=[1, 3]),
    "direction-ablation": _direction(select={"by": "ablation", "max_kl": 9}, chat={"response": " so"}, coefficient=2.0, generate=None, seed=3),
    "direction-heads": _direction(
        positions=2, select={"by": "addition", "max_kl": 9, "below": 1.0}, split={"train": 0.4, "validation": 0.2},
        generate={"max_new_tokens": 3, "temperature": 0.9, "seed": 1},
        patch={"components": ["z", "mlp_neurons"], "layers": [1, 2], "heads": True, "modes": ["noising"], "pairs": 2},
    ),
    "means-positions": Run(
        {"kind": "mean-activations", "model": "tiny-llama", "over": "prompts", "prompts": GOOD[:3], "components": ["resid_post", "mlp_neurons", "z"]}
    ),
    "means-gpt2": Run({"kind": "mean-activations", "model": "tiny-gpt2", "drop_first": 1, "components": ["attn_out", "k", "resid_mid"]}),
    "paths-denoising": Run(
        {
            "kind": "path-patching", "model": "tiny-llama", "pairs": {"set": "ioi", "size": 2}, "mode": "denoising",
            "senders": ["embed", "z[*][*]", "attn_out[1]", "mlp_out[*]"], "receivers": ["logits", "q[2][1]", "k[3][0]", "v[3][*]", "mlp_out[3]"],
            "metric": ["logit_diff", "kl"],
        }
    ),
    "paths-positions": Run(
        {
            "kind": "path-patching", "model": "tiny-gpt2", "pairs": ONE_PAIR, "senders": "z[0:2][*]", "receivers": ["q[2][*]", "logits"],
            "positions": [9, -1], "metric": "logprob",
        }
    ),
    "steering-neurons": _steering(neurons=["L1/N3", "L2/N40"], multipliers=[0, 3], positions="last", when="prompt"),
    "steering-circuit": _steering(circuit={"given": json.dumps(CIRCUIT)}, positions="own"),
    "steering-circuit-everywhere": _steering(circuit={"given": json.dumps(CIRCUIT), "top": 1}, multipliers=[2.5], when="generated"),
    "steering-sampled": _steering(
        vector={"positive": GOOD, "negative": BAD, "paired": True, "vectors": "pca", "component": "mlp_out", "layers": [1, 2], "at": "mean"},
        decoding={"max_new_tokens": 6, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 3}, chat=CHATTY,
    ),
    "steering-probabilities": _steering(
        vector={"positive": GOOD, "negative": BAD, "layers": 2}, decoding=None, multipliers=[-1, 1], positions=[0, -1]
    ),
}  # fmt: skip


# Doors


def _pair() -> Any:
    import nsp

    return nsp.pair(clean=MARY, corrupt=JOHN, answer=" Mary", distractor=" John", spans={"name": ("John gave", "Mary gave")})


def _patched(load: Callable[[str], Any]) -> Any:
    import nsp
    from nsp.experiments import activation_patching

    return activation_patching(
        load("tiny-llama"), _pair(), components=["z"], heads="all", layers=[1, 2], positions="name", mode="noising",
        metric=[nsp.logit_diff(" Mary", " John"), nsp.kl()], threshold=0.1,
    )  # fmt: skip


def _recovered(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import layer_recovery

    return [
        layer_recovery(load("tiny-llama"), MARY, JOHN, component="attn_out"),
        layer_recovery(load("tiny-llama"), MARY, JOHN, metric="logit_diff", answer=" Mary", distractor=" John", cumulative=True, positions="all"),
    ]


def _attributed(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import attribution

    named = {ATTRIBUTION_ANSWER: " Mary", ATTRIBUTION_PIECES: "first"}
    return attribution(
        load("tiny-llama"), [{"prompt": MARY, "donor": JOHN}, {"prompt": JOHN, "donor": MARY}], counterfactual=" John", donor="counterfactual",
        methods=["relp", "eap_ig"], select={"top_k": 7}, **named,
        verify={"exact": "top", "top": 3, "ablations": ["counterfactual"], "sizes": [0.1, 1], "draws": 2},
    )  # fmt: skip


def _discovered(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import discover

    circuit = discover(load("tiny-llama"), MARY, top_k=6, **{DISCOVERED_ANSWER: " Mary"})
    circuit.save("found.json")
    return {"circuit": json.loads(Path("found.json").read_text(encoding="utf-8"))}


def _scanned(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import pairs

    chosen = pairs.shipped_pairs().pairs[:3]
    gap = pairs.pair_gap(load("tiny-llama"), chosen)
    tree = pairs.bias_scan(
        load("tiny-llama"), load("tiny-sister"), chosen, components=["resid_post"], patch="single", neurons={"layer": 1, "top": 2},
        alignment={**_FEW_REQUESTS, "layers": [1]},
    )  # fmt: skip
    return {"gap": gap, "tree": tree, "score": str(pairs.crows_score(gap["gap"].values)), "neurons": str(pairs.alignment_neurons(tree))[:400]}


def _aligned(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import alignment_scan, pairs

    shared = pairs.overlap({(1, 2), (1, 3), (2, 4)}, {(1, 3), (2, 4), (3, 1)}, {1, 2}, 48)
    return {"tree": alignment_scan(load("tiny-llama"), **_FEW_REQUESTS, reduce="max", layers=[0, 3]), "overlap": str(shared)}


def _captured(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import capture, top_examples, unit_statistics

    tree = capture(load("tiny-llama"), TWO_TEXTS, components=["mlp_neurons", "z"], layers=[1])
    return {
        "tree": tree,
        "statistics": unit_statistics(tree, "mlp_neurons"),
        "neuron": top_examples(tree, "mlp_neurons", 1, 5, k=4),
        "column": top_examples(tree, "z", 1, 2, head=3, k=2),
    }


def _traced(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import causal_tracing

    return causal_tracing(
        load("tiny-llama"), _FACTS, known_only=False, **NOISE, components=["resid_post", "mlp_out"], window=3, layers=[0, 2],
        positions="subject", metric="logprob", seed=1,
    )  # fmt: skip


def _contrasted(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import contrast, control_vectors

    tree = contrast(load("tiny-llama"), GOOD, BAD, paired=True, components=["resid_post"], resamples=50)
    return {"tree": tree, "vectors": control_vectors(tree, layers=[2]).to_dict()}


def _directed(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import find_direction

    return find_direction(
        load("tiny-llama"), FIVE, OTHER_FIVE, layers=[1, 2], select={"max_kl": 9}, generate={"max_new_tokens": 3}, **BEHAVIOUR
    )


def _lenses(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import load_tuned_lens, logit_lens, patchscope_lens, train_tuned_lens, tuned_lens

    model = load("tiny-llama")
    trained = train_tuned_lens(model, "text.txt", tokens=256, sequence=32, steps=2)
    trained.save("lens")
    # The plan's hash has every bit of a trained lens, so only what it predicts is kept.
    tuned = tuned_lens(model, TWO_TEXTS, trained, layers=[1, 2])
    loaded = tuned_lens(model, TWO_TEXTS, load_tuned_lens("lens", model), positions="last")
    return {
        "logit": logit_lens(model, TWO_TEXTS[0], tokens=[" the"], top=2),
        "tuned": {path: tuned[path].to_dataset() for path in ("effects/lens", "effects/top")},
        "loaded": {path: loaded[path].to_dataset() for path in ("effects/lens", "effects/top")},
        "patchscope": patchscope_lens(model, TWO_TEXTS[1], positions="last"),
    }


def _logits_attributed(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import logit_attribution

    return logit_attribution(load("tiny-llama"), MARY, " Mary", " John", by="neuron")


def _averaged(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import mean_activations

    return mean_activations(load("tiny-llama"), TWO_TEXTS, components="z", drop_first=1)


def _scoped(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import patchscope

    return patchscope(
        load("tiny-llama"), [TWO_TEXTS[0]], templates="few_shot", source_model=load("tiny-sister"), layers=[1], target_layers=[0, 2],
        generation={"max_new_tokens": 3},
    )  # fmt: skip


def _paths(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import path_patching

    return path_patching(load("tiny-llama"), _pair(), senders="mlp_out[0:2]", receivers=["logits", "k[2][*]"], positions="name", metric="kl")


def _steered(load: Callable[[str], Any]) -> Any:
    from nsp.experiments import contrast, control_vectors, discover, steering

    model = load("tiny-llama")
    vectors = control_vectors(contrast(model, GOOD, BAD, components="resid_post", resamples=1), layers=[2])
    circuit = discover(model, MARY, top_k=3)
    return {
        "vector": steering(model, TWO_TEXTS, multipliers=[-1, 1], decoding={"max_new_tokens": 3}, **{STEERED_BY: vectors}),
        "circuit": steering(model, [MARY], circuit=circuit, positions="own", tokens=[" Mary"], decoding={"max_new_tokens": 3}),
    }


def _features(load: Callable[[str], Any]) -> Any:
    import nsp

    model = load("tiny-llama")
    found = [
        nsp.find_feature(model, name="glee", positive=GOOD, negative=BAD, layer=2, store="features"),
        nsp.find_feature(model, name="mary", prompt=MARY, top_k=3, store="features"),
    ]
    return {feature.name: {"source": dict(feature.source), "target": feature.target.to_dict()} for feature in found}


def _one_trace(load: Callable[[str], Any]) -> Any:
    import nsp

    with load("tiny-llama").trace(JOHN) as t:
        t.patch("resid_post[1] @ 9", donor=MARY)
        t.ablate("mlp_neurons[2][5,7] @ -1", kind="mean")
        t.scale("z[3][1] @ *", 0.5)
        t.inject("resid_post[2] @ last", [0.1] * 32, coefficient=2.0)
        t.record("attn_out[*]", "pattern[1]")
        t.measure(nsp.logit_diff(" Mary", " John"), nsp.entropy())
    with load("tiny-llama").trace(JOHN) as written:
        written.inject("resid_post[2] @ last", [0.1] * 32, mode="set")
        written.generate(4)
    with load("tiny-llama").trace(JOHN) as swept:
        swept.sweep(nsp.patch("z[*][*] @ 8:", donor=MARY))
        swept.measure(nsp.logit_diff(" Mary", " John"))
    return {"results": t.results, "plan": t.plan.hash, "swept": swept.results, "swept_plan": swept.plan.hash, "written": written.results}


DOORS: dict[str, Door] = {
    f"door:{name}": Door(call)
    for name, call in {
        "activation_patching": _patched, "layer_recovery": _recovered, "attribution": _attributed, "discover": _discovered,
        "bias_scan": _scanned, "alignment_scan": _aligned, "capture": _captured, "causal_tracing": _traced, "contrast": _contrasted,
        "find_direction": _directed, "lenses": _lenses, "logit_attribution": _logits_attributed, "mean_activations": _averaged,
        "patchscope": _scoped, "path_patching": _paths, "steering": _steered, "find_feature": _features, "trace": _one_trace,
    }.items()
}  # fmt: skip

CASES: dict[str, Run | Door] = {**SHIPPED, **VARIANTS, **DOORS}
