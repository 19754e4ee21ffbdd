"""The vLLM command and environment that a configuration becomes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import SPECULATORS, TARGET, MakeCheckpoint, write_drafter_weights

from laguna_serve.plugins.register import TRANSFER_BACKEND
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.machine import dtype as dtype_module
from laguna_serve.serving.machine import threads
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.machine.rates import LIMITS, Rates
from laguna_serve.serving.planning import launch, plan
from laguna_serve.serving.planning.command import (
    build_command,
    build_environment,
    list_device_warnings,
    settle_dtype,
    wanted_kv_bytes,
    wanted_weight_bytes,
)
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect
from laguna_serve.serving.planning.plan import make_plan

DENSE: dict[str, Any] = {"mlp_layer_types": ["dense"] * 6}
CPU = Device("cpu", "cpu", 24 * GIB, 16 * GIB)


def build(config: EngineConfig, device: Device = CPU) -> list[str]:
    return build_command(config, inspect(config), device, 8001)


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_defaults(target: Path) -> None:
    command = build(EngineConfig(model=str(target)))
    assert command == [
        sys.executable,
        "-m",
        "laguna_serve.plugins.processes.api_server",
        *("--model", str(target), "--host", "127.0.0.1", "--port", "8001", "--served-model-name", "teacher"),
        *("--dtype", "auto", "--seed", "0", "--max-num-seqs", "64", "--enable-prefix-caching"),
        *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
        *("--kv-cache-memory-bytes", str(GIB // 4)),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "float32"}, ["--dtype", "float32"]),
        ({"max_model_len": 512}, ["--max-model-len", "512"]),
        ({"max_num_seqs": 3}, ["--max-num-seqs", "3"]),
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"weight_updates": True}, ["--weight-transfer-config", json.dumps({"backend": TRANSFER_BACKEND})]),
        ({"return_routed_experts": True}, ["--enable-return-routed-experts"]),
        ({"prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"seed": 7}, ["--seed", "7"]),
        ({"served_model_name": "m"}, ["--served-model-name", "m"]),
        ({"host": "0.0.0.0"}, ["--host", "0.0.0.0"]),
        ({"kv_cache_gib": 1.5}, ["--kv-cache-memory-bytes", str(3 * GIB // 2)]),
        ({"extra_args": ("--max-num-batched-tokens", "64")}, ["--max-num-batched-tokens", "64"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_option_becomes_flag(target: Path, changes: dict[str, Any], expected: list[str]) -> None:
    command = build(EngineConfig(model=str(target), **changes))
    start = command.index(expected[0])
    assert command[start : start + len(expected)] == expected


@pytest.mark.parametrize(("gamma", "expected"), [(None, 7), (3, 3)])
def test_draft_becomes_speculative_config(target: Path, drafter: Path, gamma: int | None, expected: int) -> None:
    command = build(EngineConfig(model=str(target), draft=str(drafter), gamma=gamma))
    assert json.loads(flag(command, "--speculative-config")) == {
        "method": "dflash",
        "model": str(drafter),
        "num_speculative_tokens": expected,
    }


def test_drafts_are_drawn_where_that_is_asked(target: Path, drafter: Path) -> None:
    config = EngineConfig(model=str(target), draft=str(drafter), draft_sampling="probabilistic")
    assert json.loads(flag(build(config), "--speculative-config"))["draft_sample_method"] == "probabilistic"
    with pytest.raises(CheckpointError, match="expected greedy or probabilistic, got 'gumbel'"):
        inspect(replace(config, draft_sampling="gumbel"))
    with pytest.raises(CheckpointError, match="expected a draft beside it, got probabilistic alone"):
        inspect(replace(config, draft=None))


def test_speculators_format_is_taken(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    draft = make_checkpoint("speculator", SPECULATORS)
    write_drafter_weights(draft)
    command = build(EngineConfig(model=str(target), draft=str(draft)))
    assert json.loads(flag(command, "--speculative-config"))["num_speculative_tokens"] == 7


def test_hub_ids_are_passed_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = EngineConfig(model="poolside/Laguna-XS.2", draft="poolside/Laguna-XS.2-speculator.dflash", gamma=7)
    command = build(config)
    assert flag(command, "--model") == flag(command, "--served-model-name") == "poolside/Laguna-XS.2"
    assert not inspect(config).local


def test_relative_folder_is_named_after_itself(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(target)
    assert EngineConfig(model=".").model_name == "teacher"


def test_gamma_needs_a_draft(target: Path) -> None:
    with pytest.raises(CheckpointError, match="gamma: expected a draft beside it, got 3 alone"):
        inspect(EngineConfig(model=str(target), gamma=3))


@pytest.mark.parametrize(
    ("stored", "dtype", "weight_bytes", "value_bytes"),
    [
        ("bfloat16", "auto", 100, 2),
        ("bfloat16", "float32", 200, 4),
        ("float32", "auto", 50, 2),
        ("float32", "float32", 100, 4),
    ],
)
def test_memory_follows_the_dtype(
    make_checkpoint: MakeCheckpoint, drafter: Path, stored: str, dtype: str, weight_bytes: int, value_bytes: int
) -> None:
    folder = make_checkpoint("target", TARGET, dtype=stored)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    config = EngineConfig(model=str(folder), draft=str(drafter), dtype=dtype, max_model_len=10, max_num_seqs=3)
    checkpoints = inspect(config)
    drafter_bytes = (drafter / "model.safetensors").stat().st_size
    assert wanted_weight_bytes(config, checkpoints) == weight_bytes + drafter_bytes * value_bytes // 2
    target_values, drafter_values = 2 * 6 * 2 * 32, 2 * 2 * 2 * 32
    assert wanted_kv_bytes(config, checkpoints) == value_bytes * (target_values + drafter_values) * 10 * 3


HASWELL = replace(CPU, isa=("fpu", "avx2"))
SLOW_BF16 = Rates(bfloat16={"1": 0.4, "8": 2.6}, float32={"1": 0.3, "8": 0.3})


@pytest.fixture
def slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bf16 arithmetic, and no kernel of ours."""
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dtype_module, "find_rates", lambda: SLOW_BF16)
    monkeypatch.setattr(launch, "require_device", lambda: HASWELL)


def test_faster_float32_reaches_the_command_and_the_memory(slow_bf16: None, target: Path, drafter: Path) -> None:
    plain = launch.plan_launch(EngineConfig(model=str(target)))
    drafting = launch.plan_launch(EngineConfig(model=str(target), draft=str(drafter)))
    for planned in (plain, drafting):
        assert flag(planned.command, "--dtype") == "float32"
        (note,) = (line for line in planned.warnings if line.startswith("dtype: float32"))
        assert "--dtype overrides" in note
    config = EngineConfig(model=str(target))
    settled, _ = settle_dtype(config, inspect(config), HASWELL)
    assert wanted_kv_bytes(settled, inspect(config)) == 2 * wanted_kv_bytes(config, inspect(config))
    assert make_plan(config, HASWELL).config.dtype == "float32"
    assert make_plan(config, CPU).config.dtype == "auto"


def test_asked_dtype_is_kept(slow_bf16: None, target: Path) -> None:
    planned = launch.plan_launch(EngineConfig(model=str(target), dtype="bfloat16"))
    assert flag(planned.command, "--dtype") == "bfloat16"
    assert not any(line.startswith("dtype:") for line in planned.warnings)


def test_models_that_cannot_be_read_keep_their_dtype(slow_bf16: None, target: Path) -> None:
    assert launch.find_engine_dtype(EngineConfig(model=str(target))) == "float32"
    assert launch.find_engine_dtype(EngineConfig(model="someone/elsewhere")) == "auto"
    (target / "config.json").write_text("{")
    assert launch.find_engine_dtype(EngineConfig(model=str(target))) == "auto"


def test_environment_is_private_and_offline_for_local_files() -> None:
    base = {"PATH": "/bin", "VLLM_CPU_KVCACHE_SPACE": "40"}
    environment = build_environment(base, CPU, local=True)
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == environment["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["PATH"] == "/bin"
    assert "HF_HUB_OFFLINE" not in build_environment(base, CPU, local=False)


def test_engine_that_takes_new_weights_stays_on_the_loopback(target: Path) -> None:
    """Whoever reaches vLLM's development routes can change its weights."""
    assert "VLLM_SERVER_DEV_MODE" not in build_environment({}, CPU, local=True)
    assert build_environment({}, CPU, local=True, weight_updates=True)["VLLM_SERVER_DEV_MODE"] == "1"
    with pytest.raises(CheckpointError, match=r"expected an engine on the loopback, got 0\.0\.0\.0"):
        inspect(EngineConfig(model=str(target), host="0.0.0.0", weight_updates=True))


def test_routed_experts_take_our_worker_on_a_cpu(target: Path) -> None:
    gpu = Device("gpu", "gpu", 80 * GIB, 70 * GIB)
    ours, vllms = {"return_routed_experts": True}, {"extra_args": ("--enable-return-routed-experts",)}
    for asked in (ours, vllms):
        config = EngineConfig(model=str(target), **asked)  # type: ignore[arg-type]
        assert flag(build(config), "--worker-cls") == "laguna_serve.plugins.worker.CPUWorker"
        assert "--worker-cls" not in build(config, gpu)


def test_routed_experts_are_refused_where_there_are_none(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    dense = make_checkpoint("dense", TARGET | DENSE)
    with pytest.raises(CheckpointError, match=r"experts: expected a mixture of experts, got .*dense; drop"):
        inspect(EngineConfig(model=str(dense), return_routed_experts=True))
    with pytest.raises(CheckpointError, match=r"^--return-routed-experts: expected prefix caching"):
        inspect(EngineConfig(model=str(target), return_routed_experts=True, prefix_caching=False))


def test_cpu_engine_leaves_a_core_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_cores", lambda: 4)
    assert build_environment({}, CPU, local=True, weight_bytes=1000)["OMP_NUM_THREADS"] == "3"
    assert build_environment({}, CPU, local=True, weight_bytes=1 << 30)["OMP_NUM_THREADS"] == "4"
    told = {"OMP_NUM_THREADS": "8"}
    assert build_environment(told, CPU, local=True, weight_bytes=1000)["OMP_NUM_THREADS"] == "8"
    monkeypatch.setattr(threads, "count_cores", lambda: 1)
    assert build_environment({}, CPU, local=True, weight_bytes=1000)["OMP_NUM_THREADS"] == "1"


def test_launch_and_plan_count_threads_by_the_target(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "count_cores", lambda: 2)
    config = EngineConfig(model=str(target), extra_args=("--load-format", "dummy"))
    assert launch.plan_launch(config).environment["OMP_NUM_THREADS"] == "1"
    large = replace(inspect(config), target_bytes=1 << 30)
    monkeypatch.setattr(launch, "check_launch", lambda _config: large)
    assert launch.plan_launch(config).environment["OMP_NUM_THREADS"] == "2"
    assert plan.make_plan(config, CPU).environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(plan, "inspect", lambda _config, weights: large)
    assert plan.make_plan(config, CPU).environment["OMP_NUM_THREADS"] == "2"


def test_cpu_engine_keeps_more_of_onednns_products_unless_told_otherwise() -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    assert build_environment({}, CPU, local=True)[name] == "4096"
    assert build_environment({name: "100"}, CPU, local=True)[name] == "100"


def test_gpu_engine_keeps_vllms_executor_and_threads(target: Path) -> None:
    gpu = Device("gpu", "gpu", 80 * GIB, 70 * GIB)
    assert "--distributed-executor-backend" not in build(EngineConfig(model=str(target)), gpu)
    of_cpus = {"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LD_PRELOAD"}
    assert not of_cpus & build_environment({}, gpu, local=True).keys()


def test_prefix_caching_with_a_drafter_is_not_taken_for_granted_on_a_gpu(target: Path, drafter: Path) -> None:
    gpu = Device("gpu", "gpu", 80 * GIB, 70 * GIB)
    config = EngineConfig(model=str(target), draft=str(drafter), max_model_len=1024)
    checkpoints = inspect(config)
    assert "vllm#47930" in list_device_warnings(config, checkpoints, gpu)[0]
    assert list_device_warnings(replace(config, prefix_caching=False), checkpoints, gpu) == []
    assert list_device_warnings(replace(config, draft=None), checkpoints, gpu) == []


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (None, 2040),
        (2048, 2040),
        (2041, 2040),
        (2040, 2040),
        (512, 513),
        (505, 513),
        (504, 504),
        (400, 400),
        (1920, 1921),
    ],
)
def test_cpu_engine_leaves_room_for_a_draft_behind_the_longest_sequence(
    target: Path, drafter: Path, asked: int | None, chosen: int
) -> None:
    """Blocks of 128, γ 7, a model of 2048: 8 places must be left in the last block, and positions for them."""
    config = EngineConfig(model=str(target), draft=str(drafter), max_model_len=asked)
    command = build(config)
    given = int(flag(command, "--max-model-len"))
    assert given == chosen
    assert -given % 128 >= 8
    assert given + 8 <= 2048
    assert flag(command, "--worker-cls") == "laguna_serve.plugins.worker.CPUWorker"
    warned = list_device_warnings(config, inspect(config), CPU)
    assert bool(warned) == (chosen < (asked or 2048))


def test_length_is_left_alone_without_a_drafter_and_on_a_gpu(target: Path, drafter: Path) -> None:
    gpu = Device("gpu", "gpu", 80 * GIB, 70 * GIB)
    assert "--max-model-len" not in build(EngineConfig(model=str(target)))
    assert "--worker-cls" not in build(EngineConfig(model=str(target)))
    command = build(EngineConfig(model=str(target), draft=str(drafter), max_model_len=512), gpu)
    assert flag(command, "--max-model-len") == "512"
    assert "--worker-cls" not in command


@pytest.mark.parametrize("flag", [("--tensor-parallel-size", "2"), ("--tensor-parallel-size=2",), ("-tp", "2")])
def test_several_ranks_are_not_squeezed_into_one_process(target: Path, flag: tuple[str, ...]) -> None:
    """The in-process executor would wait for the other rank for ever."""
    command = build(EngineConfig(model=str(target), extra_args=flag))
    assert "--distributed-executor-backend" not in command


@pytest.mark.parametrize(
    ("changes", "extra", "refused"),
    [
        ({}, ("--hf-overrides", '{"architectures": ["LagunaDenseForCausalLM"]}', "--tensor-parallel-size", "2"), True),
        ({"architectures": ["LagunaDenseForCausalLM"]}, ("-tp=2",), True),
        ({"architectures": ["LagunaDenseForCausalLM"]}, ("-tp=1",), False),
        ({"architectures": ["LagunaDenseForCausalLM"]}, ("-pp=2",), False),
        ({}, ("--hf-overrides", '{"rope_theta": 1}', "-tp", "2"), False),
        ({}, ("--hf-overrides", "[]", "-tp", "2"), False),
        ({}, ("--hf-overrides", "not JSON", "-tp", "2"), False),
    ],
)
def test_dense_class_on_several_devices_is_refused_before_an_engine_starts(
    make_checkpoint: MakeCheckpoint, changes: dict[str, Any], extra: tuple[str, ...], refused: bool
) -> None:
    config = EngineConfig(model=str(make_checkpoint("model", TARGET, **DENSE, **changes)), extra_args=extra)
    if not refused:
        assert build(config)
        return
    with pytest.raises(CheckpointError, match=r"expected one device, got tensor parallel size 2; serve it on one, or"):
        build(config)


def test_pruning_files_become_overrides(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mask.npy", "indices.npy"):
        (tmp_path / name).touch()
    command = build(EngineConfig(model=str(target), keep_mask="mask.npy", group_indices="indices.npy"))
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    files = {"keep_mask": str(tmp_path / "mask.npy"), "group_indices": str(tmp_path / "indices.npy")}
    assert overrides == {"architectures": ["LagunaSentinelForCausalLM"], "expert_pruning": files}


@pytest.mark.parametrize(
    ("changes", "extra", "chosen"),
    [
        (DENSE, (), True),
        ({"mlp_layer_types": ["dense", *["sparse"] * 5]}, (), False),
        ({}, (), False),
        (DENSE | {"quantization_config": {"quant_method": "fp8"}}, (), False),
        (DENSE | {"architectures": ["LagunaDenseForCausalLM"]}, (), False),
        (DENSE, ("--tensor-parallel-size", "2"), False),
        (DENSE, ("--hf-overrides", "{}"), False),
        (DENSE, ("--quantization=fp8",), False),
    ],
    ids=["dense", "sparse", "silent", "quantised", "unpadded", "two ranks", "own overrides", "quantised now"],
)
def test_dense_model_is_loaded_at_its_true_width(
    make_checkpoint: MakeCheckpoint, changes: dict[str, Any], extra: tuple[str, ...], chosen: bool
) -> None:
    command = build(EngineConfig(model=str(make_checkpoint("model", TARGET, **changes)), extra_args=extra))
    ours = json.dumps({"architectures": ["LagunaDenseForCausalLM"]})
    assert (ours in command) == chosen


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"keep_mask": "there.npy"}, "group indices: expected a file beside there.npy, got none; pass both"),
        ({"group_indices": "there.npy"}, "keep mask: expected a file beside there.npy, got none; pass both"),
        ({"keep_mask": "gone.npy", "group_indices": "there.npy"}, "keep mask gone.npy: expected a file, got none"),
    ],
    ids=["mask alone", "indices alone", "no such file"],
)
def test_pruning_files_are_checked_first(
    target: Path, files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npy").touch()
    with pytest.raises(CheckpointError, match=message):
        build(EngineConfig(model=str(target), **files))
