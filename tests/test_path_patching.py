"""Path patching against the slow way: a run with everything but the sender frozen, then a run with the receiver set."""

from __future__ import annotations

import itertools
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_architectures
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, Both, both, one_thread, text  # noqa: F401
from hooks_reference import Edit, HookedReference, replacing
from tiny_architectures import quiet_and_alone  # noqa: F401

import nsp
from nsp.errors import InputError
from nsp.experiments import EXPERIMENTS, path_patching, run
from nsp.recipe import find_recipe, load_recipe_file
from nsp.sites import Site

KIND = "path-patching"
PAIRS = [
    {"clean": text(CLEAN), "corrupt": text(CORRUPT), "answer": "w4", "distractor": "w9", "name": "first"},
    {"clean": text([3, 1, 4, 1]), "corrupt": text([3, 9, 4, 2]), "answer": "w7", "distractor": "w20"},
]
SENDERS = ["embed", "z[*][*]", "attn_out[*]", "mlp_out[*]"]
RECEIVERS = ["q[*][*]", "k[*][*]", "v[*][*]", "q[1]", "mlp_out[*]", "logits"]


def ids_of(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


def exists(sender: Site, receiver: Site, *, middle: bool = True) -> bool:
    """Whether a sender comes before a receiver, from the order of a layer alone."""
    if sender.component == "embed" or receiver.component == "logits":
        return True
    own, other = number_of(sender), number_of(receiver)
    own_attention = receiver.component == "mlp_out" and sender.component in ("z", "attn_out") and middle
    return own <= other if own_attention else own < other


def number_of(site: Site) -> int:
    assert site.layers is not None
    return int(str(site.layers))


def units_of(site: Site) -> list[int] | None:
    return None if site.units is None else [int(str(site.units))]


def by_hooks(
    reference: HookedReference, base: list[int], donor: list[int], sender: Site, receiver: Site, positions: list[int]
) -> torch.Tensor:
    """Logits of the last position: everything between sender and receiver frozen by hooks, one full pass after another."""
    layers = range(len(reference.layers))
    frozen = [("z", layer) for layer in layers] + [("mlp_out", layer) for layer in layers]
    kept = reference.values(base, frozen)
    at = 0 if sender.component == "embed" else number_of(sender)
    given = reference.values(donor, [(sender.component, at)])[sender.component, at]
    own = Edit(sender.component, at, replacing(given, positions, units_of(sender)))
    edits = [] if sender.component != "embed" else [own]
    for component, layer in sorted(frozen, key=lambda site: site[1]):
        if (component, layer) == (sender.component, at):
            edits += [own]
            continue
        if sender.component == "attn_out" and (component, layer) == ("z", at):
            edits += [own]  # the whole attention output is the sender's
            continue
        if receiver.component == "mlp_out" and (component, layer) == ("mlp_out", number_of(receiver)):
            continue  # what the receiver makes is what is asked
        edits.append(Edit(component, layer, replacing(kept[component, layer], None, None)))
    if receiver.component == "logits":
        assert len(base) - 1 in positions
        return reference.logits(base, edits)[-1]
    site = (receiver.component, number_of(receiver))
    made = reference.values(base, [site], edits)[site]
    return reference.logits(base, [Edit(*site, replacing(made, positions, units_of(receiver)))])[-1]


def difference(logits: torch.Tensor, pair: dict[str, Any]) -> float:
    return float(logits[int(pair["answer"][1:])] - logits[int(pair["distractor"][1:])])


@pytest.fixture(params=["llama", "gpt2"])
def pair_of(request: pytest.FixtureRequest) -> Both:
    return both(request.param)


@pytest.mark.parametrize("mode", ["noising", "denoising"])
def test_every_path_against_frozen_runs(pair_of: Both, mode: str) -> None:
    tree = path_patching(pair_of.model, PAIRS, senders=SENDERS, receivers=RECEIVERS, mode=mode)
    effects, receipts = tree["effects/paths"].to_dataset(), tree["receipts/paths"].to_dataset()
    base_side, donor_side = ("clean", "corrupt") if mode == "noising" else ("corrupt", "clean")
    checked = 0
    for number, pair in enumerate(PAIRS):
        base, donor = ids_of(pair[base_side]), ids_of(pair[donor_side])
        start, goal = (difference(pair_of.reference.logits(ids)[-1], pair) for ids in (base, donor))
        np.testing.assert_allclose(tree["baseline"][f"logit_diff_{base_side}"][number], start, atol=5e-5)
        np.testing.assert_allclose(tree["baseline"][f"logit_diff_{donor_side}"][number], goal, atol=5e-5)
        for sender, receiver in itertools.product(effects["sender"].values, effects["receiver"].values):
            cell = effects.isel(pair=number).sel(sender=sender, receiver=receiver)
            ends = Site.parse(sender), Site.parse(receiver)
            if not exists(*ends):
                assert np.isnan(cell["logit_diff"])
                assert receipts["fired"].isel(pair=number).sel(sender=sender, receiver=receiver) == -1
                continue
            if number == 1 and checked % 3:  # a third of the second pair is enough
                checked += 1
                continue
            exact = difference(by_hooks(pair_of.reference, base, donor, *ends, list(range(len(base)))), pair)
            np.testing.assert_allclose(cell["logit_diff"], exact, rtol=0, atol=1e-4, err_msg=f"{sender} -> {receiver}")
            np.testing.assert_allclose(cell["effect"], (exact - start) / (goal - start), rtol=0, atol=2e-3)
            checked += 1
    assert checked > 250


@pytest.mark.parametrize("positions", [[2, 3], [0, 5, 8], "last", "tail"], ids=str)
def test_positions_are_patched_together(positions: Any) -> None:
    which = both("llama")
    pair = {**PAIRS[0], "spans": {"tail": {"clean": "w3 w58 w19", "corrupt": "w3 w6 w44"}}}
    chosen = {"last": [8], "tail": [6, 7, 8]}.get(positions, positions) if isinstance(positions, str) else positions
    receivers = ["q[2][*]", "k[1][*]", "v[2][*]", "mlp_out[1]", *(["logits"] if 8 in chosen else [])]
    tree = path_patching(which.model, [pair], senders=["z[0][*]", "mlp_out[0]"], receivers=receivers, positions=positions)
    effects = tree["effects/paths"].to_dataset().isel(pair=0)
    for sender, receiver in itertools.product(effects["sender"].values, effects["receiver"].values):
        ends = Site.parse(sender), Site.parse(receiver)
        exact = difference(by_hooks(which.reference, CLEAN, CORRUPT, *ends, chosen), pair)
        np.testing.assert_allclose(effects["logit_diff"].sel(sender=sender, receiver=receiver), exact, rtol=0, atol=1e-4)


def test_what_cannot_matter_does_not_run() -> None:
    """Tokens before the prompts part, last-layer queries of other tokens, logits of tokens that are not measured."""
    which = both("llama")
    tree = path_patching(
        which.model, PAIRS[:1], senders=["mlp_out[0]"], receivers=["q[2][0]", "k[2][0]", "logits", "q[0][0]"]
    )
    fired = tree["receipts/paths"]["fired"].isel(pair=0, sender=0)
    assert fired.sel(receiver="q[2][0]") == 1
    assert fired.sel(receiver="k[2][0]") == len(CLEAN) - 2
    assert fired.sel(receiver="logits") == 1
    assert fired.sel(receiver="q[0][0]") == -1
    assert tree["inputs"]["patched"].values[0].tolist() == [0, 0] + [1] * 7
    none = path_patching(which.model, PAIRS[:1], senders=["mlp_out[0]"], receivers=["logits", "q[2][0]"], positions=[0, 1])
    assert (none["receipts/paths"]["fired"] == 0).all()
    assert (none["effects/paths"]["effect"] == 0).all()


# --- other architectures ------------------------------------------------------------------------------------------------


def by_trace(of: nsp.Model, base: list[int], donor: list[int], sender: Site, receiver: Site) -> float:
    """A path by single traces of the plain path: record, freeze, record, set."""
    sites = [Site.parse(f"{name}[{layer}]") for name in ("z", "mlp_out") for layer in of.geometry.layers_of(name)]
    kept = {name: recorded(of, base, site) for name, site in (("z", "z[*][*]"), ("mlp_out", "mlp_out[*]"))}
    with of.trace(base) as t:
        for site in sites:
            same = (site.component, number_of(site)) == (sender.component, number_of(sender))
            if same and sender.units is not None:
                others = ",".join(str(unit) for unit in range(of.geometry.n_heads) if [unit] != units_of(sender))
                t.patch(f"{site}[{others}]", donor=kept["z"])
            elif not same and str(site) != str(receiver):
                t.patch(str(site), donor=kept[site.component])
        t.patch(str(sender), donor=donor)
        if receiver.component == "logits":
            t.measure(nsp.logit_diff(4, 9))
        else:
            t.record(str(receiver))
    if receiver.component == "logits":
        return float(t.results["logit_diff"])
    made = t.results[receiver.component]
    with of.trace(base) as t:
        t.patch(str(receiver), donor=made)
        t.measure(nsp.logit_diff(4, 9))
    return float(t.results["logit_diff"])


def recorded(of: nsp.Model, prompt: list[int], site: str) -> xr.DataArray:
    with of.trace(prompt) as t:
        t.record(site)
    found: xr.DataArray = t.results[site.partition("[")[0]]
    return found


@pytest.mark.parametrize(
    "case",
    ["gptj", "gpt_neox", "cohere", "gemma2", "olmo2", "granite", "phi3", "falcon-new", "opt", "qwen3", "bloom", "mixtral"],
)
@pytest.mark.usefixtures("quiet_and_alone")
def test_other_architectures_against_single_traces(case: str) -> None:
    """Parallel blocks, post-norms, residual multipliers, fused projections, experts, and the plain path."""
    of = nsp.load(tiny_architectures.tiny_model(case))
    base, donor = [5, 11, 23, 7, 40], [5, 11, 50, 9, 41]
    # "w4" and "w9" of the pairs above are token ids here: this model has no tokenizer.
    pair = nsp.pair(clean=base, corrupt=donor, answer=4, distractor=9)
    middle = "resid_mid" in of.geometry.components()
    tree = path_patching(of, [pair], senders=["z[0:2][*]", "mlp_out[0]"], receivers=["q[1:][0]", "v[2][*]", "mlp_out[1:]", "logits"])
    effects = tree["effects/paths"].to_dataset().isel(pair=0)
    spread = float(effects["logit_diff"].std())
    for sender, receiver in itertools.product(effects["sender"].values, effects["receiver"].values):
        ends = Site.parse(sender), Site.parse(receiver)
        found = float(effects["logit_diff"].sel(sender=sender, receiver=receiver))
        if not exists(*ends, middle=middle):
            assert np.isnan(found), f"{sender} -> {receiver}"
            continue
        exact = by_trace(of, base, donor, *ends)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4 + 1e-3 * spread, err_msg=f"{sender} -> {receiver}")


@pytest.mark.parametrize("case", ["opt-post-norm", "bloom-post-norm"])
@pytest.mark.usefixtures("quiet_and_alone")
def test_a_stream_that_is_no_sum_is_refused(case: str) -> None:
    of = nsp.load(tiny_architectures.tiny_model(case))
    pair = nsp.pair(clean=[5, 11, 23], corrupt=[5, 11, 50], answer=4, distractor=9)
    with pytest.raises(InputError, match="residual stream"):
        path_patching(of, [pair])


# --- the recipe ---------------------------------------------------------------------------------------------------------


def test_units_of_work_do_not_change_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = EXPERIMENTS[KIND].recipe_class.model_validate(
        {"kind": KIND, "model": "tiny", "pairs": PAIRS, "receivers": ["q[1:][*]", "logits"], "metric": ["logit_diff", "kl"]}
    )
    of = both("llama").model
    whole = path_patching(of, PAIRS, receivers=["q[1:][*]", "logits"], metric=["logit_diff", "kl"])
    monkeypatch.setattr(import_module("nsp.experiments.path_patching.experiment"), "_UNIT_FLOP", 1.0)
    job = EXPERIMENTS[KIND](of, recipe)
    assert len(job.units) == 2 * 9
    run(job, out=tmp_path / "x.zarr", progress=False)
    tree = xr.open_datatree(tmp_path / "x.zarr", engine="zarr", consolidated=False)
    for name in ("logit_diff", "effect", "kl", "effect_kl"):
        np.testing.assert_allclose(tree["effects/paths"][name], whole["effects/paths"][name], rtol=0, atol=2e-5)
    np.testing.assert_allclose(tree["baseline"]["kl_corrupt"], whole["baseline"]["kl_corrupt"], rtol=0, atol=1e-5)
    assert tree["effects/paths"]["receiver"].values.tolist()[-1] == "logits"
    assert "strongest direct paths" in str(EXPERIMENTS[KIND].summary(tree))
    again = EXPERIMENTS[KIND].recipe_class.model_validate(tree.attrs["recipe_resolved"])
    assert EXPERIMENTS[KIND](of, again).plan.hash == tree.attrs["plan_hash"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"senders": "resid_post[3]"}, "cannot send"),
        ({"receivers": "z[3][0]"}, "cannot receive"),
        ({"receivers": "q[3][0] @ last"}, "key positions"),
        ({"metric": ["kl", "kl"]}, "two metrics"),
        ({"mode": "interchange"}, "noising"),
    ],
    ids=str,
)
def test_a_recipe_that_makes_no_sense_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EXPERIMENTS[KIND].recipe_class.model_validate({"kind": KIND, "pairs": PAIRS, **keys})


def test_no_path_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="no sender reaches"):
        path_patching(both("llama").model, PAIRS, senders="z[2][*]", receivers="q[0:2][*]")
    with pytest.raises(InputError, match=r"layer 7|no layer|out of range"):
        path_patching(both("llama").model, PAIRS, receivers="q[7][0]")


def test_prompts_of_two_lengths_need_a_span() -> None:
    pair = {"clean": "w5 w11 w23 w7", "corrupt": "w5 w11 w50", "answer": "w4", "distractor": "w9"}
    which = both("llama")
    with pytest.raises(InputError, match="lengths differ"):
        path_patching(which.model, [pair])
    tree = path_patching(which.model, [pair], positions="last")
    assert np.isfinite(tree["effects/paths"]["effect"]).all()


# --- smollm2 ------------------------------------------------------------------------------------------------------------


def test_smollm2_against_frozen_runs(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    """A sample of paths on the real model, and two facts about all direct paths to the logits."""
    reference = HookedReference(smollm2.module)
    base, donor = (list(smollm2.encode(prompt).token_ids) for prompt in (ioi_pair.clean, ioi_pair.corrupt))
    answer, distractor = (smollm2.encode(word).token_ids[0] for word in (" Mary", " John"))
    senders, receivers = ["z[12][3]", "z[20][*]", "mlp_out[18]"], ["q[22][0:2]", "v[21][0]", "k[22][2]", "mlp_out[24]", "logits"]
    tree = path_patching(smollm2, ioi_pair, senders=senders, receivers=receivers)
    effects = tree["effects/paths"].to_dataset().isel(pair=0)
    for sender, receiver in itertools.product(["z[12][3]", "z[20][5]", "mlp_out[18]"], effects["receiver"].values):
        logits = by_hooks(reference, base, donor, Site.parse(sender), Site.parse(receiver), list(range(len(base))))
        exact = float(logits[answer] - logits[distractor])
        np.testing.assert_allclose(effects["logit_diff"].sel(sender=sender, receiver=receiver), exact, rtol=0, atol=2e-3)


def test_the_shipped_recipe_is_valid() -> None:
    kinds = {name: experiment.recipe_class for name, experiment in EXPERIMENTS.items()}
    (resolved,) = load_recipe_file(find_recipe("path-patching"), kinds=kinds)
    assert resolved.recipe.kind == KIND
