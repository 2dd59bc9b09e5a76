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

# Where the Python name of an argument differs from the recipe's key of the same meaning, today's name.
ATTRIBUTION_ANSWER, ATTRIBUTION_PIECES = "target", "pieces"


@dataclass(frozen=True)
class Run:
    """A recipe that `nsp run` runs: the name of a shipped one, or its keys; with `--set` of each of ``change``."""

    recipe: str | Mapping[str, Any]
    change: Mapping[str, Any] = field(default_factory=dict)
    tables: bool = False

    def recipe_argument(self, name: str) -> str:
        """What stands for the recipe on the command line; keys are written into a file of the working directory."""
        if isinstance(self.recipe, str):
            return self.recipe
        path = Path(f"{name}.yaml")
        path.write_text(json.dumps(self.recipe, ensure_ascii=False), encoding="utf-8")
        return str(path)

    def settings(self) -> list[str]:
        """The options that reduce it."""
        return [word for key, value in self.change.items() for word in ("--set", f"{key}={json.dumps(value, ensure_ascii=False)}")]


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
            if name.endswith(("A_log", "dt_bias", "dt_proj.bias", ".D")):
                continue  # a state-space model's time constants
            raw = np.random.PCG64(1000 * seed + number).random_raw(parameter.numel())
            even = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0  # from -1 to 1
            noise = torch.from_numpy(even.astype(np.float32)).reshape(parameter.shape)
            if parameter.dim() == 1:
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

CASES: dict[str, Run | Door] = {**SHIPPED}
