"""Arms of one benchmark compute in the same numbers, whatever each of their models is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from laguna_serve.bench.arms import arms
from laguna_serve.bench.arms import options as arm_options
from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE
from laguna_serve.bench.arms.drafters import GammaUrl, find_most
from laguna_serve.bench.arms.options import ArmsConfig, find_dtype, make_spec
from laguna_serve.bench.certify import CertifyConfig, make_job
from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.kit.environment import read_environment
from laguna_serve.serving.kit.flags import FlagError
from laguna_serve.serving.planning.launch import plan_launch

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


@pytest.mark.parametrize("given", [{"eager": True}, {"prefix_caching": True}, {"kv_cache_gib": 1.0}, {"gamma": 3}])
def test_what_is_of_engines_is_refused_beside_urls(given: dict[str, Any]) -> None:
    """It was passed over without a word."""
    with pytest.raises(FlagError, match="expected none with URLs, as those servers already run"):
        ArmsConfig(baseline_url="http://a", candidate_url="http://b", **given)


@pytest.mark.parametrize("given", [{"eager": True}, {"kv_cache_gib": 1.0}, {"beyond_block": True}])
def test_what_is_of_a_sweep_s_engines_is_refused_beside_urls(given: dict[str, Any], tmp_path: Path) -> None:
    urls: dict[str, Any] = {"baseline_url": "http://a", "candidate_url": (GammaUrl(3, "http://b"),)}
    with pytest.raises(FlagError, match="expected none with URLs, as those servers already run"):
        SweepConfig(model="m", draft="d", prompts=PROMPTS, out=tmp_path, **urls, **given)


def test_dtype_beside_urls_is_one_that_vllm_has() -> None:
    """Noise is judged by it."""
    with pytest.raises(FlagError, match=r"--dtype: expected auto, half, .* got 'bf16'"):
        ArmsConfig(baseline_url="http://a", candidate_url="http://b", dtype="bf16")


LLADA = {"model": str(TOY / "llada"), "draft": str(TOY / "llada-draft")}
PROMPTS = TOY / "prompts.jsonl"


def test_masked_diffusion_keeps_the_proposals_that_are_measured() -> None:
    config = ArmsConfig(**LLADA, candidate_args="--cache dual", baseline_args="--cache dual", seed=3)
    baseline, candidate = (make_spec(config, name) for name in (BASELINE, CANDIDATE))
    assert baseline.config is not None
    assert candidate.config is not None
    assert baseline.config.extra_args == ("--cache", "dual")
    assert candidate.config.extra_args == ("--cache", "dual", "--draft-policy", "always")
    assert "γ 4" in candidate.label
    command = plan_launch(candidate.config).command
    assert command[command.index("--seed") + 1] == "3"
    assert find_dtype(config) == plan_launch(baseline.config).command[command.index("--dtype") + 1]
    own = make_spec(ArmsConfig(**LLADA, candidate_args="--draft-policy=auto"), CANDIDATE)
    assert own.config is not None
    assert own.config.extra_args == ("--draft-policy=auto",)


def test_certificates_of_masked_diffusion_promise_bits_and_say_what_they_lack(tmp_path: Path) -> None:
    config = CertifyConfig(**LLADA, prompts=PROMPTS, num_prompts=2, gamma=2, temperature=0.5, out=tmp_path / "out")
    job = make_job(config, read_environment([]))
    assert (job.identical, job.temperature, job.locate, job.rows) == (True, 0.5, False, 3)
    assert set(job.specs) == {BASELINE, CANDIDATE}
    assert "no row sees what shares its pass" in job.missing["row-matched"]
    assert "no prefix" in job.missing["reference"]


def test_sweeps_of_masked_diffusion_measure_states(tmp_path: Path) -> None:
    config = SweepConfig(**LLADA, prompts=PROMPTS, engine_args=("--cache", "dual"), out=tmp_path)
    assert find_most(config.draft) is None
    assert config.list_gammas() == list(range(1, 9))
    assert SweepConfig(**LLADA, prompts=PROMPTS, gammas=(16,), out=tmp_path).list_gammas() == [16]
    engines = [config.make_spec(gamma).config for gamma in (None, 2)]
    assert all(engine is not None for engine in engines)
    assert [engine.extra_args for engine in engines if engine is not None] == [
        ("--cache", "dual"),
        ("--cache", "dual", "--draft-policy", "always"),
    ]


@pytest.mark.parametrize(
    ("extra", "length"),
    [((), 2048), (("--max-model-len", "512"), 512), (("--max-model-len=64",), 64), (("--max-model-len", "auto"), None)],
)
def test_answers_that_no_context_has_room_for_are_refused_before_anything_starts(
    extra: tuple[str, ...], length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "check_launches", list)
    specs = [arms.ArmSpec("baseline", "it", config=EngineConfig(str(TOY / "teacher"), extra_args=extra))]
    if length is None:
        arms.check_specs(specs, 10_000_000)
        return
    arms.check_specs(specs, length - 1)
    with pytest.raises(EngineError, match=f"expected fewer than the {length} tokens that .*teacher takes, prompt incl"):
        arms.check_specs(specs, length)
