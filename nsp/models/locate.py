"""From what a user writes to a directory of weights on this disk.

A text is read in this order: catalogue alias, `.gguf` file, directory that exists, hub id. An alias therefore always
means the same model; write `./gpt2` for a directory of that name.
"""

from __future__ import annotations

import re
from pathlib import Path

from nsp.errors import InputError
from nsp.models.catalogue import CATALOGUE, CatalogueEntry, find, nearest
from nsp.models.checkpoint import problem
from nsp.models.gguf import check_gguf, convert
from nsp.models.hashing import file_sha256
from nsp.models.hub import cached_snapshot, snapshot
from nsp.models.loaded import Origin
from nsp.models.smollm2 import SHA256, converted_smollm2, fetch_smollm2

FORMS = (
    "a catalogue alias ('nsp models list' shows them), a hub id <owner>/<name>[@revision], a directory with "
    "config.json and weights, or a .gguf file"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(source: str | Path, revision: str | None = None, *, code: bool = False) -> Origin:
    """Find the weights that `source` names, fetching or converting them if need be.

    `revision` (or `@revision` behind a hub id or alias) only makes sense for hub models. `code`: the repository's
    own Python files are wanted too. Raises InputError for what cannot be meant, NspError for what cannot be had.
    """
    if isinstance(source, Path):
        return _local(source, revision)
    text = source.strip()
    name, revision = _split_revision(text, revision)
    if entry := find(name):
        return _from_catalogue(entry, revision, code)
    path = Path(text).expanduser()
    if text and (_reads_as_path(text) or path.is_dir()):
        return _local(path, revision)
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, revision, code)
    raise InputError(f"there is no model {text!r}. {_suggest(text)}A model is {FORMS}.")


def pull(source: str, revision: str | None = None) -> Origin:
    """Fetch a model by alias or hub id, so that it loads without network from now on."""
    name, revision = _split_revision(source.strip(), revision)
    if entry := find(name):
        return _from_catalogue(entry, revision, code=False)
    # Unlike in `locate`, a directory of that name does not count: there would be nothing to fetch.
    if _reads_as_path(name) or not _HUB_ID.fullmatch(name):
        raise InputError(
            f"{source!r} cannot be pulled. {_suggest(name)}Give a catalogue alias or a hub id <owner>/<name>."
        )
    return _from_hub(name, revision, code=False)


def on_disk(entry: CatalogueEntry) -> Path | None:
    """Where a catalogue model lies complete on this disk, or None. Never uses the network."""
    if not entry.on_hub:
        return converted_smollm2()
    return cached_snapshot(entry.hub_id, entry.revision)


def _from_catalogue(entry: CatalogueEntry, revision: str | None, code: bool) -> Origin:
    source = f"catalogue:{entry.alias}"
    if not entry.on_hub:
        if revision not in (None, entry.revision):
            raise InputError(f"{entry.alias} is always the same file, version {entry.revision}: it takes no revision.")
        return Origin(entry.alias, source, fetch_smollm2(), entry.revision, None, SHA256)
    directory = snapshot(entry.hub_id, revision or entry.revision, code=code)
    return Origin(entry.alias, source, directory, directory.name, entry.hub_id)


def _from_hub(hub_id: str, revision: str | None, code: bool) -> Origin:
    directory = snapshot(hub_id, revision, code=code)
    return Origin(hub_id, f"hub:{hub_id}", directory, directory.name, hub_id)


def _local(path: Path, revision: str | None) -> Origin:
    path = path.expanduser()
    if revision is not None:
        raise InputError(f"{path} is on this disk: it takes no revision. Revisions are for hub models.")
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        check_gguf(path)
        digest = file_sha256(path)
        return Origin(path.name, "gguf", convert(path, sha256=digest), None, None, digest)
    if path.is_file():
        raise InputError(f"{path} is a file, and not a .gguf. Give the directory it lies in, or a .gguf file.")
    if not path.is_dir():
        raise InputError(f"there is no directory {path}. {_suggest(path.name)}A model is {FORMS}.")
    if trouble := problem(path):
        raise InputError(f"{path} cannot be loaded as a model: {trouble}")
    return Origin(path.resolve().name, "directory", path)


def _split_revision(text: str, revision: str | None) -> tuple[str, str | None]:
    name, at, written = text.partition("@")
    if not at or _reads_as_path(text) or Path(text).expanduser().is_dir():
        return text, revision
    if not written:
        raise InputError(f"{text!r} ends in '@' without a revision. Write {name}@<branch, tag or commit>.")
    if revision is not None and revision != written:
        raise InputError(f"{text!r} and revision={revision!r} name two revisions. Give one.")
    return name, written


def _reads_as_path(text: str) -> bool:
    """Whether a text can only be meant as a path: `./x`, `~/x`, `/x`, `C:\\x`, `a/b/c`, `x.gguf`."""
    return (
        text.startswith((".", "~", "/"))
        or "\\" in text
        or text.partition("@")[0].count("/") > 1
        or text.lower().endswith(".gguf")
    )


def _suggest(text: str) -> str:
    near = [alias for alias in nearest(text) if alias in CATALOGUE]
    return f"Did you mean {' or '.join(near)}? " if near else ""
