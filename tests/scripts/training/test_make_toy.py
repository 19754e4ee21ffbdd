"""The whole of make_toy.py on a few steps: every stage runs, and a second run has nothing left to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from warm import WarmPrograms

from laguna_serve.scripts import make_toy

pytestmark = pytest.mark.vllm


def test_smoke_run_makes_a_family_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage in a process of its own."""
    monkeypatch.setattr(make_toy, "subprocess", WarmPrograms)
    command = ["--out", str(tmp_path / "toy"), "--work", str(tmp_path / "work"), "--smoke"]
    assert make_toy.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]["continuations"]["prompts"] == 64
    made = {p.relative_to(tmp_path / "toy").as_posix() for p in (tmp_path / "toy").rglob("*.*")}
    assert {f"{name}/model.safetensors" for name in ("teacher", "dflash", "dflash-speculators")} <= made
    assert {"prompts.jsonl", "MANIFEST.json"} <= made

    assert make_toy.main(command) == 0
    assert [
        f"make_toy: {stage} is done" for stage in ("teacher", "continuations", "dflash", "dflash-speculators")
    ] == capsys.readouterr().err.splitlines()

    assert make_toy.main([*command, "--seed", "1"]) == 2
    assert "--fresh" in capsys.readouterr().err
