"""The soak, short: every kind of request ends as it must, and what is wrong with an answer is seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laguna_serve.bench import soak
from laguna_serve.bench.relay.faulty_engine import DONE
from laguna_serve.bench.relay.soaking import KINDS, WHOLE, check_stream, check_version, find_leftovers
from laguna_serve.serving.kit.results import read_result

ERROR = b'data: {"error": {"code": 502}}\n\n'


@pytest.mark.slow
def test_short_soak_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--requests", "4000", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(result["requests"].values()) == 4000
    assert set(result["requests"]) == set(KINDS)
    assert result["failures"] == []
    assert "**Held**" in (tmp_path / "soak.md").read_text()


@pytest.mark.parametrize(
    ("answer", "whole", "right"),
    [
        (WHOLE + DONE, True, True),
        (WHOLE, True, False),
        (WHOLE[:-20] + DONE, True, False),
        (WHOLE.replace(b"3}", b"4}") + DONE, True, False),
        (b": x-weight-version: 1\n\n" + WHOLE + DONE, True, True),
        (WHOLE[:60] + b"\n\n" + ERROR + DONE, False, False),
        (WHOLE[: len(WHOLE) // 2] + ERROR + DONE, False, True),
        (WHOLE[: len(WHOLE) // 2] + ERROR, False, False),
        (WHOLE[: len(WHOLE) // 2], False, False),
        (WHOLE + DONE, False, False),
    ],
)
def test_stream_is_checked(answer: bytes, whole: bool, right: bool) -> None:
    assert (check_stream(answer, whole=whole) is None) is right


def test_leftovers_are_failures() -> None:
    assert find_leftovers(0, 10, 10, None) == find_leftovers(0, 10, 9, 1.01) == []
    assert find_leftovers(1, 10, 11, 1.5) == [
        "in flight at the end: expected 0, got 1",
        "open files at the end: expected at most 10, got 11",
        "memory: expected at most 1.02 of what it was, got 1.500",
    ]


def test_version_is_checked() -> None:
    assert check_version("a", {"X-Weight-Version": "a"}) is None
    assert check_version("b", {"X-Weight-Version": "a, b"}) is None
    assert check_version("c", {"X-Weight-Version": "a, b"}) is not None


def test_size_must_make_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--requests", "0", "--out", str(tmp_path)])
    assert "--requests: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_soak_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = soak.soak(soak.SoakConfig(requests=100, streams=8, out=tmp_path))
    assert sum(result.requests.values()) == 100
    assert (result.failures, result.memory_growth) == ([], None)
    assert read_result(tmp_path / "soak.json", soak.SoakResult) == result
    assert capsys.readouterr().out == ""
