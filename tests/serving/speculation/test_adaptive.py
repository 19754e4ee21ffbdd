"""`--gamma adaptive`: who decides on which device, and what it is refused beside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.commands.serve import ServeConfig, engine_config
from laguna_serve.serving.kit.flags import read_flags
from laguna_serve.serving.machine.device import Device, VllmInstall
from laguna_serve.serving.planning.command import build_command
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.planning.report import format_plan
from laguna_serve.serving.planning.result import describe_plan
from laguna_serve.serving.speculation import adaptive
from laguna_serve.serving.speculation.acceptance import Acceptance, format_acceptance
from laguna_serve.serving.speculation.adaptive import check_adaptive, describe_adaptive

TOY = Path(__file__).resolve().parents[2] / "toy"
MODEL, DRAFT = str(TOY / "teacher"), str(TOY / "dflash")
GIB = 1 << 30
CPU = Device("cpu", "cpu", 24 * GIB, 16 * GIB)
GPU = Device("gpu", "gpu", 80 * GIB, 70 * GIB, capability=90)


def configure(*argv: str) -> EngineConfig:
    return engine_config(read_flags(ServeConfig, [MODEL, *argv], prog="laguna serve", description=None))


@pytest.fixture
def gpu_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(adaptive, "find_vllm", lambda: VllmInstall("vllm", "0.32.0"))


def test_on_a_cpu_our_worker_decides() -> None:
    config = configure("--draft", DRAFT, "--gamma", "adaptive")
    command = build_command(config, inspect(config), CPU, 8000)
    assert command[command.index("--worker-cls") + 1] == "laguna_serve.plugins.worker.AdaptiveCPUWorker"
    speculation = json.loads(command[command.index("--speculative-config") + 1])
    assert speculation["num_speculative_tokens"] == 7
    assert "enable_adaptive_verification" not in speculation
    assert "the worker decides" in describe_adaptive(CPU)


def test_on_a_gpu_vllm_verifies_adaptively(gpu_vllm: None) -> None:
    config = configure("--draft", DRAFT, "--gamma", "adaptive")
    command = build_command(config, inspect(config), GPU, 8000)
    assert "--worker-cls" not in command
    assert json.loads(command[command.index("--speculative-config") + 1])["enable_adaptive_verification"] is True
    assert "vLLM's adaptive verification" in describe_adaptive(GPU)


def test_plan_and_doctor_know_it() -> None:
    plan = make_plan(configure("--draft", DRAFT, "--gamma", "adaptive"), CPU)
    assert "adaptive, up to 7: the worker decides" in format_plan(plan)
    drafter = describe_plan(plan).drafter
    assert drafter is not None
    assert (drafter.adaptive, drafter.gamma) == (True, 7)


def test_it_needs_a_drafter_and_decides_alone() -> None:
    with pytest.raises(CheckpointError, match="--gamma adaptive: expected --draft beside it"):
        configure("--gamma", "adaptive")
    for config, got in (
        (EngineConfig(model=MODEL, adaptive=True), "no draft"),
        (EngineConfig(model=MODEL, draft=DRAFT, adaptive=True, gamma_schedule=((1, 64, 3),)), "a schedule of γ"),
    ):
        with pytest.raises(CheckpointError, match=f"nothing else that decides, got {got}"):
            inspect(config)


@pytest.mark.parametrize(
    ("device", "arguments", "eager", "environment", "complaint"),
    [
        (CPU, ("--tensor-parallel-size=2",), False, {}, "one rank"),
        (CPU, ("-pp", "2"), False, {}, "one rank"),
        (CPU, ("--worker-cls", "mine"), False, {}, "expected our worker"),
        (CPU, ("--kv-transfer-config", "{}"), False, {}, "expected no KV connector"),
        (CPU, (), False, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "unset it"),
        (GPU, (), True, {}, "CUDA graphs"),
        (GPU, ("--enforce-eager",), False, {}, "CUDA graphs"),
        (GPU, ("--enable-lora",), False, {}, "LoRA"),
        (GPU, ("--pipeline-parallel-size", "2"), False, {}, "one pipeline stage"),
        (GPU, (), False, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "unset it"),
    ],
)
def test_what_it_does_not_go_with_is_refused_in_a_line(
    gpu_vllm: None, device: Device, arguments: tuple[str, ...], eager: bool, environment: dict[str, str], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint) as refusal:
        check_adaptive(device, arguments, eager=eager, environment=environment)
    assert str(refusal.value).startswith("--gamma adaptive: expected ")
    assert "\n" not in str(refusal.value)


def test_routed_experts_go_beside_it_on_a_cpu_alone(gpu_vllm: None) -> None:
    check_adaptive(CPU, (), eager=False, experts=True, environment={})
    with pytest.raises(CheckpointError, match="expected no --return-routed-experts on a GPU"):
        check_adaptive(GPU, (), eager=False, experts=True, environment={})


def test_older_vllm_on_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "find_vllm", lambda: VllmInstall("vllm", "0.26.1"))
    with pytest.raises(CheckpointError, match=r"expected vLLM 0\.32 or newer on a GPU, got 0\.26\.1"):
        check_adaptive(GPU, (), eager=False, environment={})
    monkeypatch.setattr(adaptive, "find_vllm", lambda: VllmInstall("vllm", "0.33.0"))
    check_adaptive(GPU, ("--tensor-parallel-size", "2"), eager=False, environment={})
    check_adaptive(CPU, (), eager=True, environment={})


def test_a_schedule_that_vllm_drops_is_told_of() -> None:
    alone = EngineConfig(model=MODEL, draft=DRAFT, gamma=7, gamma_schedule=((1, 4, 7), (5, 64, 3)))
    assert not any("schedule" in warning for warning in inspect(alone).warnings)
    for flags in (("-dp", "2"), ("--data-parallel-size=2",)):
        warnings = inspect(replace(alone, extra_args=flags)).warnings
        assert any("drops its schedule beside data parallelism, and drafts 7" in warning for warning in warnings)


def test_no_advice_to_leave_the_drafter_out() -> None:
    seen = Acceptance(drafts=300, accepted=60)
    assert "serve without --draft" in format_acceptance(seen, 7)
    assert "serve without --draft" not in format_acceptance(seen, 7, adaptive=True)
