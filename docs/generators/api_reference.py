"""The pages of the Python reference: which names stand on which, as directives that mkdocstrings fills from docstrings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nsp.experiments.callable_package import CallablePackage
from nsp.metrics import MetricKind


@dataclass(frozen=True)
class Page:
    """One page: everything that a module names in ``__all__`` but what has a page of its own, then further names.

    Attributes:
        module: the module whose docstring opens the page.
        intro: what to say before its names, as Markdown.
        names: further names, each with its full path; for a module all of its public names.
        own: whether the module's ``__all__`` is taken.
    """

    module: str
    intro: str
    names: tuple[str, ...] = ()
    own: bool = True


PAGES = {
    "nsp": Page("nsp", "The names that `import nsp` gives."),
    "experiments": Page(
        "nsp.experiments",
        "A function an experiment. Its keys are those of its [recipe](../recipe-reference.md), as arguments.",
        ("nsp.experiments.pairs", "nsp.experiments.accessor.Results", "nsp.experiments.circuits"),
    ),
    "stores": Page("nsp.stores", "Run stores from Python. [Results and stores](../stores.md) shows them at work."),
    "statistics": Page("nsp.statistics", ""),
    "report": Page(
        "nsp.report",
        "What `nsp show`, `nsp plot` and `nsp report` are made of. Most people need `tree.nsp.plot` and `tree.nsp.report` alone.",
        ("nsp.report.figures", "nsp.report.drawing", "nsp.report.page", "nsp.report.summary"),
    ),
    "models": Page(
        "nsp.models",
        "",
        (
            "nsp.models.tables.SiteTable",
            "nsp.models.tables.Where",
            "nsp.models.geometry.Geometry",
            "nsp.conformance.check",
            "nsp.conformance.Report",
        ),
    ),
    "datasets": Page("nsp.datasets", "", ("nsp.datasets.pair_sets.make_set", "nsp.datasets.facts.read_facts")),
    "engine": Page(
        "nsp.engine",
        "The engine's one front door for experiments that nsp does not have: `model.engine` plans a request, estimates it, measures "
        "it, generates text under it, records and differentiates. An experiment that needs a loop over forward passes shows that the "
        "engine lacks something.",
        (
            "nsp.engine.engine.Engine",
            "nsp.engine.request.Request",
            "nsp.engine.branches.Branches",
            "nsp.engine.branches.Bases",
            "nsp.engine.measured.Measured",
            "nsp.engine.engine.Tokens",
            "nsp.engine.estimates.Estimate",
            "nsp.engine.estimates.Schedule",
            "nsp.engine.receipts.Receipt",
            "nsp.engine.recording.Recording",
            "nsp.engine.gradients.Gradients",
            "nsp.engine.propagation_rules.Rules",
            "nsp.engine.generation.Decoding",
            "nsp.engine.scoring.continuation_logprobs",
        ),
        own=False,
    ),
}


def api_pages() -> dict[str, str]:
    """The text of every page, by its path below docs/."""
    return {f"api/{name}.md": _text(page) for name, page in PAGES.items()}


def listed(page: Page) -> list[str]:
    """The full names, as they are imported, that a page documents."""
    module = importlib.import_module(page.module)
    known = [name for name in getattr(module, "__all__", ()) if page.own and _has_entry(module, name)]
    return [*(f"{page.module}.{name}" for name in known), *page.names]


def _text(page: Page) -> str:
    module = importlib.import_module(page.module)
    parts = [f"# {page.module}\n", page.intro + "\n"]
    if page.own and page.module != "nsp":
        parts.append(inspect.cleandoc(module.__doc__ or "") + "\n")
    return "\n".join([*parts, *_entries(page)])


def _entries(page: Page) -> Iterator[str]:
    # A name has one entry: what `import nsp` gives stands on its page, and other pages lead there.
    first = {} if page.module == "nsp" else {home(name): name for name in listed(PAGES["nsp"])}
    elsewhere = [name for name in listed(page) if home(name) in first]
    if elsewhere:
        links = ", ".join(f"[`{name}`][{home(name)}]" for name in elsewhere)
        yield f"Described with [nsp](nsp.md): {links}.\n"
    for name in listed(page):
        value = resolve(name)
        if isinstance(value, MetricKind):
            yield _metric_entry(name, value)
        elif name not in elsewhere:
            shown = home(name) if name in page.names else name
            yield f"::: {home(name)}\n    options:\n      heading: {shown}\n      toc_label: {name.rpartition('.')[2]}\n"


def _metric_entry(name: str, metric: MetricKind) -> str:
    """A metric is called like a function and is none, so that mkdocstrings cannot tell of it."""
    text, _, arguments = inspect.getdoc(metric).partition("\n\nArgs:\n")  # type: ignore[union-attr]
    items = [line.strip().partition(": ") for line in arguments.splitlines()]
    listed = "\n".join(f"- **`{argument}`** – {meaning}" for argument, _, meaning in items)
    last = name.rpartition(".")[2]
    return f"## {name} {{ #{home(name)} data-toc-label='{last}' }}\n\n```python\n{repr(metric).removeprefix('nsp.')}\n```\n\n{text}\n\n{listed}\n"


def home(name: str) -> str:
    """Where what a full name stands for is defined."""
    given = resolve(name)
    if isinstance(given, MetricKind):
        return f"{type(given).__module__}.{given.constructor}"
    return name if isinstance(given, ModuleType) else f"{given.__module__}.{given.__qualname__}"


def resolve(name: str) -> Any:
    """What a full name stands for: an attribute of its parent before a module of that name, as in ``from parent import``.

    A package that can be called stands for the function that it calls.
    """
    parent, _, last = name.rpartition(".")
    module = importlib.import_module(parent) if parent else None
    named = getattr(module, last) if module is not None and hasattr(module, last) else importlib.import_module(name)
    return named.function if isinstance(named, CallablePackage) else named


def _has_entry(module: ModuleType, name: str) -> bool:
    """Functions and classes have an entry; constants are told in the text, and modules have pages of their own."""
    value = resolve(f"{module.__name__}.{name}")
    return inspect.isclass(value) or inspect.isfunction(value) or isinstance(value, MetricKind)
