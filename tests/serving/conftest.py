"""Checkpoints that consist of a config, and a vLLM that starts in milliseconds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file
from serving_fakes import DRAFTER, FAKE_SITE, TARGET, MakeCheckpoint, write_drafter_weights

from laguna_serve.serving.checkpoint import is_drafter


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that runs in this process sets up its log, on a stderr that is gone after the test."""
    loggers = [logging.getLogger(name) for name in ("laguna_serve", "uvicorn", "asyncio")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers = handlers
        logger.setLevel(level)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """make_checkpoint(name, config, **changes) writes a folder with config.json.

    For a target it has a file of weights and a tokenizer that hold nothing; a change to None removes the key.
    """

    def make(name: str, config: dict[str, Any], **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        merged = {key: value for key, value in {**config, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(merged), encoding="utf-8")
        if not is_drafter(merged):
            save_file({}, folder / "model.safetensors")
            (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        return folder

    return make


@pytest.fixture
def target(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("teacher", TARGET)


@pytest.fixture
def drafter(make_checkpoint: MakeCheckpoint) -> Path:
    """A drafter that fits the target."""
    folder = make_checkpoint("dflash", DRAFTER)
    write_drafter_weights(folder)
    return folder


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Engines started by this test run the mock; returns the file to which its processes write their ids."""
    pids = tmp_path / "pids"
    monkeypatch.setenv("PYTHONPATH", str(FAKE_SITE))
    monkeypatch.setenv("FAKE_VLLM_PIDS", str(pids))
    return pids
