"""The kinds of experiments that nsp has, and the recipe class of each, found without importing torch.

A kind is a package of `nsp.experiments` named like it (``bias-scan``: `nsp.experiments.bias_scan`) whose module ``recipe`` has one
subclass of `Recipe` with ``kind: Literal["bias-scan"]``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import get_args

from nsp.recipe import Recipe


class RecipeKinds(Mapping[str, type[Recipe]]):
    """The recipe class of every kind, in alphabetical order; a class is imported when it is asked for."""

    def __init__(self) -> None:
        self._elsewhere: dict[str, type[Recipe]] = {}

    def __getitem__(self, kind: str) -> type[Recipe]:
        return _recipe_class(kind) if kind in _kinds() else self._elsewhere[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in _kinds() or kind in self._elsewhere

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*_kinds(), *self._elsewhere}))

    def __len__(self) -> int:
        return len({*_kinds(), *self._elsewhere})

    def add(self, kind: str, recipe: type[Recipe]) -> None:
        """Make a kind known that is no package of nsp's."""
        self._elsewhere[kind] = recipe


RECIPES = RecipeKinds()


def package_of(kind: str) -> str:
    """The name of the package that has this kind."""
    return f"nsp.experiments.{kind.replace('-', '_')}"


def is_package(kind: str) -> bool:
    """Whether nsp has a package of this kind."""
    return kind in _kinds()


@cache
def _kinds() -> tuple[str, ...]:
    folder = Path(__file__).parent
    packages = (module.name for module in pkgutil.iter_modules([str(folder)]) if module.ispkg)
    return tuple(sorted(name.replace("_", "-") for name in packages if (folder / name / "recipe.py").is_file()))


@cache
def _recipe_class(kind: str) -> type[Recipe]:
    module = importlib.import_module(f"{package_of(kind)}.recipe")
    (recipe,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Recipe) and kind in get_args(value.model_fields["kind"].annotation)
    )
    return recipe
