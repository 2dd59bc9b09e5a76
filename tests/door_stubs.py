"""The stub of `nsp.experiments`: every door's signature and docstring, for type checkers and editors.

    python tests/door_stubs.py --write    # after a change of a recipe's keys
    python tests/door_stubs.py --check    # whether the stub is what the recipes make (exit code 1 where it is not)
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import nsp.experiments as experiments

PLACE = Path(__file__).parents[1] / "nsp" / "experiments" / "__init__.pyi"
HEADER = '''"""Experiments. This stub is made from the recipe classes: python tests/door_stubs.py --write"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import xarray as xr

'''
# Where the live objects are defined that keys take beside plain data (`python_types` of the options classes).
TYPES = {
    "BiasPair": "nsp.datasets.bias_pairs",
    "Circuit": "nsp.experiments.circuits",
    "ControlVectors": "nsp.experiments.contrast.vectors",
    "Fact": "nsp.datasets.facts",
    "Feature": "nsp.experiments.feature_store",
    "Metric": "nsp.metrics",
    "Model": "nsp.model",
    "Pair": "nsp.datasets.pairs",
    "SteeringTarget": "nsp.experiments.steering.target",
    "TunedLens": "nsp.experiments.lens.tuned",
}


def stub() -> str:
    """The text of the stub."""
    imports, doors = [], []
    for name in experiments.__all__:
        value = getattr(experiments, name)
        if hasattr(value, "__signature__"):
            doors.append(_door(name, value))
        elif isinstance(value, ModuleType):
            imports.append(f"from nsp.experiments import {name} as {name}")
        else:
            imports.append(f"from {_home(name, value)} import {name} as {name}")
    text = "\n".join(doors)
    imports += [f"from {home} import {name}" for name, home in TYPES.items() if re.search(rf"\b{name}\b", text)]
    return "\n".join([HEADER + "\n".join(sorted(imports)), "", text])


def _home(name: str, value: Any) -> str:
    """The module that defines a name."""
    home = getattr(value, "__module__", None)
    return home if home is not None and home.startswith("nsp.experiments.") else "nsp.experiments.registry"


def _door(name: str, door: Any) -> str:
    signature = inspect.signature(door)
    lines, named = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not named:
            lines.append("    *,")
            named = True
        default = "" if parameter.default is inspect.Parameter.empty else f" = {_shown(parameter.default)}"
        lines.append(f"    {parameter.name}: {parameter.annotation}{default},")
    text = textwrap.indent(f'"""{door.__doc__}\n"""', "    ", lambda line: bool(line.strip()))
    return "\n".join([f"def {name}(", *lines, f") -> {signature.return_annotation}:", text, ""])


def _shown(default: Any) -> str:
    simple = default is None or isinstance(default, bool | int | float | str)
    return repr(default) if simple or default == () else "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true")
    choice.add_argument("--check", action="store_true")
    wanted = parser.parse_args()
    if wanted.write:
        PLACE.write_text(stub(), encoding="utf-8")
        return 0
    same = PLACE.is_file() and PLACE.read_text(encoding="utf-8") == stub()
    print("the stub is what the recipes make" if same else "the stub is out of date: python tests/door_stubs.py --write")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
