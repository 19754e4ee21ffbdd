"""Engines that several tests share: one per configuration, started when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from laguna_serve.serving.engine import Engine, EngineConfig

TOY = Path(__file__).resolve().parent / "toy"


@pytest.fixture(scope="session")
def fp32_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The toy teacher in fp32, eager: what can be compared with transformers token for token."""
    config = EngineConfig(model=str(TOY / "teacher"), dtype="float32", enforce_eager=True, max_num_seqs=64)
    with Engine(config, log_path=tmp_path_factory.mktemp("engine") / "fp32.log") as engine:
        yield engine
