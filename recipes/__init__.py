"""The recipes that nsp ships: one YAML file per experiment, each runs as it stands."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def shipped() -> dict[str, Path]:
    """Every shipped recipe by its name without suffix, in alphabetical order."""
    files = sorted(Path(str(file)) for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml"))
    return {file.stem: file for file in files}
