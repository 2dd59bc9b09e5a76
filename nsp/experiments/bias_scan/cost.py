"""What a bias scan will cost, from the lengths of its prompts alone."""

from __future__ import annotations

from collections.abc import Sequence

from nsp.engine.estimates import Estimate, speed
from nsp.experiments.bias_scan.prompts import ScanPrompt
from nsp.experiments.bias_scan.recipe import BiasScanRecipe
from nsp.model import Model

# Columns of one pass, and the logits of one chunk of readouts, which is what takes memory.
_PASS, _BYTES = 3072, 400_000_000


def scan_estimates(
    base: Model, recipe: BiasScanRecipe, prompts: Sequence[ScanPrompt], cells: Sequence[int]
) -> tuple[Estimate, ...]:
    """One estimate per component, and one for the neurons: at most, since what does not differ does not run.

    A layer's counterfactual runs whole prompts through the layers above it; a neuron's runs the patched tokens and
    those after them, and every one projects its last token onto the vocabulary.
    """
    geometry, runtime = base.geometry, base.runtime
    tokens, depth, count = sum(len(item.paired.base) for item in prompts), geometry.n_layers, len(prompts)
    rows: list[tuple[str, int, int, float]] = []
    for component in recipe.components:
        above = sum(depth - layer - 1 for layer in cells)
        rows.append((f"{component}, {recipe.patch}", count * len(cells), tokens * len(cells), float(tokens * above)))
    if recipe.neurons is not None:
        drawn = min(count, recipe.neurons.prompts or count)
        columns = (tokens * drawn // count if recipe.neurons.positions == "all" else drawn) * geometry.d_mlp
        # Which layer is the star layer is not known yet: the middle one, on average.
        rows.append(("mlp_neurons, one by one", drawn * geometry.d_mlp, columns, columns * depth / 2))
    reason = runtime.branch_refusal
    estimates = []
    for title, branches, columns, token_layers in rows:
        flop = token_layers * runtime.cost.per_token + branches * 2.0 * geometry.d_model * geometry.vocab_size
        estimates.append(
            Estimate(
                title=title,
                path="plain" if reason else "branch",
                reason=reason or "attention is causal and the self-check passed",
                branches=branches,
                pruned=0,
                passes=max(1, columns // _PASS),
                tokens=columns,
                token_layers=int(token_layers),
                naive_token_layers=branches * tokens // count * depth,
                work=flop,
                flop=flop,
                seconds=flop / speed(str(runtime.device), runtime.dtype),
                bytes=_BYTES,
            )
        )
    return tuple(estimates)
