"""Plans of every published release on every kind of device, and the arithmetic behind them against vLLM's own."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from release_cases import DRAFTERS, RELEASES, TARGETS, find_drafter, find_kind, folder, read_tensors, weigh
from safetensors.torch import load_file, save_file

from laguna_serve.serving import cli
from laguna_serve.serving.checkpoint import CheckpointError, read_target
from laguna_serve.serving.checkpoint.drafter import read_drafter
from laguna_serve.serving.checkpoint.parameters import (
    count_drafter,
    count_parameters,
    estimate_bytes,
    estimate_drafter_bytes,
)
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.devices import GPUS, plan_for
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect
from laguna_serve.serving.planning.kv import choose_batched_tokens, plan_layout
from laguna_serve.serving.planning.plan import EnginePlan, make_plan
from laguna_serve.serving.planning.report import format_command, format_plan
from laguna_serve.serving.planning.result import describe_plan
from laguna_serve.serving.planning.support import check_split

TOY = Path(__file__).resolve().parents[2] / "toy"
GIB = 1 << 30
CPU = Device("cpu", "cpu", 64 * GIB, 64 * GIB, isa=("avx2", "avx512f"))


def plan(target: str, draft: str | None = None, device: str = "h100-80gb", **options: Any) -> EnginePlan:
    config = EngineConfig(folder(target), draft=None if draft is None else folder(draft), **options)
    return make_plan(config, plan_for(device), planned=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_parameters_and_bytes_are_those_of_the_headers(name: str) -> None:
    target = read_target(Path(folder(name)))
    assert estimate_bytes(target) == pytest.approx(weigh(name), rel=1e-4)
    if target.quantisation is None:
        assert count_parameters(target) == sum(_count(shape) for _, shape in read_tensors(name).values())


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters_parameters_are_those_of_the_headers(name: str) -> None:
    drafter = read_drafter(Path(folder(name)))
    assert count_drafter(drafter) == pytest.approx(sum(_count(s) for _, s in read_tensors(name).values()), rel=1e-3)
    assert estimate_drafter_bytes(drafter) == pytest.approx(weigh(name), rel=1e-3)


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@pytest.mark.parametrize("device", [*GPUS, "cpu"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_release_is_planned_everywhere(name: str, device: str) -> None:
    """The essentials: class, numbers, drafter, γ, memory, context, and a command or the reason against one."""
    draft = find_drafter(name)
    config = EngineConfig(folder(name), draft=None if draft is None else folder(draft))
    made = make_plan(config, CPU if device == "cpu" else plan_for(device), planned=True)
    found = json.loads(json.dumps(to_json(describe_plan(made))))
    ours = "laguna_cpu" if device == "cpu" else "laguna"
    assert found["classes"]["LagunaForCausalLM"] == f"laguna_serve.plugins.models.{ours}:LagunaForCausalLM"
    assert found["target"]["quantisation"] == find_kind(name)
    assert found["memory"]["weights"] == pytest.approx(weigh(name) + (weigh(draft) if draft else 0), rel=1e-3)
    if draft is not None:
        assert found["drafter"]["gamma"] == found["drafter"]["block_size"] - 1
        assert found["drafter"]["gamma"] == (7 if "XS.2" in name else 15)
        assert found["drafter"]["gamma"] in found["drafter"]["vendor_gamma"]
    assert found["ok"] == bool(found["command"]) == (found["context"]["one"] > 0)
    if found["ok"]:
        assert found["target"]["verdict"]["how"] in ("native", "weight-only")
        assert found["context"]["all"] <= found["context"]["one"] <= found["target"]["max_model_len"]
        assert found["memory"]["weights"] < made.device.total_bytes
    else:
        assert all(": expected " in refusal and "; " in refusal for refusal in found["refusals"])
    text = format_plan(made)
    assert all(len(line) > 13 for line in text.splitlines())
    assert ("refused" in text) is not found["ok"]


@pytest.mark.parametrize(
    ("name", "device", "how"),
    [
        ("Laguna-XS.2", "a100-80gb", "native"),
        ("Laguna-XS.2-FP8", "a100-80gb", "weight-only"),
        ("Laguna-XS.2-FP8", "l40s", "native"),
        ("Laguna-XS-2.1-FP8", "h100-80gb", "native"),
        ("Laguna-XS-2.1-NVFP4", "h100-80gb", "weight-only"),
        ("Laguna-XS-2.1-NVFP4", "rtx5090", "native"),
        ("Laguna-S-2.1-NVFP4", "b200", "native"),
        ("Laguna-XS-2.1-INT4", "rtx3090", "weight-only"),
    ],
)
def test_numbers_run_where_vllm_has_kernels_for_them(name: str, device: str, how: str) -> None:
    verdict = plan(name, device=device).target_verdict
    assert verdict is not None
    assert (verdict.how, verdict.served) == (how, True)


@pytest.mark.parametrize("name", [name for name in TARGETS if find_kind(name) is not None])
def test_quantised_releases_are_refused_on_a_cpu(name: str) -> None:
    made = make_plan(EngineConfig(folder(name)), replace(CPU, isa=("amx_tile", "avx512f")))
    assert made.command == ()
    assert "expected weights that cpu runs, got " in made.refusals[0]
    assert "; serve the bf16 release here, or this one on a GPU" in made.refusals[0]


@pytest.mark.parametrize(
    ("model", "draft", "ranks", "message"),
    [
        ("Laguna-XS.2", None, ("-tp", "3"), "expected intermediate_size to be divisible by 3 GPUs, got 8192"),
        ("Laguna-XS.2", None, ("-tp=64",), "expected query heads of layer 0 to be divisible by 64 GPUs, got 48"),
        ("Laguna-XS-2.1", "Laguna-XS-2.1-DFlash", ("-tp", "2"), None),
        ("Laguna-XS.2", None, ("-tp", "16"), None),
        ("Laguna-XS.2", None, ("-pp", "3"), None),
    ],
)
def test_what_gpus_cannot_share_evenly_is_refused(
    model: str, draft: str | None, ranks: tuple[str, ...], message: str | None
) -> None:
    refusals = plan(model, draft, "h200", extra_args=ranks).refusals
    assert (refusals == ()) == (message is None)
    if message is not None:
        assert message in refusals[0]
        assert "; take another --tensor-parallel-size than " in refusals[0]


def test_fp8_blocks_are_not_split() -> None:
    name = "Laguna-XS-2.1-FP8"
    assert plan(name, device="h200", extra_args=("-tp", "4")).refusals == ()
    (refusal,) = plan(name, device="h200", extra_args=("-tp", "8")).refusals
    expected = "in whole FP8 blocks of 128, got 512 over 8 GPUs; take a smaller --tensor-parallel-size than 8"
    assert expected in refusal
    assert "shared_expert" in refusal
    assert "\n" not in refusal


def test_a_drafter_is_shared_as_its_target_is() -> None:
    target, drafter = read_target(Path(folder("Laguna-XS.2"))), read_drafter(Path(folder(DRAFTERS[0])))
    check_split(target, drafter, 4)
    six = replace(drafter, attention=replace(drafter.attention, heads=(6,) * drafter.num_layers))
    with pytest.raises(CheckpointError, match=f"{drafter.name}: expected query heads of layer 0 to be divisible by 4"):
        check_split(target, six, 4)
    three = replace(drafter, attention=replace(drafter.attention, kv_heads=3))
    with pytest.raises(CheckpointError, match=r"expected 3 heads of keys and values to be shared evenly .* got 4 of"):
        check_split(target, three, 4)


def test_what_is_told_is_what_is_served() -> None:
    """On a CPU a drafter needs room behind the longest sequence; pruned experts are stored narrower."""
    made = make_plan(EngineConfig(str(TOY / "teacher"), draft=str(TOY / "dflash")), CPU)
    assert made.length == 2040
    assert made.context is not None
    assert made.context[0] == 2040
    assert made.command[made.command.index("--max-model-len") + 1] == "2040"
    assert "2,040 tokens for one sequence (the whole)" in format_plan(made)
    assert "6,227,824, 2,459,504 of them per token" in format_plan(made)
    assert "0.0 GiB" not in format_plan(made)
    target = made.checkpoints.target
    assert target is not None
    checkpoints = replace(made.checkpoints, target=replace(target, pruned=True))
    pruned = replace(made, stored=4_999_024, checkpoints=checkpoints)
    assert "parameters    4,999,024\n" in format_plan(pruned)
    described = describe_plan(pruned).target
    assert described is not None
    assert described.active_parameters is None


def test_xs2_on_80_gb_has_room_for_less_than_its_context() -> None:
    alone, drafted = plan("Laguna-XS.2"), plan("Laguna-XS.2", "Laguna-XS.2-speculator.dflash")
    assert alone.layout is not None
    assert drafted.layout is not None
    assert alone.layout.token_bytes * 262_144 == 10 * GIB
    assert drafted.layout.token_bytes * 262_144 == 15 * GIB
    assert alone.context is not None
    assert drafted.context is not None
    assert 80_000 < drafted.context[0] < alone.context[0] < 262_144
    assert "--max-model-len auto" in format_command(alone)
    assert "262,144 do not fit" in format_plan(alone)
    assert plan("Laguna-XS.2", device="h200").context == (262_144, pytest.approx(25_000, rel=0.3))


def test_length_that_does_not_fit_is_refused() -> None:
    refusal = plan("Laguna-XS.2", max_model_len=262_144).refusals[0]
    assert refusal.startswith("--max-model-len: expected a length that fits, got 262144, and NVIDIA H100 80GB has room")
    assert plan("Laguna-XS.2", max_model_len=65_536).refusals == ()


@pytest.mark.parametrize(
    ("arguments", "kv_bytes"),
    [("--kv-cache-memory-bytes 4G", 4 << 30), ("--kv-cache-memory-bytes 2.5g", 2_500_000_000)],
)
def test_numbers_are_read_as_vllm_reads_them(arguments: str, kv_bytes: int) -> None:
    memory = plan("Laguna-XS.2", extra_args=tuple(arguments.split())).memory
    assert memory is not None
    assert memory.kv == kv_bytes


@pytest.mark.parametrize(
    "arguments",
    ["--kv-cache-memory-bytes 4GiB", "--gpu-memory-utilization all", "--gpu-memory-utilization nan"],
)
def test_what_is_no_number_is_left_to_vllm(arguments: str) -> None:
    assert plan("Laguna-XS.2", extra_args=tuple(arguments.split())).memory == plan("Laguna-XS.2").memory


def test_activations_are_as_wide_as_what_is_served() -> None:
    wide, narrow = (plan("Laguna-XS.2", dtype=dtype, max_num_seqs=1).memory for dtype in ("float32", "bfloat16"))
    assert wide is not None
    assert narrow is not None
    assert wide.activations > 1.9 * narrow.activations


def test_several_gpus_share_a_model() -> None:
    assert "memory of NVIDIA H200" in plan("Laguna-S-2.1", device="h200").refusals[0]
    shared = plan("Laguna-S-2.1", device="h200", extra_args=("--tensor-parallel-size", "2"))
    assert shared.refusals == ()
    assert shared.memory is not None
    assert shared.memory.weights == pytest.approx(weigh("Laguna-S-2.1") / 2, rel=1e-3)


def test_fp8_kv_cache_is_left_out_where_there_is_none() -> None:
    for device, value in (("a100-80gb", "bfloat16"), ("h100-80gb", None)):
        command = list(plan("Laguna-XS-2.1-FP8", device=device).command)
        given = command[command.index("--kv-cache-dtype") + 1] if "--kv-cache-dtype" in command else None
        assert given == value
    small, large = (plan("Laguna-XS-2.1-FP8", device=device).layout for device in ("h100-80gb", "a100-80gb"))
    assert small is not None
    assert large is not None
    assert 2 * small.token_bytes == large.token_bytes


def test_command_is_one_that_a_shell_runs(tmp_path: Path) -> None:
    spaced = tmp_path / "two words"
    spaced.symlink_to(folder("Laguna-XS.2"))
    made = make_plan(EngineConfig(str(spaced)), plan_for("h200"), planned=True)
    assert str(spaced) in shlex.split(format_command(made))
    assert shlex.split(format_command(made))[0] == "env"
    assert sys.executable in shlex.split(format_command(made))


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    status = cli.main(["doctor", *arguments])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_doctor_plans_for_a_gpu_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    draft = folder("Laguna-XS-2.1-DFlash")
    status, lines, _ = doctor(capsys, folder("Laguna-XS-2.1"), "--draft", draft, "--as-device", "h200", "--gamma", "7")
    assert status == 0
    assert "(a plan for a device that was named; nothing of this machine)" in lines[0]
    rows = {line[:13].strip(): line[14:] for line in lines[:-1]}
    assert rows["gamma"] == "7 of at most 15 (block 16); Poolside recommends 15"
    assert rows["chat"].startswith("tool calls: on (poolside_v1); thinking: o")
    assert rows["command"].startswith("env ")
    found = json.loads(lines[-1])
    assert (found["schema"], found["device"]["planned"], found["drafter"]["gamma"]) == ("laguna_serve.plan/1", True, 7)


def test_doctor_refuses_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, _ = doctor(capsys, folder("Laguna-M.1"), "--as-device", "rtx4090", "--json")
    assert (status, json.loads(lines[-1])["ok"]) == (1, False)


@pytest.mark.parametrize("lacks", ["lm_head.weight", "model.layers.2.self_attn.q_proj.weight", None])
def test_doctor_refuses_weights_that_are_here_in_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lacks: str | None
) -> None:
    """It planned with the size of what was there, and said that all was well; without weights config.json will do."""
    copy = Path(shutil.copytree(TOY / "teacher", tmp_path / "teacher"))
    weights = copy / "model.safetensors"
    assert doctor(capsys, str(copy), "--as-device", "h200", "--json")[0] == 0
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != lacks}, weights)
    if lacks is None:
        index = {"weight_map": {"a": weights.name, "b": "model-2.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    status, lines, _ = doctor(capsys, str(copy), "--as-device", "h200", "--json")
    [refusal] = json.loads(lines[-1])["refusals"]
    assert (status, "fetch it again" in refusal) == (1, True)
    assert (lacks or "model-2.safetensors").removeprefix("model.").removesuffix(".weight") in refusal
    weights.unlink()
    assert doctor(capsys, str(copy), "--as-device", "h200", "--json")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as-device", "h200"], "doctor: expected a model with these flags, got none; name it first"),
        ([folder("Laguna-XS.2"), "--as-device", "tpu"], "--as-device: expected one of a100-40gb, "),
        (
            [folder("Laguna-XS.2"), "--draft", folder("Laguna-XS.2"), "--as-device", "h200"],
            "that is a base model: pass",
        ),
        ([folder("Laguna-XS-2.1-DFlash"), "--as-device", "h200"], "got a DFlash drafter; pass it as the draft instead"),
        (
            [folder("Laguna-XS-2.1"), "--draft", folder("Laguna-S-2.1-DFlash"), "--as-device", "h200"],
            "expected the target's hidden size 2048, got 3072; take a drafter trained for ",
        ),
    ],
)
def test_doctor_names_what_is_wrong_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, lines, error = doctor(capsys, *arguments)
    assert (status, lines) == (2, [])
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("name", "kind"), [("Laguna-XS.2-NVFP4", "NVFP4"), ("Laguna-XS.2-INT4", "INT4")])
def test_pruning_packed_experts_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "mask.npy").touch()
    mask = str(tmp_path / "mask.npy")
    with pytest.raises(
        CheckpointError, match=rf"--keep-mask: expected plain experts or FP8 .*got {kind} .*; cut the bf16 or FP8"
    ):
        plan(name, keep_mask=mask, group_indices=mask)


def test_terminal_gets_no_json_line_unless_it_asks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    asked = [folder("Laguna-XS.2"), "--as-device", "h200"]
    assert not any(line.startswith("{") for line in doctor(capsys, *asked)[1])
    assert doctor(capsys, *asked, "--json")[1][-1].startswith("{")


def test_refused_plan_for_a_cpu_does_not_say_what_was_never_divided() -> None:
    text = format_plan(make_plan(EngineConfig(folder("Laguna-XS.2-FP8")), CPU, planned=True))
    assert "weights 32.9 GiB by config.json\n" in text
    assert "0.0 MiB" not in text
    assert "0 tokens" not in text


def test_fp8_students_are_dequantised_on_a_cpu(tmp_path: Path) -> None:
    """Padded ones, too: vLLM's own class has no kernel there. A GPU's has, and keeps it."""
    config = json.loads((TOY / "dense" / "config.json").read_text())
    released = json.loads((Path(folder("Laguna-XS.2-FP8")) / "config.json").read_text())["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": released}))
    made = make_plan(EngineConfig(str(tmp_path)), CPU, planned=True)
    assert made.refusals == ()
    assert list(made.classes) == ["LagunaDenseForCausalLM"]
    assert made.memory is not None
    assert made.memory.weights == pytest.approx(2 * 2_682_144, rel=0.01)
    assert list(make_plan(EngineConfig(str(tmp_path)), plan_for("l40s"), planned=True).classes) == ["LagunaForCausalLM"]


def test_new_weights_for_quantised_models_are_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"weight updates: expected a checkpoint without quantization_config, got F"
    ):
        plan("Laguna-XS.2-FP8", weight_updates=True)
    with pytest.raises(CheckpointError, match="weight updates: expected one device for each engine, got --tensor"):
        plan("Laguna-XS.2", weight_updates=True, extra_args=("--tensor-parallel-size", "2"))


@pytest.mark.parametrize("device", ["h100-80gb", "cpu"])
def test_pruned_fp8_base_is_planned_by_what_the_mask_keeps(tmp_path: Path, device: str) -> None:
    """An atom's three vectors of 2,048 in FP8 and 16 scales each in fp32; on a CPU linear layers become bf16."""
    keep = np.ones((39, 256, 8), dtype=bool)
    keep[:, :, 6:] = False
    np.save(tmp_path / "mask.npy", keep)
    mask, base = str(tmp_path / "mask.npy"), folder("Laguna-XS.2-FP8")
    config = EngineConfig(base, keep_mask=mask, group_indices=mask)
    made = make_plan(config, CPU if device == "cpu" else plan_for(device), planned=True)
    assert made.refusals == ()
    assert made.target_verdict is not None
    assert made.target_verdict.served
    assert made.memory is not None
    experts = int(keep.sum()) * 64 * 3 * (2048 + 4 * 16)
    linear = 39 * 3 * 512 * 2048 + 3 * 8192 * 2048
    linear_bytes = 2 * linear if device == "cpu" else linear + 4 * linear // 128**2
    rest = count_parameters(read_target(Path(base))) - 39 * 256 * 3 * 512 * 2048 - linear
    assert made.memory.weights == pytest.approx(experts + linear_bytes + 2 * rest, rel=1e-4)


def run_laguna(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "laguna_serve.serving.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_dry_run_says_what_would_be_started(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    arguments = ["--draft", str(TOY / "dflash"), "--dry-run", "--port", "0", "--log", str(log)]
    done = run_laguna("serve", str(TOY / "teacher"), *arguments)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert json.loads(last)["ok"] is True
    assert table[-1].startswith("command       env ")
    assert not log.exists()


@pytest.mark.parametrize("name", TARGETS)
def test_dry_run_says_what_doctor_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of every release, here without its weights, which is one more thing to refuse."""
    free = "laguna_serve.serving.machine.device.available_bytes"
    monkeypatch.setattr(free, lambda: 16 << 30)  # which other processes would change in between
    draft = find_drafter(name)
    arguments = [folder(name)] if draft is None else [folder(name), "--draft", folder(draft)]
    cli.main(["doctor", *arguments])
    examined = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert cli.main(["serve", *arguments, "--dry-run", "--port", "0"]) == 2
    *_, line = capsys.readouterr().out.splitlines()
    rehearsed = json.loads(line)
    missing = set(rehearsed["refusals"]) - set(examined["refusals"])
    assert len(missing) <= 1
    assert all("got none; fetch it again" in refusal for refusal in missing)
    assert set(examined["refusals"]) <= set(rehearsed["refusals"])
    different = {"refusals", "ok", "command", "device", "environment", "memory"}  # free memory moves, ports differ
    for key in examined.keys() - different:
        assert rehearsed[key] == examined[key], key


@pytest.mark.vllm
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_kv_arithmetic_is_vllms(name: str, kind: str) -> None:
    """Blocks that vLLM wants for one sequence, from its own groups of the same layers."""
    draft = find_drafter(name)
    drafter = None if draft is None else read_drafter(Path(folder(draft)))
    target, device = read_target(Path(folder(name))), replace(CPU, kind="gpu") if kind == "gpu" else CPU
    batched = choose_batched_tokens(device)
    for tokens in (1, 500, 4096, 100_000, target.max_model_len):
        layout = plan_layout(target, drafter, device, value_bytes=2, batched_tokens=batched)
        assert layout.sequence_bytes(tokens) == _ask_vllm(target, drafter, layout.block, tokens, batched, kind)


def _ask_vllm(target: Any, drafter: Any, block: int, tokens: int, batched: int, kind: str) -> int:
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    sizes = {"block_size": block, "num_kv_heads": target.num_kv_heads, "head_size": target.head_dim}
    full = FullAttentionSpec(**sizes, dtype=torch.bfloat16)
    window = SlidingWindowSpec(**sizes, dtype=torch.bfloat16, sliding_window=target.sliding_window or 1)
    specs = {
        f"layers.{number}": full if name == "full_attention" else window
        for number, name in enumerate(target.attention_kinds)
    }
    layers = 0 if drafter is None else drafter.num_layers
    specs |= {f"layers.{target.num_layers + number}": full for number in range(layers)}
    config = _configure(tokens, batched, ahead=kind == "gpu")
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    return int(kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups))


def _configure(tokens: int, batched: int, *, ahead: bool) -> Any:
    """vLLM's configuration as far as those two functions read it."""
    from types import SimpleNamespace

    from vllm.config import VllmConfig

    config: Any = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=tokens)
    config.cache_config.kv_cache_layout = "LBNHC"
    config.scheduler_config.max_num_batched_tokens = batched
    config.scheduler_config.async_scheduling = ahead
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    return config


def test_length_beyond_the_model_s_own_is_refused_by_a_plan_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dry-run` and the doctor found it in order, and vLLM refused it."""
    folder = Path(shutil.copytree(TOY / "teacher", tmp_path / "teacher"))
    inspect(EngineConfig(str(folder), max_model_len=2048))
    with pytest.raises(CheckpointError, match="--max-model-len: expected at most 2048, the model's own, got 2049"):
        inspect(EngineConfig(str(folder), max_model_len=2049))
    inspect(EngineConfig(str(folder), max_model_len=2049, extra_args=("--hf-overrides", "{}")))
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        inspect(EngineConfig(str(folder), max_model_len=2049))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    inspect(EngineConfig(str(folder), max_model_len=4096))


@pytest.mark.parametrize("release", ["Laguna-XS.2", "Laguna-XS-2.1-FP8", "Laguna-S-2.1", "Laguna-M.1"])
def test_releases_have_the_length_that_their_config_says(release: str) -> None:
    """YaRN's factor is in it: vLLM multiplies it no more."""
    folder = RELEASES / release
    own = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    inspect(EngineConfig(str(folder), max_model_len=own))
    with pytest.raises(CheckpointError, match=f"--max-model-len: expected at most {own}, the model's own"):
        inspect(EngineConfig(str(folder), max_model_len=own + 1))
