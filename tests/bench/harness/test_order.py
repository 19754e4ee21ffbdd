"""Whether two engines fit at once: the releases' real sizes on real devices, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from laguna_serve.bench.arms.arms import ArmSpec
from laguna_serve.bench.harness.order import AT_A_TIME, Load, choose_order, find_room
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning import launch
from laguna_serve.serving.planning.devices import plan_for

RELEASES = Path(__file__).resolve().parents[2] / "fixtures" / "releases"
TOY = Path(__file__).resolve().parents[2] / "toy"
# A sweep's default: 96 tokens after a short prompt, one at a time; and a server's worth.
LIGHT, HEAVY = Load(1000, 1), Load(4096, 16)


def pair(model: Path, draft: Path, **more: float) -> list[EngineConfig]:
    plain = EngineConfig(str(model), prefix_caching=False, kv_cache_gib=more.get("kv_cache_gib"))
    return [plain, replace(plain, draft=str(draft), gamma=7)]


def release(name: str, **more: float) -> list[EngineConfig]:
    return pair(RELEASES / name, RELEASES / "Laguna-XS.2-speculator.dflash", **more)


def toy() -> list[EngineConfig]:
    return pair(TOY / "teacher", TOY / "dflash")


def specs(configs: list[EngineConfig]) -> list[ArmSpec]:
    return [ArmSpec(name, name, config=config) for name, config in zip(("baseline", "candidate"), configs, strict=True)]


@pytest.mark.parametrize(
    ("name", "device", "load", "fits"),
    [
        ("Laguna-XS.2", "h100-80gb", LIGHT, False),
        ("Laguna-XS.2", "h200", LIGHT, True),
        ("Laguna-XS.2", "h200", HEAVY, False),
        ("Laguna-XS.2-FP8", "h100-80gb", LIGHT, True),
        ("Laguna-XS.2-FP8", "h100-80gb", HEAVY, False),
        ("Laguna-XS.2-FP8", "a100-40gb", LIGHT, False),
        ("Laguna-XS.2", "b200", HEAVY, True),
    ],
)
def test_releases_on_gpus(name: str, device: str, load: Load, fits: bool) -> None:
    gpu = plan_for(device)
    room = find_room(release(name), gpu, load)
    assert room is not None
    assert (room.kv_bytes is not None) is fits
    assert f"{gpu.name} has " in room.why
    if name == "Laguna-XS.2":
        assert "(125.7 GiB weights, " in room.why
    if room.kv_bytes is not None:  # each engine's share, with which the device is not full
        fixed = 2 * (33 if "FP8" in name else 62.3) * GIB
        assert fixed + 2 * room.kv_bytes < 0.97 * gpu.total_bytes


def test_two_engines_on_a_cpu_need_the_machine_s_memory() -> None:
    for gib, fits in ((5, False), (8, True)):
        room = find_room(toy(), Device("cpu", "a cpu", 64 * GIB, gib * GIB), LIGHT)
        assert room is not None
        assert (room.kv_bytes is not None) is fits


def test_kv_cache_that_was_asked_for_counts() -> None:
    room = find_room(release("Laguna-XS.2-FP8", kv_cache_gib=8), plan_for("h100-80gb"), LIGHT)
    assert room is not None
    assert room.kv_bytes is None
    assert "16.0 GiB KV cache" in room.why


def test_load_is_the_longest_prompt_and_its_answer() -> None:
    assert Load.of([Prompt("a", "x" * 400), Prompt("b", "y")], max_tokens=100, sequences=4) == Load(300, 4)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(launch, "find_device", lambda _install: Device("cpu", "a small one", 8 * GIB, 5 * GIB))
    return []


def test_engines_that_do_not_fit_go_one_at_a_time_and_say_why(said: list[str]) -> None:
    order = choose_order(specs(toy()), None, LIGHT, said.append)
    assert order.sequential
    (line,) = said
    assert line.startswith("both engines at once need 6.1 GiB (")
    assert line.endswith(f"a small one has 5.0 GiB for them: {AT_A_TIME}")


def test_user_decides(said: list[str]) -> None:
    order = choose_order(specs(toy()), False, LIGHT, said.append)
    assert (order.sequential, order.settled) == (False, True)
    assert not said
    assert choose_order(specs(toy()), True, LIGHT, said.append).sequential
    assert said == [AT_A_TIME]


def test_endpoints_are_up_already(said: list[str]) -> None:
    urls = [ArmSpec(name, name, url="http://127.0.0.1:9") for name in ("baseline", "candidate")]
    assert not choose_order(urls, None, LIGHT, said.append).sequential


def test_sizes_that_are_not_known_are_seen_once_an_engine_is_up(said: list[str]) -> None:
    unknown = [EngineConfig("somebody/Laguna-of-theirs", prefix_caching=False)] * 2
    order = choose_order(specs(unknown), None, LIGHT, said.append)
    assert (order.sequential, order.settled, order.kv_cache_gib) == (False, False, None)


def test_engines_that_fit_share_what_is_left(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_device", lambda _install: plan_for("h100-80gb"))
    arms = specs(release("Laguna-XS.2-FP8"))
    order = choose_order(arms, None, LIGHT, said.append)
    applied = [order.apply(spec).config for spec in arms]
    assert [config.kv_cache_gib for config in applied if config is not None] == [order.kv_cache_gib] * 2
    assert order.kv_cache_gib is not None
    assert 0.5 < order.kv_cache_gib < 2
