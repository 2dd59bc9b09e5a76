"""Hugging Face repositories: a complete local copy, or one clear reason why not.

Only the description, the tokenizer and one set of weights are fetched, safetensors wherever there are any.
huggingface_hub keeps a download that was interrupted apart (`.incomplete`), resumes it, and nsp uses a copy only
when every file that its index names is there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn

from nsp.errors import InputError, NspError
from nsp.models.cache import storage_errors
from nsp.models.catalogue import CATALOGUE, nearest
from nsp.models.checkpoint import problem, weight_names
from nsp.models.progress import download_bars

_DESCRIPTION = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cached_snapshot(hub_id: str, revision: str | None = None) -> Path | None:
    """The complete local copy of a repository, or None. Never uses the network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    directory = Path(config).parent
    return directory if problem(directory) is None else None


def snapshot(hub_id: str, revision: str | None = None, *, code: bool = False) -> Path:
    """The local copy of a repository at `revision` (branch, tag or commit; default: main), fetched if need be.

    The directory's name is the commit. `code` also fetches Python files (`trust_remote_code`). Where the hub cannot
    be asked, a complete local copy will do. Raises InputError for a repository or revision that does not exist,
    NspError for a gated one and for a hub that cannot be reached.
    """
    if (
        revision is not None
        and _COMMIT.fullmatch(revision)
        and not code
        and (local := cached_snapshot(hub_id, revision))
    ):
        return local  # a commit cannot change: nothing to ask
    try:
        with download_bars(), storage_errors(_hub_cache()):
            directory = _fetch(hub_id, revision, code)
    except NspError:
        raise
    except Exception as error:
        if not _is_about_revision(error) and (local := cached_snapshot(hub_id, revision)):
            return local
        _explain(error, hub_id, revision)
    if trouble := problem(directory):
        raise InputError(f"{hub_id} cannot be loaded as a model: {trouble}")
    return directory


def _fetch(hub_id: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    patterns = [*_DESCRIPTION, "*.py"] if code else _DESCRIPTION
    folders = None if code else ["*/*"]
    # Descriptions first: they say which weights belong to the model (a repository may hold several sets).
    directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=folders))
    if problem(directory) is None:
        return directory
    commit = directory.name
    names = weight_names(directory, HfApi().list_repo_files(hub_id, revision=commit))
    if names:
        snapshot_download(hub_id, revision=commit, allow_patterns=list(names))
    return directory


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "models"


def _is_about_revision(error: Exception) -> bool:
    from huggingface_hub.errors import RevisionNotFoundError

    return isinstance(error, RevisionNotFoundError)


def _explain(error: Exception, hub_id: str, revision: str | None) -> NoReturn:
    """Raise the one error that says what is wrong with the hub, the repository or the permission, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        raise NspError(f"{hub_id} is gated. {access_help(hub_id)}") from error
    if isinstance(error, RevisionNotFoundError):
        raise InputError(
            f"{hub_id} has no revision {revision!r}. Give a branch, a tag or a commit listed at "
            f"https://huggingface.co/{hub_id}/commits/main, or leave it out for main."
        ) from error
    if isinstance(error, RepositoryNotFoundError):
        near = nearest(hub_id)
        hint = f" Near it in the catalogue: {', '.join(near)}." if near else ""
        raise InputError(
            f"there is no model {hub_id} on the hub, or it is private. Check the spelling; for a private model set "
            f"HF_TOKEN to a token that may read it.{hint}"
        ) from error
    if isinstance(error, HFValidationError):
        raise InputError(f"{hub_id!r} is not a hub id: {error}. It is <owner>/<name>.") from error
    if status in (401, 403):
        raise NspError(f"the hub refused access to {hub_id} (HTTP {status}). {access_help(hub_id)}") from error
    raise NspError(_unreachable(hub_id, error)) from error


def access_help(hub_id: str) -> str:
    """How to get access to a gated repository."""
    state = "The HF_TOKEN that is set was not enough: " if os.environ.get("HF_TOKEN") else ""
    return (
        f"{state}Accept its licence at https://huggingface.co/{hub_id}, make a token with read access at "
        "https://huggingface.co/settings/tokens, and set it: export HF_TOKEN=hf_..."
    )


def _unreachable(hub_id: str, error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    else:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        lines = str(root).strip().splitlines()
        why = f"the hub cannot be reached ({lines[0] if lines else type(root).__name__})"
    entry = next((entry for entry in CATALOGUE.values() if entry.hub_id == hub_id), None)
    gate = f" The model is also gated: {access_help(hub_id)}." if entry is not None and entry.gated else ""
    return (
        f"{why}, and no complete copy of {hub_id} is on this disk. Connect once and run 'nsp models pull {hub_id}', "
        f"give a local directory or .gguf file, or use smollm2, which needs no hub.{gate}"
    )
