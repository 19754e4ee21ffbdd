"""What the ab.py tests share: prompts, flags, and a mock of the engine launcher."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mock_engine import MockEngine, Settings

from laguna_serve.bench.arms import arms
from laguna_serve.serving.engine import EngineConfig, EngineError

PROMPTS = [f"def f{index}(x):\n    return '{'é' * index}'" for index in range(14)]
TIMED = PROMPTS[:10]
Answer = tuple[int, dict[str, Any], str]
RunAb = Callable[..., Answer]


def common_flags(prompts_file: Path, tmp_path: Path) -> list[str]:
    flags = ["--prompts", str(prompts_file), "--num-prompts", "10", "--max-tokens", "12", "--control", "3"]
    return [*flags, "--out", str(tmp_path / "out")]


def reasons(result: dict[str, Any], figure: str) -> list[str]:
    return [item["reason"] for item in result["refused"] if item["figure"] == figure]


class MockLauncher:
    """Takes the launcher's place: a mock engine that can die."""

    both: tuple[Settings, Settings] = (Settings(), Settings())
    configs: tuple[EngineConfig, ...] = ()
    started: int = 0

    def __init__(self, config: EngineConfig, log_path: Path = Path("none"), **_: Any) -> None:
        self.log_path = log_path
        self.command, self.model_name = ["vllm", config.model], "fake"
        self._fake = MockEngine(self.choose(config))
        type(self).configs += (config,)
        type(self).started += 1

    def choose(self, config: EngineConfig) -> Settings:
        """Of a configuration's engine: by whether it drafts."""
        return type(self).both[config.draft is not None]

    def __enter__(self) -> MockLauncher:
        self._fake.__enter__()
        self.base_url = self._fake.url
        return self

    def __exit__(self, *_: Any) -> None:
        self._fake.__exit__(None, None, None)

    def pids(self) -> list[int]:
        return [os.getpid()]

    def check(self) -> None:
        die_after = self._fake.settings.die_after
        if die_after is not None and len(self._fake.seen) > die_after:
            raise EngineError("engine fake: expected it to run, got signal 9: out of memory")


@contextmanager
def mock_launchers(
    monkeypatch: pytest.MonkeyPatch, baseline: Settings, candidate: Settings
) -> Iterator[type[MockLauncher]]:
    with monkeypatch.context() as patch:
        made = type("Made", (MockLauncher,), {"both": (baseline, candidate)})
        patch.setattr(arms, "Engine", made)
        patch.setattr(arms, "check_launches", lambda _configs: None)
        yield made
