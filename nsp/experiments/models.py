"""Loading the models that a recipe names."""

from __future__ import annotations

from nsp.backends.options import BackendOptions
from nsp.model import Model, load
from nsp.recipe import ModelOptions


def load_model(options: ModelOptions, backend: BackendOptions | None = None) -> Model:
    """The model that a recipe's ``model`` (or another key of that form) names, on a backend."""
    return load(options.name, backend=backend, **options.model_dump(exclude={"name"}))


def load_second(options: ModelOptions, backend: BackendOptions, first: Model) -> Model:
    """A recipe's other model, where its first one runs; what it sends to a server is told by `Model.jobs` of the first."""
    made = load_model(options, backend.for_another())
    made.share_jobs(first)
    return made
