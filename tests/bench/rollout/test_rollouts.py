"""What a rollout costs, on mocks: figures, break-even, versions, resume, refusals; and once on real engines."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
from mock_engine import START, Clock, MockEngine, Settings
from mock_engine.weights import Weights
from msgspec import structs
from rollout_launcher import RolloutLauncher

from laguna_serve.bench import rollouts
from laguna_serve.bench.arms import arms
from laguna_serve.bench.rollout import plot as rollouts_plot
from laguna_serve.bench.rollout import points as rollouts_points
from laguna_serve.bench.rollout import runner as rollouts_runner
from laguna_serve.bench.rollout.break_even import summarise_point
from laguna_serve.bench.rollout.options import RolloutsConfig
from laguna_serve.bench.rollout.result import INCONCLUSIVE, LOSES, PAYS, Estimate, MeasuredPoint, RolloutsResult, Turn
from laguna_serve.bench.rollout.weights import check_start
from laguna_serve.serving.client import counters as metrics
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.kit.results import read_result

TOY = Path(__file__).resolve().parents[2] / "toy"
TEACHER = TOY / "teacher"
PAIR = ["--model", str(TEACHER), "--draft", str(TOY / "dflash")]
Answer = tuple[int, dict[str, Any], str]


@pytest.fixture
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[RolloutLauncher]:
    clock = Clock()
    made = type("Made", (RolloutLauncher,), {"clock": clock})
    monkeypatch.setattr(arms, "Engine", made)
    monkeypatch.setattr(metrics, "POLL_S", 0.001)
    monkeypatch.setattr(rollouts_points, "time", clock)
    monkeypatch.setattr(rollouts_points, "read_cpu_s", lambda _pids: 2 * clock.now_s)
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(rollouts_plot, "draw", lambda _result, path: path.write_bytes(b""))
    return made


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{index}():"}) + "\n" for index in range(20)))

    def run_rollouts(*more: str) -> Answer:
        size = ["--prompts", str(prompts), "--rounds", "8", "--max-tokens", "16", "--out", str(tmp_path / "out")]
        try:
            status = rollouts.main([*PAIR, *size, *more])
        except SystemExit as error:
            status = int(str(error.code))
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, " ".join((captured.out + captured.err).split())

    return run_rollouts


@pytest.fixture
def versions(tmp_path: Path) -> Callable[..., list[str]]:
    """Copies of the teacher as later versions."""

    def make(*names: str) -> list[str]:
        for name in names:
            shutil.copytree(TEACHER, tmp_path / name)
        return ["--versions", *(str(tmp_path / name) for name in names)]

    return make


def make_turns(
    tokens: int, seconds: list[float], drafts: int = 0, accepted: int = 0, drafter: bool = False
) -> list[Turn]:
    places = (accepted,) if drafts or drafter else ()
    delta = Counters(drafts, 7 * drafts, accepted, tokens, accepted_per_position=places)
    return [Turn(tokens, wall_s, 2 * wall_s, delta) for wall_s in seconds]


def make_point(candidate_s: list[float]) -> MeasuredPoint:
    """Plain: 100 tokens a second. Speculating: τ = 1 + 30 / 20 = 2.5."""
    turns = {"baseline": make_turns(100, [1.0] * 8), "candidate": make_turns(100, candidate_s, 20, 30)}
    return MeasuredPoint(batch=8, version=None, fingerprint="", requests=1, sequences_per_request=8, turns=turns)


def test_figures_of_a_point_are_those_worked_out_by_hand() -> None:
    point = summarise_point(make_point([0.5] * 8), seed=0, price_per_hour=3.6)
    assert point.tok_per_s == {"baseline": 100, "candidate": 200}
    assert point.tok_per_device_s == {"baseline": 50, "candidate": 100}
    assert point.ratio == point.device_ratio == Estimate(point=2, ci95=(2, 2))
    assert point.acceptance is not None
    assert point.acceptance.length == 2.5
    assert point.acceptance.per_position == [1.5]
    assert point.acceptance.ci95 == (2.5, 2.5)
    # A step that brings 2.5 tokens at twice the rate costs 1.25 plain steps.
    assert point.break_even == Estimate(point=1.25, ci95=(1.25, 1.25))
    assert point.price_per_million == {"baseline": 10, "candidate": 5}


@pytest.mark.parametrize(
    ("candidate_s", "verdict"),
    [([0.8] * 4 + [0.9] * 4, PAYS), ([1.1] * 4 + [1.2] * 4, LOSES), ([0.8] * 4 + [1.2] * 4, INCONCLUSIVE)],
)
def test_verdict_is_where_tau_lies_to_the_break_even(candidate_s: list[float], verdict: str) -> None:
    point = summarise_point(make_point(candidate_s), seed=0)
    assert point.break_even is not None
    low, high = point.break_even.ci95
    assert point.verdict == verdict
    assert verdict == (PAYS if high < 2.5 else LOSES if low > 2.5 else INCONCLUSIVE)
    assert point.price_per_million is None


def test_a_point_of_an_adaptive_engine_has_no_break_even() -> None:
    point = summarise_point(make_point([0.5] * 8), seed=0, adaptive=True)
    assert (point.break_even, point.verdict) == (None, PAYS)
    assert point.acceptance is not None
    measured = make_point([0.5] * 8)
    measured.turns["candidate"] = make_turns(100, [1.2] * 7, drafter=True) + make_turns(100, [1.2], 20, 30)
    point = summarise_point(measured, seed=0, adaptive=True)
    assert point.acceptance is not None
    assert (point.acceptance.length, point.acceptance.ci95) == (2.5, (2.5, 2.5)), "of the one round that drafted"
    measured.turns["candidate"] = make_turns(100, [1.2] * 8)
    point = summarise_point(measured, seed=0, adaptive=True)
    assert (point.acceptance, point.break_even, point.verdict) == (None, None, LOSES)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [True, False])
def test_adaptive_engine_may_decide_against_drafts(
    engines: type[RolloutLauncher], run: Callable[..., Answer], tmp_path: Path, draws: None, drafts: bool
) -> None:
    engines.drafts = drafts
    status, result, _ = run("--batch", "1", "--gamma", "adaptive")
    assert status in (0, 1)
    assert (result["adaptive"], result["gamma"]) == (True, 7)
    assert [config.adaptive for config in engines.configs] == [False, True]
    page = (tmp_path / "out" / "rollouts.md").read_text()
    assert "adaptive γ up to 7; groups" in page
    assert "speculation with an adaptive γ" in page
    assert (tmp_path / "out" / "rollouts.png").stat().st_size


def test_device_seconds_below_the_clock_s_resolution_are_left_out() -> None:
    measured = make_point([0.5] * 8)
    turns = measured.turns["candidate"]
    turns[3] = structs.replace(turns[3], device_s=0.0)
    point = summarise_point(measured, seed=0)
    assert point.tok_per_device_s is None
    assert point.device_ratio is None
    assert point.ratio.point == 2


@pytest.mark.slow
def test_groups_go_to_both_arms_in_turn(engines: type[RolloutLauncher], run: Callable[..., Answer]) -> None:
    status, result, output = run("--batch", "1,16", "--price-per-hour", "3.5")
    assert status == 0
    assert [point["batch"] for point in result["points"]] == [1, 16]
    plain, speculating = engines.engines
    assert plain.seen == speculating.seen
    body = speculating.bodies[-1]
    expected = {"n": 8, "temperature": 1.0, "logprobs": 0, "ignore_eos": True, "return_token_ids": True}
    assert expected.items() <= body.items()
    assert [body["n"] for body in plain.bodies] == [1] * (2 + 8) + [8] * 2 * (2 + 8)
    assert len(set(plain.seen[-16:])) == 16, "a prompt is new in its round"
    assert all(config.weight_updates and config.prefix_caching for config in engines.configs)
    for point in result["points"]:
        assert point["tokens"] == 8 * 16 * point["batch"]
        assert point["acceptance"]["length"] == 4
        assert point["acceptance"]["per_position"] == [1, 1, 1, 0, 0, 0, 0]
        assert point["verdict"] == PAYS
        assert 1.8 < point["ratio"]["point"] < 2.2
        assert 1.8 < point["break_even"]["point"] < 2.2
        price = 3.5 / 3600 / point["tok_per_s"]["candidate"] * 1e6
        assert point["price_per_million"]["candidate"] == pytest.approx(price)
    assert "batch 16: speculation pays, as long as τ stays above about " in output
    assert "equal in number and not in content" in output


@pytest.mark.slow
def test_later_versions_are_given_to_both_engines_and_judged(
    engines: type[RolloutLauncher],
    run: Callable[..., Answer],
    versions: Callable[..., list[str]],
    tmp_path: Path,
    draws: None,
) -> None:
    engines.tau = {START: 4, "v1": 2, "v2": 1}
    status, result, output = run("--batch", "8", *versions("v1", "v2"))
    assert status == 1
    assert [(p["version"], p["acceptance"]["length"], p["verdict"]) for p in result["versions"]] == [
        (None, 4, PAYS),
        ("v1", 2, INCONCLUSIVE),
        ("v2", 1, LOSES),
    ]
    update = ["/pause?mode=wait", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
    for engine in engines.engines:
        weights = engine.settings.weights
        assert weights is not None
        assert [call for call in weights.calls if not call.startswith("/reset_prefix_cache")] == 2 * update
        assert (weights.version, weights.loaded[-1]["folder"]) == ("v2", str(tmp_path / "v2"))
    assert "version v1, batch 8: inconclusive: τ 2.00 is within the interval of the break-even" in output
    assert "version v2, batch 8: speculation does not pay: τ 1.00 is below the break-even of" in output
    page = (tmp_path / "out" / "rollouts.md").read_text()
    assert "| v2 | 1.00 | 1.00–1.00 |" in page
    assert "--price-per-hour fills it in" in page
    assert (tmp_path / "out" / "rollouts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_finished_points_are_kept(
    engines: type[RolloutLauncher], run: Callable[..., Answer], versions: Callable[..., list[str]], tmp_path: Path
) -> None:
    engines.tau, engines.die_after = {START: 4, "v1": 3}, 15
    command = ["--batch", "1,8", *versions("v1")]
    status, _, output = run(*command)
    assert status == 2
    assert "got signal 9: out of memory" in output
    engines.die_after = None
    status, result, output = run(*command)
    assert status == 0
    assert "continuing: 2 points are missing" in output
    assert engines.engines[2].bodies[0]["n"] == 8
    again = run(*command, "--price-per-hour", "2")
    assert len(engines.engines) == 4, "everything was there"
    assert [point["ratio"] for point in again[1]["points"]] == [point["ratio"] for point in result["points"]]
    assert "expected the parts of this measurement, got another one's" in run(*command, "--rounds", "9")[2]
    (tmp_path / "v1" / "more.json").write_text("{}")
    status, _, output = run(*command)
    assert status == 2
    assert "expected the version v1 that" in output


def test_ctrl_c_has_its_own_status(
    engines: type[RolloutLauncher], run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupt(*_: Any, **_named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rollouts_runner, "measure_point", interrupt)
    status, _, output = run("--batch", "8")
    assert status == 130
    assert "the same command continues" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "/update_weights",
            'candidate: /update_weights: expected HTTP 200, got HTTP 500: {"error": {"message": "a value',
        ),
        ("deaf", "candidate: expected version v1 after the update, got 'default'"),
        ("foreign", "candidate: expected 128 tokens counted, got 129; does somebody else use this engine?"),
    ],
)
def test_engine_that_does_not_do_as_told_ends_the_run(
    engines: type[RolloutLauncher],
    run: Callable[..., Answer],
    versions: Callable[..., list[str]],
    fault: str,
    message: str,
) -> None:
    engines.tau, engines.fault = {START: 4, "v1": 3}, fault
    status, _, output = run("--batch", "8", *versions("v1"))
    assert status == 2
    assert message in output


def test_server_that_an_earlier_run_left_with_a_version_is_not_the_model() -> None:
    async def look(url: str, versions: list[str]) -> None:
        arm: Any = SimpleNamespace(name="candidate", base_url=url, check=lambda: None)
        async with aiohttp.ClientSession() as session:
            await check_start(session, arm, versions)

    weights = Weights()
    with MockEngine(Settings(weights=weights)) as engine:
        asyncio.run(look(engine.url, ["v1"]))
        weights.version = "v1"
        asyncio.run(look(engine.url, []))
        with pytest.raises(EndpointError, match=r"candidate: expected the model itself, got v1 of --versions; restart"):
            asyncio.run(look(engine.url, ["v0", "v1"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch", "8,12"], "--batch: expected a multiple of the group of 8, or less than it, got 12"),
        (["--version-batch", "9"], "--version-batch: expected a multiple of the group of 8"),
        (["--rounds", "7"], "--rounds: expected at least 8, got 7"),
        (["--temperature", "0"], "greedy decoding: bench/ab.py"),
        (["--price-per-hour", "0"], "--price-per-hour: expected more than 0, got 0"),
        (["--gamma", "9"], "expected 1 to 7 (block 8 of"),
        (["--batch", "32"], "expected 32 of them, 8 rounds of 4, got 20"),
        (["--versions", "nowhere"], "--versions nowhere: expected a checkpoint folder, got none"),
        (["--versions", str(TEACHER), str(TEACHER)], "expected folders of different names, got two"),
        (["--versions", str(TOY)], "expected *.safetensors in it, got none"),
        (["--versions", str(TOY / "dense")], "a version has the model's own architecture"),
        (["--draft", "nowhere"], "expected an existing folder or a hub id"),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(
    engines: type[RolloutLauncher], run: Callable[..., Answer], more: list[str], message: str
) -> None:
    status, _, output = run("--batch", "8", *more)
    assert status == 2
    assert message in output
    assert engines.engines == ()


def perturb(folder: Path, noise: float) -> None:
    """Make every bf16 weight of a checkpoint another one, as training would."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    tensors = {name: item for name, item in json.loads(data[8 : 8 + size]).items() if name != "__metadata__"}
    rng = np.random.default_rng(0)
    for item in tensors.values():
        if item["dtype"] != "BF16":
            continue
        start, end = (8 + size + offset for offset in item["data_offsets"])
        wide = np.frombuffer(bytes(data[start:end]), dtype="<u2").astype("<u4") << 16
        changed = wide.view("<f4") * (1 + noise * rng.standard_normal(len(wide), dtype=np.float32))
        data[start:end] = (changed.view("<u4") >> 16).astype("<u2").tobytes()
    path.write_bytes(data)


@pytest.mark.vllm
def test_real_engines_take_a_later_policy_and_accept_less_of_the_old_drafter(
    tmp_path: Path,
    versions: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollouts_points, "WARMUP_ROUNDS", 1)
    later = versions("later")
    perturb(tmp_path / "later", noise=0.5)
    size = ["--batch", "8", "--rounds", "8", "--max-tokens", "16", "--eager", "--out", str(tmp_path / "out")]
    assert rollouts.main([*PAIR, "--prompts", str(TOY / "prompts.jsonl"), *size, *later]) in (0, 1)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for point in result["versions"]:
        assert point["tokens"] == 8 * 8 * 16
        assert point["acceptance"]["draft_tokens"] == 7 * point["acceptance"]["drafts"]
        assert len(point["acceptance"]["per_position"]) == 7
        assert point["tok_per_device_s"]["candidate"] > 0
        assert 0.3 < point["cached_share"]["baseline"] < 0.9, "most of a group shares its prompt's first block"
    start, changed = (point["acceptance"] for point in result["versions"])
    assert changed["ci95"][1] < start["ci95"][0]


def test_rollouts_from_python(
    engines: type[RolloutLauncher], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{index}():"}) + "\n" for index in range(20)))
    config = RolloutsConfig(
        model=str(TEACHER),
        draft=str(TOY / "dflash"),
        prompts=prompts,
        rounds=8,
        max_tokens=16,
        batch=(8,),
        out=tmp_path / "out",
    )
    result = rollouts.measure_rollouts(config)
    assert [point.batch for point in result.points] == [8]
    assert result.pays
    assert read_result(tmp_path / "out" / "rollouts.json", RolloutsResult) == result
    assert capsys.readouterr().out == ""


def test_points_of_earlier_versions_are_read(tmp_path: Path) -> None:
    counters = {"drafts": 20, "draft_tokens": 140, "accepted_tokens": 30, "accepted_per_position": [20, 10]}
    turn = {"tokens": 100, "wall_s": 1.0, "device_s": 2.0, "moved": counters}
    turns = {"baseline": [turn], "candidate": [turn]}
    point = {"version": None, "fingerprint": "", "batch": 8, "requests": 1, "sequences_per_request": 8, "turns": turns}
    (tmp_path / "batch8.json").write_text(json.dumps(point))
    delta = read_result(tmp_path / "batch8.json", MeasuredPoint).turns["candidate"][0].delta
    assert (delta.drafts, delta.accepted_per_position) == (20, (20, 10))
