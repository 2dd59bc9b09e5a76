"""Experiments. This stub is made from the recipe classes: python tests/door_stubs.py --write"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import xarray as xr

from nsp.datasets.bias_pairs import BiasPair
from nsp.datasets.facts import Fact
from nsp.datasets.pairs import Pair
from nsp.experiments import pairs as pairs
from nsp.experiments.accessor import report as report
from nsp.experiments.activation_patching.layer_recovery import layer_recovery as layer_recovery
from nsp.experiments.attribution.discovery import discover as discover
from nsp.experiments.capture.summary import top_examples as top_examples
from nsp.experiments.capture.summary import unit_statistics as unit_statistics
from nsp.experiments.circuits import Circuit
from nsp.experiments.contrast.vectors import ControlVectors
from nsp.experiments.contrast.vectors import control_vectors as control_vectors
from nsp.experiments.experiment import Experiment as Experiment
from nsp.experiments.feature_store import Feature
from nsp.experiments.feature_store import FeatureStore as FeatureStore
from nsp.experiments.html_report import report_page as report_page
from nsp.experiments.lens.tuned import TunedLens
from nsp.experiments.lens.tuned import load_tuned_lens as load_tuned_lens
from nsp.experiments.lens.tuned import train_tuned_lens as train_tuned_lens
from nsp.experiments.registry import EXPERIMENTS as EXPERIMENTS
from nsp.experiments.runner import run as run
from nsp.experiments.steering.target import SteeringTarget
from nsp.metrics import Metric
from nsp.model import Model

def activation_patching(
    model: Model,
    pairs: str | Pair | Mapping[str, Any] | Sequence[Pair | Mapping[str, Any]] | Path,
    *,
    mode: Literal['denoising', 'noising', 'interchange'] = 'denoising',
    sites: str | Sequence[str] = (),
    components: str | Sequence[str] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    positions: str | int | Sequence[int | str] = 'all',
    heads: str | int | Sequence[int | str] | None = None,
    neurons: str | int | Sequence[int | str] | None = None,
    together: Literal['layer', 'position'] | Sequence[Literal['layer', 'position']] = (),
    cumulative: bool = False,
    metric: str | Metric | Mapping[str, Any] | Sequence[str | Metric | Mapping[str, Any]] = ...,
    statistics: Mapping[str, Any] = ...,
    threshold: float | None = None,
    split: float | None = None,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Patch each site of one prompt's run with its value from the other prompt's, one by one, and measure.

    Args:
        model: a loaded model.
        pairs: Pairs of prompts: a list, a csv, tsv or jsonl file, or the name of a built-in set.
        mode: denoising patches clean into corrupt, noising corrupt into clean, interchange both ways.
        sites: Sites as selectors, such as "z[9][3] @ last", in place of components or beside them.
        components: What is patched, at every layer, unit and position chosen below; resid_post, unless sites are given.
        layers: all, an index, a list, or a slice such as 2:8.
        positions: all, last, an index, a list, a slice, or the name of a span.
        heads: Patch these heads one by one (all, a list, a slice); by default all heads of a layer together.
        neurons: Patch these neurons one by one (all, a list, a slice); by default all neurons of a layer together.
        together: Dims that are patched all at once instead of one by one.
        cumulative: Patch the chosen layers up to each layer together, instead of each layer alone.
        metric: What is measured: a metric, or a list of them. The first one also gives `effect`, its normalised form.
        statistics: How effects over several pairs are judged in the report.
        threshold: Count in the report the sites whose mean effect is at least this far from 0. This is no test.
        split: Select sites on this fraction of the pairs and estimate their effects on the others, reported separately.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``effects/<component>``: each metric, ``effect`` (normalised: 0 at the base run, 1 at the donor run)
            and ``recovery_<metric>`` (in percent), dims (pair, layer, position) and head or neuron where these are
            patched one by one; ``receipts/<component>``: ``fired`` and ``change_norm``, same dims; ``baseline``:
            ``<metric>_clean`` and ``<metric>_corrupt``, dims (pair,); ``inputs``: texts and tokens. Its report is
            ``tree.nsp.report()``.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def alignment_scan(
    model: Model,
    *,
    harmful_txt: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any] | None = None,
    normal_txt: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any] | None = None,
    auto: Literal['pairs', 'refusals'] | None = None,
    chat: Mapping[str, Any] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    reduce: Literal['last', 'mean', 'max'] = 'mean',
    sigma: float = 2.0,
    min_precision: float = 0.9,
    level: float = 0.05,
    holdout: float = 0.5,
    pairs: str | Sequence[BiasPair | Mapping[str, Any]] | Mapping[str, Any] = ...,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Find the neurons that fire on harmful prompts and not on normal ones.

    Args:
        model: a loaded model.
        harmful_txt: Harmful prompts: a file of one per line (or a column of csv, tsv, jsonl), or a list; by default
            nsp's own.
        normal_txt: Normal prompts, in the same form.
        auto: Derive the two sets: the more and the less sentences of `pairs`, or the prompts that the model refuses and
            those that it answers.
        chat: Put prompts through the model's chat template.
        layers: all, an index, a list, or a slice such as 2:8.
        reduce: A neuron's value on a prompt: at the last token, or the mean or the maximum over tokens.
        sigma: A neuron fires above mean + sigma x standard deviation of its values on normal prompts.
        min_precision: Of the prompts on which a neuron fires, at least this share must be harmful.
        level: The false discovery rate (Benjamini-Hochberg) over all neurons.
        holdout: The share of prompts kept out of the search, on which what was found is tried again.
        pairs: The sentences of `auto: pairs`.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``activations/mlp_neurons`` (prompt, layer, neuron) and ``inputs`` (prompt, position)

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def attribution(
    model: Model,
    prompts: str | Sequence[str | Mapping[str, Any]] | Mapping[str, Any],
    *,
    chat: Mapping[str, Any] | None = None,
    answer: str | int | None = None,
    counterfactual: str | int | None = 'runner-up',
    target: Literal['single', 'first', 'last', 'all'] = 'single',
    measure: Literal['logit', 'logprob', 'prob'] = 'logit',
    position: str | int | Sequence[int | str] = 'last',
    known: bool = True,
    components: str | Sequence[str] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    positions: str | int | Sequence[int | str] = 'last',
    methods: str | Sequence[str] = ...,
    steps: int = 5,
    attention: Literal['frozen', 'through'] = 'frozen',
    donor: Literal['zero', 'mean', 'resample', 'counterfactual'] = 'zero',
    reference: Literal['own'] | str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any] | None = None,
    reference_over: Literal['tokens', 'end'] | None = None,
    select: Mapping[str, Any] = ...,
    verify: Mapping[str, Any] | None = None,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Attribute a metric to units by gradients, select circuits, and check both by exact patching.

    Args:
        model: a loaded model.
        prompts: Prompts (texts, or mappings with an answer), a csv, tsv or jsonl file, or a built-in set: fact-
            questions, facts.
        chat: The chat template, a system message, the beginning of the reply; a built-in set brings its own.
        answer: The target of every prompt that names no answer; by default the model's most likely token.
        counterfactual: The token that the target is measured against: runner-up, none (the target alone), or a token or
            its id.
        target: Of an answer of several tokens: single is an error; first or last; all makes each token a prompt of its
            own.
        measure: With counterfactual: none, what is attributed of the target.
        position: The position whose next-token distribution is measured.
        known: Of a built-in set, leave out what the model does not give as its most likely next token.
        components: What is attributed, all of its units at once.
        layers: all, an index, a list, or a slice such as 2:8.
        positions: The positions whose units are attributed: all, last, an index, a list, a slice.
        methods: atp, atp_ig, eap_ig, grad_x_act, relp for units; edge for edges between heads and MLPs.
        steps: Of the integrated methods.
        attention: In relp: the attention pattern is detached, or gradients go through it.
        donor: What replaces a unit, in scores and in exact effects alike.
        reference: Prompts of mean and resample: own (the run's prompts; all of a built-in set), a list, a file; by
            default nsp's neutral sentences.
        reference_over: Over all tokens of the reference prompts, or over what is at the same position from the end (by
            default for own).
        select: Which units make a circuit; can be chosen again later from the store, without computing anything.
        verify: Proof by exact patching.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``attribution/<component>``: the scores, one variable for each method, dims (prompt, layer,
            position) and neuron or head; ``attribution/edges``: ``edge``, (prompt, sender, receiver);
            ``circuit/<component>``: 1 where a unit is in the circuit, dims as the scores;
            ``circuit/curves-<ablation>``: the metric by circuit size, (prompt, step), and ``circuit/knockout``,
            (prompt,); ``effects/<component>``: exact effects, dims as the scores; ``baseline``: the metric in the
            ordinary run, (prompt,); ``inputs``: prompts, targets and counterfactual tokens

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def bias_scan(
    aligned: Model,
    base: Model | None = None,
    pairs: str | Sequence[BiasPair | Mapping[str, Any]] | Mapping[str, Any] = ...,
    *,
    ablate: str | Sequence[str] = (),
    ablation: Literal['zero', 'mean'] = 'zero',
    components: str | Sequence[str] = ...,
    patch: Literal['cumulative', 'single', 'together'] = 'cumulative',
    layers: str | int | Sequence[int | str] = 'all',
    mean_over_positions: bool = False,
    map: Literal['linear'] | None = None,
    neurons: Mapping[str, Any] | None = ...,
    alignment: Mapping[str, Any] | None = None,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Patch an aligned model's activations into a base model, prompt by prompt, and see where their divergence goes.

    Args:
        aligned: a loaded model that donates its activations.
        base: a loaded model that receives them; None takes the aligned one, with what ``ablate`` names ablated.
        pairs: The pairs of sentences; both of a pair are prompts.
        ablate: Sites of the base model that are ablated, such as "mlp_neurons[10] @ *": a model against its own
            ablation.
        ablation: How: by zero, or by the mean over nsp's neutral sentences.
        components: What is patched, each on its own; the star layer is that of the first. None ([]): no scan, the pair
            gap alone.
        patch: cumulative: layers 0 to l for every l; single: one layer at a time; together: all of `layers` at once.
        layers: The layers l: all, an index, a list, or a slice such as 2:8.
        mean_over_positions: Also the divergence averaged over all positions, beside that at the last.
        map: For models of different widths: fit a linear map of activations on nsp's neutral sentences.
        neurons: Patch every single neuron of the star layer; null: do not.
        alignment: Also scan the aligned model for neurons that fire on harmful prompts, and intersect the two sets.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``baseline`` (prompt), ``effects/<component>`` and ``receipts/<component>`` (prompt, layer),
            ``effects/mlp_neurons`` (prompt, neuron), ``circuit/found`` (neuron: rank), ``effects/ablation`` (prompt),
            ``effects/neutral`` (prompt: neutral sentence), ``activations/mlp_neurons`` (prompt, layer, neuron) where
            there is an alignment scan, and ``inputs``

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def capture(
    model: Model,
    prompts: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    *,
    chat: Mapping[str, Any] = ...,
    components: str | Sequence[str] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    keep: Literal['values', 'summary'] = 'values',
    max_tokens: int | None = None,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Run prompts once and keep the activations of chosen components, streaming into the store.

    Args:
        model: a loaded model.
        prompts: The prompts: a list, or a txt, csv, tsv or jsonl file of them.
        chat: How a text becomes a prompt.
        components: What is kept: any component with layers but the attention pattern.
        layers: all, an index, a list, or a slice such as 2:8.
        keep: values keeps every number; summary only each prompt's maximum (and where it is), mean and mean square.
        max_tokens: Cut prompts to so many tokens.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``activations/<component>``: ``value`` with dims (prompt, layer, position, neuron), or head and
            neuron for q, k, v and z; ``max``, ``max_position``, ``mean``, ``mean_square`` without position; and
            ``inputs``.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def causal_tracing(
    model: Model,
    facts: str | Sequence[Fact | Mapping[str, Any]] | Mapping[str, Any] = ...,
    *,
    limit: int | None = None,
    known_only: bool = True,
    noise: float | Mapping[str, Any] = ...,
    components: Literal['resid_post', 'attn_out', 'mlp_out'] | Sequence[Literal['resid_post', 'attn_out', 'mlp_out']] = ...,
    window: int = 10,
    layers: str | int | Sequence[int | str] = 'all',
    positions: str | int | Sequence[int | str] = 'all',
    metric: str | Metric | Mapping[str, Any] | Sequence[str | Metric | Mapping[str, Any]] = ...,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Corrupt a fact's subject with noise, restore one state (or a window of layers) from the clean run, and measure.

    Args:
        model: a loaded model.
        facts: Facts: `facts` (the set that ships with nsp), a file, or a list of {prompt, subject, answer}.
        limit: Take only so many facts, the first that the model knows.
        known_only: Leave out facts whose answer is not the model's most likely next token: there is nothing to restore.
        noise: The noise that corrupts the subject's embeddings.
        components: What is restored: single states of the residual stream, windows of layers of attention or MLP
            outputs.
        window: How many layers of attn_out or mlp_out are restored together, centred on a layer and clipped at the
            ends.
        layers: The layers restored (the centres of windows): all, an index, a list, or a slice such as 2:8.
        positions: The positions restored, one by one: all, last, subject, an index, a list, a slice.
        metric: What is measured: a metric, or a list of them. Effects on the first are in `indirect_effect`.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``effects/<component>``: each metric under restoration, ``indirect_effect`` (restored - corrupted),
            ``indirect_effect_sd`` (over draws) and ``effect`` (0 corrupted, 1 clean), dims (prompt, layer, position);
            of further metrics with their names behind; ``baseline``: ``<metric>_clean``, ``<metric>_corrupted`` and
            ``<metric>_corrupted_sd``, dims (prompt,); ``receipts/<component>``: ``fired`` and ``change_norm``;
            ``inputs``: facts, tokens and ``role``, what each token is to its fact. A prompt is a fact.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def contrast(
    model: Model,
    positive: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    negative: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    *,
    paired: bool = False,
    chat: Mapping[str, Any] = ...,
    components: str | Sequence[str] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    at: Literal['last', 'mean'] = 'last',
    drop_first: int = 1,
    vectors: Literal['mean_difference', 'pca'] = 'mean_difference',
    correction: Literal['max-t', 'bh', 'by', 'none'] = 'max-t',
    resamples: int = 2000,
    decompose: bool = True,
    circuit: str | Circuit | Mapping[str, Any] | None = None,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Compare activations between two sets of prompts: neurons that differ, and a control vector a layer.

    Args:
        model: a loaded model.
        positive: Prompts that have what is looked for: a list, or a file.
        negative: Prompts that lack it.
        paired: Prompt i of the one set belongs to prompt i of the other; pca needs it, and tests gain power from it.
        chat: How a text becomes a prompt: the chat template, a system message, the beginning of the reply.
        components: What is compared; each component gets neurons (or columns) by effect, and control vectors.
        layers: all, an index, a list, or a slice such as 2:8.
        at: The last position, or the mean over positions.
        drop_first: With at: mean, leave out so many first tokens: a model's first token is often an outlier whatever it
            says.
        vectors: How control vectors are made.
        correction: For the number of units tested, over all layers of a component: max-t (any false unit at all), bh or
            by (the share of false ones), none.
        resamples: Permutations (or flips of pairs) of the test, for max-t and none.
        decompose: Take the control vectors of the residual stream apart into MLP neurons.
        circuit: A circuit to compare the control vectors with: a file (JSON, as `Circuit.save` writes it), or the
            circuit itself.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``activations/<component>`` (``activation``, (prompt, layer, neuron)), ``attribution/<component>``
            (``difference``, ``cohen_d``, ``p``, ``p_corrected``, ``vector``, (layer, neuron), and ``separation`` on
            held-out prompts, (layer)), ``attribution/<component>-neurons`` (the decomposition: ``cosine``,
            ``coefficient``, (layer, neuron), and ``pursuit_neuron``, ``explained``, (layer, step)) and
            ``circuit/<component>`` (the comparison with a circuit, (layer)); `nsp.experiments.control_vectors` takes
            the vectors from it

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def find_direction(
    model: Model,
    positive: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    negative: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    *,
    behaviour: Mapping[str, Any],
    chat: Mapping[str, Any] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    positions: Literal['template'] | int = 'template',
    split: Mapping[str, Any] = ...,
    select: Mapping[str, Any] = ...,
    coefficient: float = 1.0,
    generate: Mapping[str, Any] | None = ...,
    patch: Mapping[str, Any] | None = None,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Find the direction that carries a behaviour, take it out, put it in, and measure what replies become.

    Args:
        model: a loaded model.
        positive: Prompts that bring the behaviour about: a list, or a file.
        negative: Prompts that do not.
        behaviour: How the behaviour shows in a reply.
        chat: How a text becomes a prompt: the chat template, a system message, the beginning of the reply.
        layers: Layers whose incoming residual stream gives candidates: all, an index, a list, or a slice such as 2:8.
        positions: Candidates' positions: the tokens of the chat template after the instruction (without a template the
            last token), or so many tokens from the end.
        split: How the prompts are divided, at random by the recipe's seed.
        select: How the direction is chosen.
        coefficient: How much of the difference of means is added.
        generate: How replies to the test prompts are generated; null generates none.
        patch: Patch sites between test prompts of the two sets; by default none.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``circuit/chosen`` (the direction: ``vector`` with dims (direction, neuron), its layer and
            position), ``activations/resid_pre`` (all candidates, (layer, position, neuron)), ``effects/selection``
            (what each does, (layer, position)), ``baseline``, ``effects/ablated`` and ``effects/added`` (scores of the
            test prompts, (prompt)), ``generations`` (texts, (prompt)) and ``effects/<component>-<mode>`` (patched
            sites, (pair, layer, position, head))

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def logit_attribution(
    model: Model,
    prompts: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]] | Mapping[str, Any],
    answer: str | int | None = None,
    distractor: str | int | None = None,
    *,
    by: str | Sequence[str] = ...,
    position: int | Literal['last'] = 'last',
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Direct logit attribution: what each component, head or neuron adds to a logit, through the final norm as it is.

    Args:
        model: a loaded model.
        prompts: Prompts with answers, or a built-in set of pairs, whose clean prompts are taken.
        answer: The answer of prompts that are given without one.
        distractor: The distractor of prompts that are given without an answer.
        by: component: embedding, attention and MLP of each layer; head: each head; neuron: each MLP neuron.
        position: The position whose prediction is taken apart.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``attribution/attn_out`` and ``attribution/mlp_out``: ``contribution``, dims (prompt, layer);
            ``attribution/z`` and ``attribution/mlp_neurons``, where asked for: ``contribution``, dims (prompt, layer,
            head) or (prompt, layer, neuron), and ``bias``, dims (prompt, layer), what no unit wrote; ``baseline``:
            ``logit``, ``total`` (the sum of all shares), ``embed`` and ``bias``, dims (prompt,); ``inputs``: texts and
            tokens. All in logits.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def logit_lens(
    model: Model,
    prompts: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    *,
    chat: Mapping[str, Any] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    positions: str | int | Sequence[int | str] = 'all',
    tokens: str | int | Sequence[str | int] = (),
    top: int = 5,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """What would the model say if it stopped at each layer? The residual stream, read as next-token predictions.

    Args:
        model: a loaded model.
        prompts: Texts, or a file of them.
        chat: How a text becomes a prompt of an instruct model.
        layers: Layers whose resid_post is read.
        positions: Token positions that are read.
        tokens: Tokens to follow: their probability, log-probability and rank everywhere. With its leading space: "
            Paris".
        top: How many of the most likely tokens are kept.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``effects/lens``: ``entropy``, ``divergence`` (from the model's output), ``output_logprob`` and
            ``output_rank`` (of the token that the output favours), ``next_logprob`` and ``next_rank`` (of the prompt's
            next token), dims (prompt, layer, position), and ``prob``, ``logprob`` and ``rank`` of the tokens followed,
            dims (prompt, layer, position, token); ``effects/top``: ``token_id``, ``token_text`` and ``token_prob`` of
            the most likely tokens, dims (prompt, layer, position, token); ``inputs``: texts and tokens.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def mean_activations(
    model: Model,
    prompts: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any] | None = None,
    *,
    chat: Mapping[str, Any] = ...,
    components: str | Sequence[str] = ...,
    over: Literal['tokens', 'prompts'] = 'tokens',
    drop_first: int = 0,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Mean activations over a set of prompts, to ablate with: `nsp.ablate(site, "mean", reference=<the store>)`.

    Args:
        model: a loaded model.
        prompts: The prompts; by default nsp's small set of neutral sentences.
        chat: How a text becomes a prompt.
        components: What is averaged, at every layer that has it.
        over: tokens: one mean over all tokens of all prompts; prompts: one a position, over prompts of one length.
        drop_first: With over: tokens, leave out so many first tokens of each prompt.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``activations/<component>``: ``mean`` and ``std`` with dims (layer, neuron), with position after
            layer for means over prompts, with head before neuron for q, k, v and z; and ``inputs``. ``nsp.ablate(site,
            'mean', reference=…)`` takes the path of the store, or one component's means.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def patchscope(
    model: Model,
    sources: str | Sequence[str | Mapping[str, Any]] | Mapping[str, Any],
    *,
    templates: str | Sequence[str | Mapping[str, Any]] = ...,
    placeholder: str = '?',
    facts: str | None = None,
    preset: Literal['quick', 'targeted', 'comprehensive'] | None = None,
    layers: str | int | Sequence[int | str] = 'all',
    target_layers: str | int | Sequence[int | str] = 'all',
    controls: Sequence[Literal['random', 'unrelated']] = ...,
    generation: Mapping[str, Any] = ...,
    top: int = 5,
    source_model: str | Model | Mapping[str, Any] | None = None,
    map: Mapping[str, Any] | None = None,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Put a representation of one prompt into another prompt, and let the model say what it holds.

    Args:
        model: a loaded model.
        sources: Prompts to read from: a list, or a set of entities (people, places, things, all).
        templates: Target prompts: few_shot, identity, describe, name_then_describe, translate, attribute, or your own.
        placeholder: The text in the target prompt whose token is replaced.
        facts: A JSON file of entities: name -> {strong: [...], partial: [...], answer: ...}.
        preset: quick: 6 x 6 layers; targeted: every other source layer, the first third of target layers;
            comprehensive: a coarse grid, refined around its hotspots, then compared over the templates.
        layers: Source layers, whose resid_post is read: all, an index, a list, or a slice such as 0:12.
        target_layers: Target layers, whose resid_post is replaced at the placeholder.
        controls: Beside the run without a patch: a random vector of the same norm, and another entity's representation.
        generation: How the text is generated.
        top: How many of the most likely first tokens are kept.
        source_model: Another model to read from.
        map: A map between the models' residual streams; models of different width need one.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``effects/patch`` (and ``effects/random``, ``effects/unrelated``, the controls): ``match`` (does the
            text say what is expected: 0 no, 1 in part, 2 yes), ``score`` (log-probability of the answer),
            ``first_entropy``, ``first_logprob`` and ``first_rank`` of the first token, dims (prompt, layer,
            target_layer); of the patched run also ``first_top_id`` and ``first_top_prob``, dims (prompt, layer,
            target_layer, token), and ``phase``; ``generations``: ``text``, ``text_<control>`` and ``token_id``;
            ``baseline``: the same of the run without a patch, dims (prompt,); ``receipts/patch``: ``vector_norm`` and
            ``change_norm``; ``receipts/map``: ``r2``, dims (layer, target_layer); ``inputs``: prompts, positions and
            what is expected. An entry of prompt is a source read into a template.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def patchscope_lens(
    model: Model,
    prompts: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    *,
    chat: Mapping[str, Any] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    positions: str | int | Sequence[int | str] = 'all',
    tokens: str | int | Sequence[str | int] = (),
    top: int = 5,
    target_layer: int | None = None,
    template: Literal['few_shot', 'identity'] = 'few_shot',
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """What would the model say if it stopped at each layer? The residual stream, read as next-token predictions.

    Args:
        model: a loaded model.
        prompts: Texts, or a file of them.
        chat: How a text becomes a prompt of an instruct model.
        layers: Layers whose resid_post is read.
        positions: Token positions that are read.
        tokens: Tokens to follow: their probability, log-probability and rank everywhere. With its leading space: "
            Paris".
        top: How many of the most likely tokens are kept.
        target_layer: patchscope: the layer that is written in the identity prompt; by default the layer that was read.
        template: patchscope: few_shot ends with the placeholder, so that the next token is read (as in the paper);
            identity goes on with " ->", so that the token itself is.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``effects/lens``: ``entropy``, ``divergence`` (from the model's output), ``output_logprob`` and
            ``output_rank`` (of the token that the output favours), ``next_logprob`` and ``next_rank`` (of the prompt's
            next token), dims (prompt, layer, position), and ``prob``, ``logprob`` and ``rank`` of the tokens followed,
            dims (prompt, layer, position, token); ``effects/top``: ``token_id``, ``token_text`` and ``token_prob`` of
            the most likely tokens, dims (prompt, layer, position, token); ``inputs``: texts and tokens.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def path_patching(
    model: Model,
    pairs: str | Pair | Mapping[str, Any] | Sequence[Pair | Mapping[str, Any]] | Path,
    *,
    mode: Literal['noising', 'denoising'] = 'noising',
    senders: str | Sequence[str] = ...,
    receivers: str | Sequence[str] = ...,
    positions: str | int | Sequence[int | str] = 'all',
    metric: str | Metric | Mapping[str, Any] | Sequence[str | Metric | Mapping[str, Any]] = ...,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Patch the direct path from each sender to each receiver, all that lies between frozen, and measure.

    Args:
        model: a loaded model.
        pairs: Pairs of prompts: a list, a csv, tsv or jsonl file, or the name of a built-in set.
        mode: noising sends the corrupt run's values along a path of the clean run (what does the path break?),
            denoising the clean run's along a path of the corrupt one (what does it restore?).
        senders: Whose output changes, as selectors: embed, z (heads), attn_out, mlp_out.
        receivers: Whose input changes, as selectors: q, k, v (heads; key/value heads for k and v), mlp_out (an MLP,
            through what it reads), logits (the final residual stream).
        positions: Where the path runs, all these positions together: all, last, an index, a list, a slice, or the name
            of a span.
        metric: What is measured: a metric, or a list of them. The first one also gives `effect`, its normalised form.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``effects/paths`` (each metric and ``effect``, its normalised form: 0 at the base run, 1 at the
            donor run; NaN where there is no path) and ``receipts/paths``, both (pair, sender, receiver); ``baseline``
            (pair); ``inputs``

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def steering(
    model: Model,
    prompts: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    *,
    chat: Mapping[str, Any] = ...,
    vector: ControlVectors | Mapping[str, Any] | None = None,
    circuit: str | Circuit | Mapping[str, Any] | None = None,
    neurons: Sequence[str] = (),
    feature: Feature | SteeringTarget | str | None = None,
    multipliers: float | Sequence[float] | None = None,
    positions: str | int | Sequence[int | str] = 'all',
    when: Literal['prompt', 'generated', 'both'] | None = None,
    tokens: Sequence[str | int] = (),
    top_k: int = 5,
    decoding: Mapping[str, Any] | None = ...,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Scale a circuit's neurons, or add a control vector, while generating, at several strengths at once.

    Args:
        model: a loaded model.
        prompts: Prompts to continue.
        chat: How a text becomes a prompt.
        vector: Add a control vector; a multiplier of 0 adds nothing.
        circuit: Scale the units of a circuit; a multiplier of 1 changes nothing.
        neurons: Scale these MLP neurons, such as L23/N8079.
        feature: A named feature of the feature store (`nsp.find_feature`); in Python also a feature itself.
        multipliers: Strengths, generated side by side; by default -2 to 2 for vectors, 0 to 4 for neurons. The strength
            that changes nothing is always among them.
        positions: Where the prompt is changed: all, last, an index, a list; for a circuit also own, where its units
            were found.
        when: Whether the prompt, each generated token, or both are changed; by default both, or the prompt with
            positions: own.
        tokens: Tokens whose next-token probabilities are kept, with their leading space: " Paris".
        top_k: How many of the most likely next tokens are kept.
        decoding: How texts are generated; null generates none.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``effects/next_token``: ``kl``, dims (prompt, direction), ``top_id``, ``top_text`` and ``top_prob``,
            dims (prompt, direction, token); ``effects/tokens``: ``prob`` and ``logprob`` of the tokens named, dims
            (prompt, direction, token); ``generations``: ``text``, ``n_tokens``, ``perplexity``, ``repetition`` and
            ``distinct_2``, dims (prompt, direction), ``token_id``, dims (prompt, direction, step);
            ``receipts/steering``: ``fired``, dims (prompt, direction); ``activations/<component>`` or
            ``circuit/<component>``: what was added or scaled. The coordinate ``multiplier`` says how strong each
            direction is.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """

def tuned_lens(
    model: Model,
    prompts: str | Sequence[str | Sequence[int] | Sequence[Mapping[str, Any]]] | Path | Mapping[str, Any],
    weights: TunedLens | str | None = None,
    *,
    chat: Mapping[str, Any] = ...,
    layers: str | int | Sequence[int | str] = 'all',
    positions: str | int | Sequence[int | str] = 'all',
    tokens: str | int | Sequence[str | int] = (),
    top: int = 5,
    train: Mapping[str, Any] | None = None,
    memory: str | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """What would the model say if it stopped at each layer? The residual stream, read as next-token predictions.

    Args:
        model: a loaded model.
        prompts: Texts, or a file of them.
        weights: tuned: a directory with a lens (config.json, params.pt), of nsp or of the tuned-lens package; in Python
            also a lens.
        chat: How a text becomes a prompt of an instruct model.
        layers: Layers whose resid_post is read.
        positions: Token positions that are read.
        tokens: Tokens to follow: their probability, log-probability and rank everywhere. With its leading space: "
            Paris".
        top: How many of the most likely tokens are kept.
        train: tuned: train the lens instead.
        memory: The most memory that the run's activations may take, such as 4GB; by default what is free.
        seed: Seed for everything random in the run.
        out: Where to keep the run as a store; None keeps it in memory alone.
        force: Replace a store at ``out`` that holds another run.
        progress: Show a bar; None shows one in a notebook alone.
        store_dtype: Round what the store keeps.
        plot: Show the run's figure, or write it to a file (``'figure.png'``).

    Returns:
        a tree with ``effects/lens``: ``entropy``, ``divergence`` (from the model's output), ``output_logprob`` and
            ``output_rank`` (of the token that the output favours), ``next_logprob`` and ``next_rank`` (of the prompt's
            next token), dims (prompt, layer, position), and ``prob``, ``logprob`` and ``rank`` of the tokens followed,
            dims (prompt, layer, position, token); ``effects/top``: ``token_id``, ``token_text`` and ``token_prob`` of
            the most likely tokens, dims (prompt, layer, position, token); ``inputs``: texts and tokens.

    Raises:
        InputError: a key is wrong, or does not fit the model; nothing has run then.
    """
