"""A checkpoint's content as one line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from laguna_serve.serving.checkpoint.digest import SAMPLE_BYTES, SAMPLES, digest_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(1000))
    return made


def test_content_counts_and_place_does_not(folder: Path) -> None:
    before = digest_checkpoint(folder)
    assert before.startswith("sha256:")
    assert digest_checkpoint(folder.rename(folder.with_name("moved"))) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "more.safetensors"])
def test_every_file_that_matters_counts(folder: Path, name: str) -> None:
    before = digest_checkpoint(folder)
    (folder / name).write_bytes(b"other")
    assert digest_checkpoint(folder) != before
    (folder / "README.md").write_text("no part")
    (folder / name).write_bytes(b"another")
    assert digest_checkpoint(folder) != before


def test_hub_cache_is_known_by_its_names(folder: Path, tmp_path: Path) -> None:
    """A snapshot's links lead to files named by their SHA-256, which need not be read."""
    before = digest_checkpoint(folder)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for path in folder.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(b"not read")
        (snapshot / path.name).symlink_to(blob)
    assert digest_checkpoint(snapshot, whole_bytes=0) == before


def test_large_folder_is_sampled_and_says_so(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(bytes(2 * SAMPLES * SAMPLE_BYTES))
    before = digest_checkpoint(folder, whole_bytes=1000)
    assert before.startswith("sampled:")
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert digest_checkpoint(folder, whole_bytes=1000) != before
