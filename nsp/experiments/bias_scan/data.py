"""Data sets that nsp fetches on request and never ships: where they lie and how they come there."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from pathlib import Path

from nsp.datasets import crows
from nsp.errors import InputError, NspError
from nsp.models.cache import cache_dir, publish_directory

_FILE = "crows_pairs_anonymized.csv"
_TIMEOUT = 60


def crows_path() -> Path:
    """Where `pull_crows` puts CrowS-Pairs."""
    return cache_dir() / "data" / "crows-pairs" / _FILE


def pulled_crows() -> Path:
    """The CrowS-Pairs file that was pulled; InputError says how to get it."""
    path = crows_path()
    if not path.is_file():
        raise InputError(
            "CrowS-Pairs is not on this machine: nsp data pull crows-pairs fetches it, or give a file of your own with "
            "--set pairs.path=FILE"
        )
    return path


def pull_crows(url: str = crows.URL) -> tuple[Path, bool]:
    """Fetch CrowS-Pairs (CC BY-SA 4.0) into nsp's cache; the file, and whether it is byte for byte the known one.

    Another file than the known one is kept if it reads as CrowS-Pairs; NspError where the network or the content fails.
    """

    def build(directory: Path) -> None:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
                raw = answer.read()
        except (urllib.error.URLError, OSError) as error:
            raise NspError(
                f"cannot fetch {url}: {getattr(error, 'reason', error)}; where there is no network, give the file with "
                "--set pairs.path=FILE"
            ) from None
        try:
            crows.parse_crows(raw.decode("utf-8-sig"), url)
        except (UnicodeDecodeError, InputError) as error:
            raise NspError(f"what {url} gave is not CrowS-Pairs: {error}") from None
        (directory / _FILE).write_bytes(raw)

    path = crows_path()
    publish_directory(build, path.parent, valid=lambda _: path.is_file())
    return path, hashlib.sha256(path.read_bytes()).hexdigest() == crows.SHA256
