"""The table of what runs where, against vLLM's own choice of kernels under a platform of that compute capability."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from release_cases import RELEASES, folder
from warm import run_warm

from laguna_serve.serving.checkpoint import CheckpointError, read_target
from laguna_serve.serving.checkpoint.drafter import read_drafter
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning.support import (
    GPU_ROWS,
    choose_kv_dtype,
    judge,
    judge_drafter,
    judge_target,
    kv_value_bytes,
)

TOY = Path(__file__).resolve().parents[2] / "toy"
GIB = 1 << 30
CPU = Device("cpu", "cpu", GIB, GIB, isa=("avx512f",))
GPU = Device("gpu", "gpu", GIB, GIB)
CAPABILITIES = (80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, list[str]]]:
    """Form → capability → vLLM's backends for experts, as it answers in a process of its own."""
    done = run_warm(Path(__file__).with_name("kernel_probe.py"), *map(str, CAPABILITIES))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.vllm
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("form", ["FP8", "NVFP4", "INT4"])
def test_table_is_vllms_choice_of_kernels(kernels: dict[str, dict[str, list[str]]], form: str, capability: int) -> None:
    found = kernels[form][str(capability)]
    target = read_target(Path(folder(f"Laguna-XS-2.1-{form}")))
    verdict = judge_target(target, replace(GPU, capability=capability))
    assert "MARLIN" in found
    assert verdict.served
    native = set(found) - {"MARLIN", "BATCHED_MARLIN", "EMULATION"} if form != "INT4" else set()
    assert (verdict.how == "native") == bool(native), found


@pytest.mark.vllm
@pytest.mark.parametrize("form", ["FP8", "NVFP4", "INT4"])
def test_cpu_has_no_kernel_for_our_experts(kernels: dict[str, dict[str, list[str]]], form: str) -> None:
    assert kernels[form]["cpu"] == []


@pytest.mark.parametrize("kind", ["plain", "fp8", "nvfp4", "int4"])
def test_below_8_0_nothing_runs(kind: str) -> None:
    rows = [row for row in GPU_ROWS if row.kind == kind]
    assert [row.capability for row in rows] == sorted(row.capability for row in rows)
    assert not rows[0].verdict.served
    assert rows[0].verdict.remedy
    assert rows[1].capability == 80


def test_dense_layers_on_a_cpu() -> None:
    int4, fp8, nvfp4 = (
        read_target(Path(folder(f"Laguna-XS.2-{form}"))).quantisation for form in ("INT4", "FP8", "NVFP4")
    )
    amx = replace(CPU, isa=("amx_tile", "avx512f"))
    assert judge(int4, CPU, experts=False).served
    assert not judge(fp8, CPU, experts=False).served
    assert judge(fp8, amx, experts=False).served
    assert not judge(nvfp4, amx, experts=False).served


def test_fp8_kv_cache() -> None:
    target = read_target(Path(folder("Laguna-XS-2.1-NVFP4")))
    plain = read_target(Path(folder("Laguna-XS-2.1")))
    assert choose_kv_dtype(target, replace(GPU, capability=90)) is None
    assert choose_kv_dtype(target, replace(GPU, capability=86)) is not None
    assert choose_kv_dtype(target, CPU) is None
    assert choose_kv_dtype(target, replace(CPU, isa=("avx2",))) is not None
    assert choose_kv_dtype(plain, replace(GPU, capability=80)) is None


def write_drafter(path: Path, name: str, quantisation: dict[str, Any]) -> Path:
    path.mkdir()
    config = json.loads((RELEASES / name / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return path


def quantise(form: str, ignore: list[str]) -> dict[str, Any]:
    config = json.loads((RELEASES / f"Laguna-XS-2.1-{form}" / "config.json").read_text())["quantization_config"]
    return {**config, "ignore": ignore}


@pytest.mark.parametrize(
    ("ignore", "served"),
    [
        (["re:.*embed_tokens$"], False),
        (["re:.*self_attn\\.[qkv]_proj$"], False),  # the parts' names, which the fused module does not have
        (["re:.*self_attn\\.qkv_proj$"], True),
    ],
)
def test_quantised_laguna_drafter_needs_plain_queries_keys_and_values(
    tmp_path: Path, ignore: list[str], served: bool
) -> None:
    path = write_drafter(tmp_path / "drafter", "Laguna-XS-2.1-DFlash", quantise("FP8", ignore))
    verdict = judge_drafter(read_drafter(path), replace(GPU, capability=90))
    assert verdict.served is served
    assert served or verdict.remedy.startswith("take one stored in bf16 that was trained for this form of the model")


def test_quantised_speculators_drafter_is_served_where_its_numbers_are(tmp_path: Path) -> None:
    path = write_drafter(tmp_path / "drafter", "Laguna-XS.2-speculator.dflash", quantise("NVFP4", []))
    drafter = read_drafter(path)
    assert judge_drafter(drafter, replace(GPU, capability=120)).how == "native"
    assert not judge_drafter(drafter, CPU).served


@pytest.mark.parametrize(
    "found",
    [
        "fp8",
        {"bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": []}}},
    ],
)
def test_unreadable_quantisation_is_named(tmp_path: Path, found: object) -> None:
    config = json.loads((RELEASES / "Laguna-XS.2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
    with pytest.raises(CheckpointError, match="expected quantization_config"):
        read_target(tmp_path)


def test_other_methods_are_left_to_vllm(tmp_path: Path) -> None:
    config = json.loads((RELEASES / "Laguna-XS.2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    verdict = judge_target(read_target(tmp_path), replace(GPU, capability=90))
    assert (verdict.how, verdict.served) == ("unknown", True)


@pytest.mark.parametrize(("chosen", "value"), [("fp8", 1), ("fp8_e4m3", 1), ("bfloat16", 2), ("auto", 2), (None, 2)])
def test_bytes_of_a_value_in_the_kv_cache(chosen: str | None, value: int) -> None:
    gpu = replace(GPU, capability=90)
    assert kv_value_bytes(read_target(TOY / "teacher"), gpu, "bfloat16", chosen) == value
