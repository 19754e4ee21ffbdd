"""A drafter as the engine is given it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from laguna_serve.serving.kit.files import hash_file


@dataclass(frozen=True, slots=True)
class Pushed:
    """A drafter's checkpoint: its version, folder, and the digests of its files."""

    version: str
    folder: Path
    sha256: dict[str, str]

    @classmethod
    def of(cls, version: str, folder: Path) -> Pushed:
        """Digest all files of a folder, by name."""
        files = sorted(folder.glob("*.safetensors"))
        return cls(version, folder, {path.name: hash_file(path) for path in files})
