"""serving/kit/figures: a picture is there whole, or the one before it is, and the file is named."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from laguna_serve.serving.kit.figures import open_figure
from laguna_serve.serving.kit.files import WriteError


@pytest.mark.slow
def test_full_disk_leaves_the_picture_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It left half a picture in its place, and the line named no file."""
    path = tmp_path / "a.png"
    with open_figure(path, figsize=(1, 1)):
        pass
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    save = Figure.savefig

    def fill(figure: Figure, file: Any, **options: Any) -> None:
        save(figure, file, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill)
    with pytest.raises(WriteError, match=r"a\.png: expected to write it, got no space left"), open_figure(path):
        pass
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
