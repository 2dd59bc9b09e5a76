"""Named features on disk: a control vector or a circuit with its name, its model and where it is from.

One JSON file a feature, written beside its place and renamed into it, so that a name which exists is whole.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsp.errors import InputError, suggestion
from nsp.experiments.steering.target import SteeringTarget
from nsp.model import Model

FORMAT = "nsp feature"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,79}")


@dataclass(frozen=True)
class Feature:
    """A direction or circuit that has a name.

    Attributes:
        name: what it is called; ``target`` what is added or scaled.
        model: name and weights_hash of the model that it was found on.
        source: what it was found from: prompts, layer, scores.
    """

    name: str
    target: SteeringTarget
    model: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.endswith((".", " ")):
            raise InputError(f"{self.name!r} cannot name a feature: letters, digits, spaces, _ . and -, at most 80")

    def __str__(self) -> str:
        return f"{self.name}: {self.target.describe()} ({self.model.get('name', '?')})"

    def to_dict(self) -> dict[str, Any]:
        """The feature as plain data."""
        return {
            "format": FORMAT,
            "version": 1,
            "name": self.name,
            "model": dict(self.model),
            "source": dict(self.source),
            "target": self.target.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any, place: str = "the data") -> Feature:
        """The feature that `to_dict` wrote; InputError says what is wrong with ``place``."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"{place} is no feature of nsp")
        if data.get("version") != 1:
            raise InputError(f"{place} is a feature of version {data.get('version')!r}; this nsp reads version 1")
        try:
            return cls(data["name"], SteeringTarget.from_dict(data["target"]), data["model"], data["source"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{place} is a damaged feature: {type(error).__name__} {error}") from None


def features_dir() -> Path:
    """`$NSP_FEATURES`, or nsp's own folder in the platform's data directory. Not created here."""
    chosen = os.environ.get("NSP_FEATURES", "").strip()
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("nsp", appauthor=False)) / "features"


class FeatureStore:
    """Features in a folder, a subfolder a model."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = features_dir() if path is None else Path(path).expanduser()

    def names(self, model: Model) -> tuple[str, ...]:
        """The features of one model, by name."""
        return tuple(feature.name for feature in self.features(model))

    def features(self, model: Model | None = None) -> tuple[Feature, ...]:
        """The features of one model, or all there are, in order of their names; a damaged file is an InputError."""
        pattern = "*/*.json" if model is None else f"{_folder(model)}/*.json"
        features = [_read(file) for file in self.path.glob(pattern)] if self.path.is_dir() else []
        return tuple(sorted(features, key=lambda feature: (feature.name.lower(), str(feature.model.get("name")))))

    def save(self, feature: Feature, *, force: bool = False) -> Path:
        """Keep a feature; an existing one of that name is an InputError unless ``force`` replaces it."""
        folder = self.path / _folder_of(feature.model)
        place = folder / f"{feature.name}.json"
        text = json.dumps(feature.to_dict(), ensure_ascii=False, allow_nan=False)
        temporary = folder / f".{feature.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(text + "\n", encoding="utf-8")
                if force:
                    os.replace(temporary, place)
                else:
                    os.link(temporary, place)  # fails where the name is taken, also by another process just now
            finally:
                temporary.unlink(missing_ok=True)
        except FileExistsError:
            raise InputError(f"there is a feature {feature.name!r} already; take another name, or force=True") from None
        except OSError as error:
            raise InputError(f"cannot keep the feature in {place}: {error.strerror}") from None
        return place

    def load(self, name: str, model: Model) -> Feature:
        """The feature of a name, checked to be of this model's weights."""
        place = self.path / _folder(model) / f"{name}.json"
        if not _NAME.fullmatch(name) or not place.is_file():
            known = self.names(model)
            hint = suggestion(name, known) or (f"; there are {', '.join(known)}" if known else "; there is none yet")
            raise InputError(f"no feature {name!r} of {model.name} in {self.path}{hint}")
        feature = _read(place)
        here = model_of(model)
        if feature.model.get("weights_hash") != here["weights_hash"]:
            raise InputError(f"the feature {name!r} was found on other weights of {here['name']}; find it again on these")
        return feature

    def remove(self, name: str, model: Model) -> None:
        """Forget a feature; InputError where there is none."""
        self.load(name, model)
        (self.path / _folder(model) / f"{name}.json").unlink(missing_ok=True)


def model_of(model: Model) -> dict[str, Any]:
    """What a feature says about its model."""
    provenance = model.provenance
    return {"name": provenance.name, "weights_hash": provenance.weights_hash, "dtype": provenance.dtype}


def _folder(model: Model) -> str:
    return _folder_of(model_of(model))


def _folder_of(model: Mapping[str, Any]) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(model["name"])).strip("-.") or "model"


def _read(file: Path) -> Feature:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the feature {file}: {error}") from None
    return Feature.from_dict(data, str(file))
