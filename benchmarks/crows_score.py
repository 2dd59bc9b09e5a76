"""The CrowS-Pairs score of a causal model by plain transformers, for comparison with nsp's: no line of nsp in it.

    python benchmarks/crows_score.py MODEL crows_pairs_anonymized.csv

MODEL is a directory, a hub id or a .gguf file. A sentence's score is the sum of its tokens' log-probabilities after the
beginning-of-text token; the CrowS-Pairs score is the percentage of pairs whose `sent_more` has the higher sum.
One sentence a forward pass: nothing is padded, nothing is batched.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, data = sys.argv[1], sys.argv[2]
path = Path(source)
where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
name = str(path.parent) if where else source
tokenizer = AutoTokenizer.from_pretrained(name, **where)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **where).eval()
first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


@torch.no_grad()
def score(sentence: str) -> float:
    ids = torch.tensor([[first, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]])
    log_p = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
    return float(log_p.gather(1, ids[0, 1:, None]).sum())


prefers = defaultdict(list)
with open(data, newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
        prefers[row["bias_type"]].append(score(row["sent_more"]) > score(row["sent_less"]))
for kind, flags in sorted(prefers.items()):
    print(f"{kind:22} {len(flags):5} {100 * sum(flags) / len(flags):7.3f}")
flags = [flag for kind in prefers.values() for flag in kind]
print(f"{'all':22} {len(flags):5} {100 * sum(flags) / len(flags):7.3f}")
