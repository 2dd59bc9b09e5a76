"""Imports run one way, and no module reaches into another's underscore names: read from the sources, nothing is run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"nsp": "nsp", "nsp.cli": "cli", "nsp.stores": "stores", "nsp.recipes": "recipes"}

# What each part of nsp may import, besides itself. A part is a package, or a module directly under nsp.
VALUES = {"errors", "html", "memory", "sites", "interventions", "metrics"}
ENGINE = VALUES | {"models", "datasets", "engine"}
WHOLE_MODEL = ENGINE | {"backends", "results", "trace", "model"}
RECIPE = {"errors", "recipe", "recipe_errors", "recipe_schema", "recipe_yaml", "recipes"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "recipes": set(),
    "html": set(),
    "progress": set(),
    "memory": {"errors"},
    "sites": {"errors", "html"},
    "interventions": {"errors", "sites", "stores"},  # ablate(reference=<a store of means>)
    "metrics": {"errors", "sites"},
    "models": VALUES,
    "datasets": VALUES,
    "engine": ENGINE,
    "backends": ENGINE,
    "results": ENGINE,
    "trace": ENGINE | {"backends", "results", "progress"},
    "conformance_bench": ENGINE,
    "conformance_lines": ENGINE | {"conformance_bench"},
    "conformance": ENGINE | {"conformance_bench", "conformance_lines"},
    "model": ENGINE | {"backends", "results", "trace", "conformance"},
    "recipe": RECIPE | {"backends", "memory"},  # a backend's options are part of a recipe
    "recipe_errors": RECIPE,
    "recipe_schema": RECIPE,
    "recipe_yaml": RECIPE,
    "stores": {"errors", "html"},
    "report": {"errors", "html", "stores", "recipe_errors", "statistics"},
    "statistics": {"errors"},
    "experiments": WHOLE_MODEL | RECIPE | {"stores", "report", "statistics", "progress"},
    "cli": WHOLE_MODEL | RECIPE | {"stores", "report", "statistics", "experiments", "conformance", "nsp"},
}
MAY_IMPORT_NNSIGHT = {"engine", "backends"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of nsp by its dotted name, parsed."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


def part_of(module: str) -> str:
    """`nsp.engine.pack` belongs to `engine`, `nsp.trace` to `trace`, `nsp` itself to `nsp`."""
    return module.split(".")[1] if "." in module else module


def imports(module: str) -> Iterator[tuple[str, str, int]]:
    """(imported module, name taken from it or "", line) of every import in a module, wherever it stands."""
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "", node.lineno) if whole in modules() else (str(node.module), alias.name, node.lineno)


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def members(module: str) -> set[str]:
    """The underscore names of a module's classes: methods, class attributes and whatever is set on an object."""
    names: set[str] = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.add(item.name)
                elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    names.add(item.target.id)
                elif isinstance(item, ast.Assign):
                    names |= {target.id for target in item.targets if isinstance(target, ast.Name)}
    return {name for name in names if private(name)}


def aliases(module: str) -> set[str]:
    """The names under which a module holds other modules of nsp."""
    return {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}") in modules()
    }


def test_imports_run_one_way() -> None:
    wrong = []
    for module in modules():
        part = part_of(module)
        if part == "nsp":  # nsp/__init__.py is the front door: it names things from everywhere, and imports them on use
            continue
        assert part in ALLOWED, f"{module} is new: say in ALLOWED what {part} may import"
        for target, _, line in imports(module):
            if target.split(".")[0] == "nsp" and part_of(target) not in ALLOWED[part] | {part}:
                wrong.append(f"{module}, line {line}: imports {target}")
    assert not wrong, "\n".join(wrong)


def test_what_may_be_imported_has_no_cycle() -> None:
    """`ALLOWED` itself runs one way, but for the recipe modules, which are one part in four files."""
    done: set[str] = set(RECIPE)
    waiting = {part: allowed - {part} - RECIPE for part, allowed in ALLOWED.items() if part not in RECIPE}
    waiting["nsp"] = set()
    while ready := [part for part, allowed in waiting.items() if allowed <= done]:
        done.update(ready)
        for part in ready:
            del waiting[part]
    assert not waiting


def test_only_the_engine_and_the_backends_know_nnsight() -> None:
    wrong = [
        f"{module}, line {line}"
        for module in modules()
        for target, _, line in imports(module)
        if target.split(".")[0] == "nnsight" and part_of(module) not in MAY_IMPORT_NNSIGHT
    ]
    assert not wrong, "\n".join(wrong)


def test_underscore_names_stay_in_their_module() -> None:
    anywhere = set().union(*map(members, modules()))
    wrong = []
    for module, tree in modules().items():
        for target, name, line in imports(module):
            if target.split(".")[0] == "nsp" and (private(name) or any(map(private, target.split(".")))):
                wrong.append(f"{module}, line {line}: imports {target}.{name}")
        elsewhere, held = anywhere - members(module), aliases(module)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not private(node.attr):
                continue
            through_module = isinstance(node.value, ast.Name) and node.value.id in held
            if through_module or node.attr in elsewhere:
                wrong.append(f"{module}, line {node.lineno}: reaches for {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["nsp", "nsp.recipe", "nsp.stores", "nsp.sites", "nsp.cli.app"])
def test_light_modules_load_no_torch(module: str, tmp_path: Path) -> None:
    """`import nsp`, `nsp --help` and reading a store take no torch."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# Runs a command, then prints which of the libraries it imported that take long, and the seconds of CPU time it took.
COMMAND = """
import sys, time
from nsp.cli.app import main
main({words})
heavy = {{"torch", "transformers", "nnsight", "numpy", "scipy", "pandas", "xarray", "zarr", "matplotlib"}}
print(*sorted(heavy & set(sys.modules)), file=sys.stderr)
print(time.process_time(), file=sys.stderr)
"""
TYPO = "kind: contrast\npositive: [a, b]\nnegativ: [c, d]\n"


@pytest.mark.parametrize(
    "words",
    [["recipes"], ["recipes", "ioi"], ["schema"], ["run", "typo.yaml"], ["run", "kind.yaml"], ["run", "ioi", "--set", "mode=x"]],
    ids=" ".join,
)
def test_recipes_are_read_and_checked_without_torch(words: list[str], tmp_path: Path) -> None:
    """The error for a typo comes in less than 0.6 seconds: at the best of five, on a machine that has little else to do."""
    (tmp_path / "typo.yaml").write_text(TYPO)
    (tmp_path / "kind.yaml").write_text("kind: contrasts\n")
    command = [sys.executable, "-c", COMMAND.format(words=words)]
    seconds = []
    for _ in range(5):
        said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stderr.splitlines()
        assert said[-2] == "", f"nsp {' '.join(words)} imports {said[-2]}"
        seconds.append(float(said[-1]))
        if words[0] == "run":
            assert said[0].startswith("error: "), said
        if words[0] == "schema" or seconds[-1] < 0.6 or os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1):
            break
    else:
        pytest.fail(f"it takes {min(seconds):.2f} s of CPU time")


@pytest.mark.parametrize(
    "line", ["import nsp.experiments.contrast.vectors as module", "from nsp.experiments.contrast import vectors as module"]
)
def test_a_package_of_experiments_is_what_is_called(line: str, tmp_path: Path) -> None:
    """`nsp.experiments.contrast` runs the experiment and holds its modules, whichever is asked for first."""
    code = f"""
import inspect
{line}
import nsp
from nsp.experiments import contrast
assert module.__name__ == "nsp.experiments.contrast.vectors"
assert nsp.experiments.contrast is contrast and contrast.vectors is module and callable(contrast)
assert list(inspect.signature(contrast).parameters)[:3] == ["model", "positive", "negative"]
assert inspect.getdoc(contrast)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_everything_that_experiments_names_is_there() -> None:
    from nsp import experiments

    for name in experiments.__all__:
        assert getattr(experiments, name) is not None
    assert set(experiments.__all__) <= set(dir(experiments))
