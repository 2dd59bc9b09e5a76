"""Packages that can be called: ``nsp.experiments.contrast(model, ...)`` runs the experiment that
`nsp.experiments.contrast` holds, and `nsp.experiments.contrast.vectors` is a module of it.

A function of the same name would be hidden by the package as soon as a module of it is imported, or hide the package.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package of an experiment, which runs it when called. Its signature and docstring are those of `function`."""

    @property
    def function(self) -> Callable[..., Any]:
        """What a call runs: the door of the kind. It is made on first use, since it needs torch."""
        from nsp.experiments.functions import door

        return door(self.__name__.rpartition(".")[2])

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        return self.function(*arguments, **keys)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.function.__doc__


def make_callable(package: str) -> None:
    """Let a package be called, from its ``__init__``: ``make_callable(__name__)``."""
    sys.modules[package].__class__ = CallablePackage
