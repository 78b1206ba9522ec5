"""What a run leaves, part by part: NAME.json (values) and NAME.npz (raw samples), and whether it is still good."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


@dataclass
class Part:
    """One experiment. settings: what it was measured with; seconds: how long that took."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)  # what is not in it, and why


class Folder:
    """Of a run (--out)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, name: str, settings: Mapping[str, Any] | None = None) -> Part | None:
        """The part, if it is whole and, where they are given, of the same settings."""
        try:
            values = json.loads((self.path / f"{name}.json").read_text())
            if settings is not None and values["settings"] != json.loads(json.dumps(settings)):
                return None
            with np.load(self.path / f"{name}.npz", allow_pickle=False) as file:
                arrays = dict(file)
            return Part(**values, arrays=arrays)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None

    def save(self, part: Part) -> None:
        """The arrays first: where there is a JSON file the part is whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"{part.name}.json"
        target.unlink(missing_ok=True)
        np.savez_compressed(self.path / f"{part.name}.npz", allow_pickle=False, **cast("dict[str, Any]", part.arrays))
        values = {name: value for name, value in vars(part).items() if name != "arrays"}
        unfinished = target.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(values, indent=1) + "\n")
        unfinished.rename(target)
