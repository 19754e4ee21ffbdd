"""Arms of one benchmark compute in the same numbers, whatever each of their models is."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.bench.arms import options as arm_options
from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE
from laguna_serve.bench.arms.options import ArmsConfig, find_dtype, make_spec
from laguna_serve.serving.engine import EngineConfig

TOY = Path(__file__).resolve().parents[2] / "toy"


@pytest.mark.parametrize(("found", "judged"), [("float32", "float32"), ("auto", "bfloat16")])
def test_the_baselines_model_decides(found: str, judged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find(config: EngineConfig) -> str:
        asked.append(config.model)
        return found

    monkeypatch.setattr(arm_options, "find_engine_dtype", find)
    model = str(TOY / "teacher")
    config = ArmsConfig(model=model, candidate_model="another/model", draft=str(TOY / "dflash"))
    specs = [make_spec(config, name) for name in (BASELINE, CANDIDATE)]
    assert [spec.config.dtype for spec in specs if spec.config is not None] == [found] * 2
    assert find_dtype(config) == judged
    assert set(asked) == {model}


def test_asked_dtype_and_urls_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm_options, "find_engine_dtype", lambda config: pytest.fail("asked"))
    assert find_dtype(ArmsConfig(model="m", dtype="half")) == "float16"
    assert find_dtype(ArmsConfig(model="m", baseline_url="http://a", candidate_url="http://b")) == "unknown"
