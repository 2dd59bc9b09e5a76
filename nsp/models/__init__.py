"""Models: what can be loaded, where it lies, and what was loaded. Importing this does not import torch."""

from nsp.models.cache import cache_dir, publish_directory
from nsp.models.catalogue import CATALOGUE, MEMORY_NOTE, CatalogueEntry, find, nearest
from nsp.models.loaded import LoadedModel, Origin, Provenance
from nsp.models.loading import load_weights
from nsp.models.locate import locate, on_disk, pull

__all__ = [
    "CATALOGUE",
    "MEMORY_NOTE",
    "CatalogueEntry",
    "LoadedModel",
    "Origin",
    "Provenance",
    "cache_dir",
    "find",
    "load_weights",
    "locate",
    "nearest",
    "on_disk",
    "publish_directory",
    "pull",
]
