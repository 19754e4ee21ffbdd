"""Files with more bytes than there is memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

from laguna_serve.serving.kit.files import hash_file
from laguna_serve.serving.kit.run_dir import fingerprint


def test_a_file_is_hashed_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(20_000_000)
    expected = hashlib.sha256(bytes(20_000_000)).hexdigest()
    tracemalloc.start()
    try:
        assert hash_file(path) == fingerprint(str(path)) == expected
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
