"""The environment that is recorded, and files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laguna_serve.serving.kit.environment import describe_environment
from laguna_serve.serving.kit.files import write_json


def test_the_environment_says_where_and_with_what() -> None:
    found = describe_environment(["python", "bench/ab.py", "--out", "a folder"])
    assert found["command"] == "python bench/ab.py --out 'a folder'"
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert {"laguna-serve", "numpy", "aiohttp"} <= found["versions"].keys()
    json.dumps(found)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ab.json"
    write_json(path, {"a": [1, 2], "é": None})
    assert json.loads(path.read_text()) == {"a": [1, 2], "é": None}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["a"] == [1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["ab.json"]
