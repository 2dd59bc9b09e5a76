"""Recipes: reading, combining, checking, and what errors say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_experiment import ToyRecipe
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from nsp.cli.console import recipe_kinds
from nsp.engine.budget import Budget
from nsp.errors import InputError
from nsp.experiments.activation_patching.recipe import ActivationPatchingRecipe
from nsp.memory import parse_memory
from nsp.recipe import Recipe, ResolvedRecipe, find_recipe, load_recipe_file, shipped_recipes
from nsp.recipe_schema import recipe_schema, schema_text
from nsp.recipe_yaml import read_document, read_setting

KINDS = {"toy": ToyRecipe, "activation-patching": ActivationPatchingRecipe}
SCHEMA = Path(__file__).parent.parent / "schema" / "recipe.schema.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str, name: str = "r.yaml") -> list[ResolvedRecipe]:
    """The recipes that a file with this text holds; the file lies in the working directory."""
    Path(name).write_text(text, encoding="utf-8")
    return load_recipe_file(name, overrides, kinds=KINDS)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


# Reading


def test_a_recipe_is_read_with_defaults_and_keeps_what_was_given(folder: Path) -> None:
    (run,) = load("kind: toy\nmodel: gpt2\nsize: 4\n")
    assert isinstance(run.recipe, ToyRecipe)
    assert (run.recipe.model.name, run.recipe.size, run.recipe.seed) == ("gpt2", 4, 0)
    assert run.given == {"kind": "toy", "model": "gpt2", "size": 4}
    assert run.out == Path("runs/r.zarr")
    assert run.label == "r"
    assert ToyRecipe.model_validate(run.resolved) == run.recipe
    json.dumps(run.resolved, allow_nan=False)


def test_yaml_1_2_keeps_slices_and_words_as_text(folder: Path) -> None:
    (run,) = load("kind: toy\nlayers: 0:6\nmetric: yes\n", "name=1:30")
    assert (run.recipe.layers, run.recipe.metric, run.recipe.name) == ("0:6", "yes", "1:30")


@given(st.integers(0, 99), st.integers(0, 99))
def test_set_never_turns_a_slice_into_a_number(low: int, high: int) -> None:
    (run,) = load_recipe_file("ioi", [f"layers={low}:{low + high + 1}"], kinds=KINDS)
    assert run.recipe.layers == f"{low}:{low + high + 1}"


def test_files_in_utf8_with_and_without_a_byte_order_mark(folder: Path) -> None:
    (folder / "r.yaml").write_bytes("\ufeffkind: toy\nmetric: größe\n".encode())
    assert load_recipe_file("r.yaml", kinds=KINDS)[0].recipe.metric == "größe"
    (folder / "r.yaml").write_bytes(b"kind: toy\nmetric: gr\xf6\xdfe\n")
    with pytest.raises(InputError, match=r"r\.yaml is no UTF-8 text"):
        load_recipe_file("r.yaml", kinds=KINDS)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9), ("4G", 4 * 10**9), ("512MiB", 512 * 2**20), ("1.5g", 15 * 10**8), ("100", 100), (" 2 kb ", 2000),
        ("1e9", 10**9), ("2.5E3 KiB", 2_560_000), ("1TiB", 2**40), (2048, 2048), (1e9, 10**9),
    ],
)  # fmt: skip
def test_memory_sizes(text: str | float, size: int) -> None:
    """One grammar: in a recipe, on the command line, in Python and for the engine's budget."""
    assert parse_memory(text) == size
    assert Budget.of(text, torch.device("cpu")).bytes == size
    recipe = Recipe.model_validate({"kind": "toy", "memory": text})
    assert recipe.memory_bytes == size
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("text", ["lots", "4 gigs", "-1GB", "1.2.3MB", "", "0", "0.5", -5, 0, True, float("nan"), float("inf"), None, [4]])
def test_what_is_no_size_of_memory(text: Any) -> None:
    with pytest.raises(InputError, match=r"no size of memory; write 4GB, 500MiB, 1e9 or another number of bytes"):
        parse_memory(text)


# Errors


def test_an_unknown_key_names_file_line_and_nearest_spelling(folder: Path) -> None:
    assert problems("kind: toy\nmetrc: l2\n") == ["r.yaml:2: unknown key 'metrc'; did you mean 'metric'?"]
    assert problems("kind: toy\nparts:\n  - text: a\n    wieght: 2\n") == [
        "r.yaml:4: unknown key 'wieght' in parts[0]; did you mean 'weight'?"
    ]
    assert problems("kind: toy\nmodel: {name: gpt2, dtyp: float32}\n") == [
        "r.yaml:2: unknown key 'dtyp' in model; did you mean 'dtype'?"
    ]
    assert problems("kind: toy\nextend: ioi\n") == ["r.yaml:2: unknown key 'extend'; did you mean 'extends'?"]
    (far,) = problems("kind: toy\nparts: [{text: a, qqq: 1}]\n")
    assert far == "r.yaml:2: unknown key 'qqq' in parts[0]; valid here: text, weight"


def test_every_problem_is_reported_at_once_in_the_order_of_the_file(folder: Path) -> None:
    found = problems("kind: toy\nsize: 0\nmode: forward\nmemory: lots\nseed: '3'\nparts: [{}]\n")
    assert [line.split(":")[1] for line in found] == ["2", "3", "4", "5", "6"]
    assert found[0] == "r.yaml:2: size: should be greater than or equal to 1, got 0"
    assert found[1] == "r.yaml:3: mode: 'forward' is not valid; did you mean 'forwards'? (one of forwards, backwards)"
    assert found[4] == "r.yaml:6: missing key 'text' in parts[0]"


def test_a_misspelt_required_key_is_one_problem_not_two(folder: Path) -> None:
    assert problems("kind: toy\nparts: [{txt: a}]\n") == [
        "r.yaml:2: unknown key 'txt' in parts[0]; did you mean 'text'?"
    ]


def test_duplicate_keys_name_both_lines(folder: Path) -> None:
    assert problems("kind: toy\nsize: 1\nmodel: {name: a, name: b}\nsize: 2\n") == [
        "r.yaml:3: duplicate key 'name', first given at r.yaml:3",
        "r.yaml:4: duplicate key 'size', first given at r.yaml:2",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: [toy\n", "r.yaml:2: not valid YAML"),
        ("kind: toy\n\tsize: 1\n", "r.yaml:2: not valid YAML"),
        ("kind: toy\nsize: !big 3\n", "r.yaml:2: the tag '!big'"),
        ("kind: toy\n<<: {size: 1}\n", "r.yaml:2: merge keys"),
        ("kind: toy\nparts: &a [*a]\n", "r.yaml:2: an alias points to what contains it"),
        ("- kind\n", "r.yaml: a recipe is a mapping"),
        ("", "r.yaml: a recipe is a mapping"),
        ("size: 1\n", "r.yaml: missing key 'kind': one of toy, activation-patching"),
        ("kind: toyy\n", "r.yaml:1: unknown kind 'toyy'; did you mean 'toy'?"),
        ("kind: [toy]\n", "r.yaml:1: unknown kind"),
        ("kind: toy\nmodel: 4\n", "r.yaml:2: model: should be a mapping of keys to values, got 4"),
        ("kind: toy\nmetric: 4\n", "r.yaml:2: metric: should be a text, got 4 (write it in quotes)"),
        ("kind: toy\nfile: none.csv\n", "r.yaml:2: file: the file "),
    ],
)
def test_malformed_recipes(folder: Path, text: str, message: str) -> None:
    (line,) = problems(text)
    assert line.startswith(message)


def test_missing_files_and_unknown_names(folder: Path) -> None:
    Path("mine.yaml").write_text("kind: toy\n")
    for name, message in (
        ("mein.yaml", r"no such recipe: mein\.yaml; did you mean 'mine\.yaml'"),
        ("ioy", "no such recipe: ioy; did you mean 'ioi'"),
        (".", "is a directory"),
    ):
        with pytest.raises(InputError, match=message):
            load_recipe_file(name, kinds=KINDS)


# Overrides


def test_overrides_reach_inside_and_parse_as_yaml(folder: Path) -> None:
    (run,) = load(
        "kind: toy\nmodel: gpt2\nparts: [{text: a}, {text: b}]\n",
        "model.dtype=bfloat16", "parts.1.weight=2", "size=7", "name=",
    )  # fmt: skip
    assert isinstance(run.recipe, ToyRecipe)
    assert (run.recipe.model.name, run.recipe.model.dtype) == ("gpt2", "bfloat16")
    assert [part.weight for part in run.recipe.parts] == [1.0, 2.0]
    assert (run.recipe.size, run.recipe.name) == (7, None)
    assert run.given["parts"] == [{"text": "a"}, {"text": "b"}]
    assert run.overrides[0] == "model.dtype=bfloat16"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metrc=l2", "--set metrc=l2: unknown key 'metrc'; did you mean 'metric'?"),
        ("size", "--set size: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("size=[1", "--set size=[1: the value is not valid YAML"),
        ("size={a: 1, a: 2}", "--set size={a: 1, a: 2}: duplicate key 'a'"),
        ("kind=other", "--set kind=other: kind cannot be set"),
        ("parts.5.text=a", "--set parts.5.text=a: parts has 1 item(s), counted from 0; there is no '5'"),
        ("--device model.device=3", "--device 3: model.device: should be a text, got 3"),
    ],
)
def test_errors_in_overrides_show_the_override(folder: Path, override: str, message: str) -> None:
    (line,) = problems("kind: toy\nparts: [{text: a}]\n", override)
    assert line.startswith(message)


# extends


def test_extends_merges_mappings_and_replaces_lists(folder: Path) -> None:
    Path("base.yaml").write_text("kind: toy\nmodel: gpt2\nparts: [{text: a}, {text: b}]\nsize: 5\n")
    (run,) = load("extends: base.yaml\nmodel: {dtype: float32}\nparts: [{text: c}]\n")
    assert isinstance(run.recipe, ToyRecipe)
    assert (run.recipe.model.name, run.recipe.model.dtype, run.recipe.size) == ("gpt2", "float32", 5)
    assert [part.text for part in run.recipe.parts] == ["c"]
    assert run.given["extends"] == "base.yaml"


def test_errors_name_the_file_that_holds_the_mistake(folder: Path) -> None:
    Path("base.yaml").write_text("kind: toy\n\nsize: none\n")
    assert problems("extends: base.yaml\nmodee: x\n") == [
        "base.yaml:3: size: should be a valid integer, got 'none'",
        "r.yaml:2: unknown key 'modee'; did you mean 'mode'?",
    ]


def test_extends_cycles_and_missing_parents(folder: Path) -> None:
    Path("b.yaml").write_text("extends: r.yaml\n")
    (line,) = problems("extends: b.yaml\n")
    assert line == "b.yaml:1: extends: a recipe cannot build on itself (r.yaml -> b.yaml -> r.yaml)"
    (line,) = problems("kind: toy\nextends: nowhere.yaml\n")
    assert line.startswith("r.yaml:2: extends: no such recipe: nowhere.yaml")
    (line,) = problems("kind: toy\nextends: [a, b]\n")
    assert line.startswith("r.yaml:2: extends: should be the path or the name of one recipe")


def test_data_paths_resolve_against_the_file_that_names_them(folder: Path) -> None:
    (folder / "lib").mkdir()
    (folder / "lib" / "data.csv").write_text("x\n")
    (folder / "here.csv").write_text("x\n")
    (folder / "lib" / "base.yaml").write_text("kind: toy\nfile: data.csv\nmodel: ./weights\n")
    (run,) = load("extends: lib/base.yaml\n")
    assert isinstance(run.recipe, ToyRecipe)
    assert run.recipe.file == str(folder / "lib" / "data.csv")
    assert run.recipe.model.name == str(folder / "lib" / "weights")
    (run,) = load("extends: lib/base.yaml\n", "file=here.csv")
    assert isinstance(run.recipe, ToyRecipe)
    assert run.recipe.file == str(folder / "here.csv")


# matrix and out


def test_a_matrix_runs_every_combination_into_stores_of_their_own(folder: Path) -> None:
    runs = load("kind: toy\nout: runs/x.zarr\nmatrix:\n  model: [smollm2, org/gpt]\n  layers: [0:6, all]\n")
    assert [run.cell for run in runs] == [
        {"model": model, "layers": layers} for model in ("smollm2", "org/gpt") for layers in ("0:6", "all")
    ]
    assert runs[2].recipe.model.name == "org/gpt"
    assert str(runs[0].out) == "runs/x-model=smollm2-layers=0-6.zarr"
    assert str(runs[2].out) == "runs/x-model=org-gpt-layers=0-6.zarr"
    assert runs[1].label == "r (model=smollm2, layers=all)"
    assert "matrix" not in runs[0].resolved


def test_templates_in_out_are_filled_and_the_other_axes_appended(folder: Path) -> None:
    runs = load("kind: toy\nout: 'runs/{model}.zarr'\nmatrix: {model: [a, b], size: [1, 2]}\n")
    assert [str(run.out) for run in runs] == [f"runs/{model}-size={size}.zarr" for model in "ab" for size in (1, 2)]
    (run,) = load("kind: toy\nout: 'runs/{name}-{model}.zarr'\n")
    assert str(run.out) == "runs/r-smollm2.zarr"
    (line,) = problems("kind: toy\nout: 'runs/{modle}.zarr'\n")
    assert line.startswith("r.yaml:2: out: nothing to fill in for {modle}")


def test_cells_that_look_alike_still_get_stores_of_their_own(folder: Path) -> None:
    runs = load("kind: toy\nmatrix: {metric: [a/b, a-b]}\n")
    assert len({run.out for run in runs}) == 2


def test_an_override_fixes_its_axis_of_the_matrix(folder: Path) -> None:
    text = "kind: toy\nmatrix: {model: [a, b], size: [1, 2]}\n"
    assert [run.cell for run in load(text, "model=c")] == [{"size": 1}, {"size": 2}]
    runs = load(text, "model.device=cpu", "matrix.size=[3]")
    assert [(run.recipe.model.name, run.recipe.model.device, run.cell["size"]) for run in runs] == [
        ("a", "cpu", 3),
        ("b", "cpu", 3),
    ]
    Path("base.yaml").write_text(text)
    assert [run.cell for run in load("extends: base.yaml\nsize: 9\n")] == [{"model": "a"}, {"model": "b"}]


def test_errors_in_a_matrix_are_told_once_at_their_line(folder: Path) -> None:
    assert problems("kind: toy\nmetrc: a\nmatrix:\n  size: [1, 2]\n  mode:\n    - forwards\n    - sideways\n") == [
        "r.yaml:2: unknown key 'metrc'; did you mean 'metric'?",
        "r.yaml:7: mode: 'sideways' is not valid (one of forwards, backwards)",
    ]
    assert problems("kind: toy\nmatrix: {size: 3, kind: [toy]}\n") == [
        "r.yaml:2: matrix.size is a list with at least one value, such as [a, b]",
        "r.yaml:2: matrix cannot vary 'kind'",
    ]


# Activation patching

PAIR = '{clean: a b, corrupt: a c, answer: " x", distractor: " y"}'


def patching(extra: str = "", pairs: str = f"[{PAIR}]") -> ActivationPatchingRecipe:
    (run,) = load(f"kind: activation-patching\npairs: {pairs}\n{extra}")
    assert isinstance(run.recipe, ActivationPatchingRecipe)
    assert ActivationPatchingRecipe.model_validate(run.resolved) == run.recipe
    return run.recipe


@pytest.mark.parametrize(
    ("extra", "sites"),
    [
        ("", ["resid_post[*] @ *"]),
        ("layers: 2:8\npositions: last", ["resid_post[2:8] @ last"]),
        ("components: [z, mlp_out]\nheads: all\nlayers: [1, 4]", ["z[1,4][*] @ *", "mlp_out[1,4] @ *"]),
        ("components: mlp_neurons\nneurons: 0:64\npositions: -1", ["mlp_neurons[*][0:64] @ -1"]),
        ("components: embed\npositions: [subject, -1]", ["embed @ subject,-1"]),
        ('sites: ["z[9][3] @ last"]', ["z[9][3] @ last"]),
        ('sites: "z[9] @ *"\ncomponents: [q]', ["q[*] @ *", "z[9] @ *"]),
        ('components: ["module:model.layers.3.mlp"]', ["module:model.layers.3.mlp @ *"]),
    ],
)
def test_sites_of_a_patching_recipe(folder: Path, extra: str, sites: list[str]) -> None:
    assert list(map(str, patching(extra).selected_sites())) == sites


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("components: [resid_pots]", "components: unknown component 'resid_pots'; did you mean 'resid_post'?"),
        ("components: ['z[3]']", "components: 'z[3]' is a selector; list it under sites"),
        ("components: []", "components: nothing to patch"),
        ("components: [logits]", "components: logits can be measured, not patched"),
        ("components: [embed]\nlayers: 2:8", "layers: embed has no layers"),
        ("sites: ['z[']", "sites"),
        ("sites: ['z[3] @ 1']\nlayers: 2:8", "layers: has no effect on sites"),
        ("layers: [1, x]", "layers: 'x' is no index or slice"),
        ("layers: 8:2", "layers: the slice '8:2' selects nothing"),
        ("layers: true", "layers: True is no selection"),
        ("positions: []", "positions: selects nothing"),
        ("heads: all", "heads: no component of this recipe has heads; q, k, v, z, pattern have"),
        ("metric: logitdiff", "metric: unknown metric 'logitdiff'; did you mean 'logit_diff'?"),
        ("metric: [kl, kl]", "metric[1]: two metrics are called 'kl'"),
        ("metric: {kind: kl, refrence: base}", "unknown key 'refrence' in metric; did you mean 'reference'?"),
        ("together: [layers]", "together[0]: 'layers' is not valid; did you mean 'layer'?"),
        ("mode: denoise", "mode: 'denoise' is not valid; did you mean 'denoising'?"),
    ],
)
def test_impossible_patching_recipes(folder: Path, extra: str, message: str) -> None:
    line, *_ = problems(f"kind: activation-patching\npairs: [{PAIR}]\n{extra}")
    place, _, rest = line.partition(": ")
    assert place in ("r.yaml:3", "r.yaml:4")
    assert rest.startswith(message)


def test_pairs_in_all_their_forms(folder: Path) -> None:
    recipe = patching(pairs="[{clean: [1, 2], corrupt: [1, 3], answer: x, distractor: y, spans: {subject: a}}]")
    assert recipe.pairs[0].clean == (1, 2)  # type: ignore[index, union-attr]
    assert patching(pairs="greater-than").pairs.set == "greater-than"  # type: ignore[union-attr]
    assert patching(pairs="{set: ioi, size: 4}").pairs.size == 4  # type: ignore[union-attr]
    Path("p.csv").write_text("clean,corrupt,answer\n")
    assert patching(pairs="p.csv").pairs.path == str(folder / "p.csv")  # type: ignore[union-attr]
    chat = "[{role: user, content: hi}]"
    recipe = patching(pairs=f"[{{clean: {chat}, corrupt: {chat}, answer: x, distractor: y}}]")
    assert recipe.pairs[0].clean[0].content == "hi"  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("[]", "pairs: should not be empty"),
        (
            "[{clena: a, corrupt: b, answer: x, distractor: y}]",
            "unknown key 'clena' in pairs[0]; did you mean 'clean'?",
        ),
        ("[{clean: '', corrupt: b, answer: x, distractor: y}]", "pairs[0].clean: should not be empty"),
        ("[{clean: a, corrupt: b, answer: x}]", "pairs[0]: the metric logit_diff needs a distractor"),
        ("{pth: a.csv}", "unknown key 'pth' in pairs; did you mean 'path'?"),
        ("no.csv", "pairs: the file "),
        ("{set: ioi, sized: 3}", "unknown key 'sized' in pairs; did you mean 'size'?"),
        ("{set: ioi, size: 0}", "pairs.size: should be greater than or equal to 1, got 0"),
        ("capital", "pairs: there is no built-in set of pairs 'capital'; did you mean 'capitals'?"),
        ("{set: zzz}", "pairs.set: there is no built-in set of pairs 'zzz'; there are ioi, capitals, "),
    ],
)
def test_impossible_pairs(folder: Path, pairs: str, message: str) -> None:
    (line,) = problems(f"kind: activation-patching\npairs: {pairs}")
    assert line.startswith(f"r.yaml:2: {message}")


def test_a_path_given_on_the_command_line_replaces_inline_pairs(folder: Path) -> None:
    Path("p.csv").write_text("clean,corrupt,answer\n")
    (run,) = load(f"kind: activation-patching\npairs: [{PAIR}]\n", "pairs.path=p.csv")
    assert isinstance(run.recipe, ActivationPatchingRecipe)
    assert run.resolved["pairs"]["path"] == str(folder / "p.csv")


# What ships


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_wherever_they_are_run(folder: Path, name: str) -> None:
    for run in load_recipe_file(name, kinds=recipe_kinds()):
        assert run.recipe.description
    assert find_recipe(name) == find_recipe(f"{name}.yaml")


def test_a_file_of_that_name_comes_before_the_shipped_recipe(folder: Path) -> None:
    assert load("kind: toy\n", name="ioi.yaml")[0].recipe.kind == "toy"


# The schema


def test_the_committed_schema_is_the_generated_one() -> None:
    shipped = {kind: recipe for kind, recipe in recipe_kinds().items() if recipe.__module__.startswith("nsp.")}
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(shipped), "run: nsp schema -o schema/recipe.schema.json"


def test_the_schema_accepts_what_ships_and_refuses_mistakes(folder: Path) -> None:
    schema = recipe_schema({**recipe_kinds(), "toy": ToyRecipe})
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for path in shipped_recipes().values():
        assert validator.is_valid(read_document(path).data), path
    good = {"kind": "activation-patching", "pairs": [{"clean": "a", "corrupt": "b", "answer": "x"}]}
    for extra in (
        {},
        {"layers": "0:6"},
        {"layers": [1, 2]},
        {"model": {"name": "gpt2"}},
        {"metric": ["kl", {"kind": "logit"}]},
        {"matrix": {"layers": ["0:6", "all"]}},
        {"pairs": "pairs.csv"},
        {"pairs": {"set": "ioi", "size": 3}},
        {"heads": "all", "components": "z"},
    ):
        assert validator.is_valid({**good, **extra}), extra
    for extra in (
        {"metrc": "kl"},
        {"mode": "denoise"},
        {"seed": "3"},
        {"model": {"nme": "x"}},
        {"matrix": {"layers": 3}},
    ):
        assert not validator.is_valid({**good, **extra}), extra
    assert not validator.is_valid({"kind": "activation-patching"})
    assert validator.is_valid({"extends": "ioi.yaml", "layers": "0:6"})
    assert not validator.is_valid({"extends": "ioi.yaml", "layerz": "0:6"})
    assert not validator.is_valid({"pairs": "a.csv"})
    assert not validator.is_valid({"kind": "patching"})


@pytest.mark.parametrize("text", ["1:", ":4", "0:6", "-2:"])
def test_a_slice_on_the_command_line_is_text(text: str) -> None:
    """YAML would read an open slice as a mapping."""
    _, value, _ = read_setting(f"layers={text}")
    assert value == text


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_recipe_with_every_default_filled_in_is_the_recipe(name: str) -> None:
    """`nsp rerun` and workers read the stored recipe, in which nothing is left out."""
    if name == "bias-scan-crows":
        pytest.skip("its pairs are the user's file")
    kinds = recipe_kinds()
    for run in load_recipe_file(name, kinds=kinds):
        filled = run.recipe.model_dump(mode="json")
        assert kinds[run.recipe.kind].model_validate(filled) == run.recipe
