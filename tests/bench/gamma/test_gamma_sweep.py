"""The sweep on mock engines: resume, failures, what is stored and found again; and once for real."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ab_harness import PROMPTS, MockLauncher, mock_launchers
from mock_engine import Clock, Settings
from msgspec import structs

from laguna_serve.bench import gamma_sweep
from laguna_serve.bench.gamma import plot as gamma_plot
from laguna_serve.bench.gamma import points
from laguna_serve.bench.gamma.mixed_load import compare_schedule, find_best_single, make_mixed_plan
from laguna_serve.bench.gamma.options import SweepConfig, parse_ablation
from laguna_serve.bench.gamma.points import read_points
from laguna_serve.bench.gamma.report import render_text
from laguna_serve.bench.gamma.result import PointFigures, SweepResult
from laguna_serve.bench.harness.prompts import load_prompts
from laguna_serve.bench.harness.run import MeasurementStoppedError
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.client.completions import Client
from laguna_serve.serving.client.records import Prompt, Record
from laguna_serve.serving.commands.serve import ServeConfig, engine_config
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.kit.flags import FlagError, read_flags
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import ResultError, read_result
from laguna_serve.serving.speculation.gamma_store import Advice, find_advice, store_advice

TOY = Path(__file__).resolve().parents[2] / "toy"
COMMITTED = Path(__file__).resolve().parents[3] / "bench" / "results" / "toy-gamma-sweep" / "sweep.json"
PAIR = ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash")]


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gamma_plot, "draw", lambda _result, path: path.write_bytes(b""))


def flags(prompts_file: Path, tmp_path: Path, *more: str) -> list[str]:
    common = [
        "--prompts",
        str(prompts_file),
        "--num-prompts",
        "9",
        "--max-tokens",
        "12",
        "--out",
        str(tmp_path / "out"),
    ]
    return [*PAIR, *common, *more]


@dataclass
class SweepRun:
    """`gamma_sweep.py` on mock engines that take as long for every step, by the clock; no picture is drawn."""

    clock: Clock
    prompts_file: Path
    folder: Path
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    @contextmanager
    def engines(self, chunk_tokens: int = 3) -> Iterator[type[MockLauncher]]:
        """A plain engine, and one that emits so many tokens a step."""
        with mock_launchers(
            self.patch, timed(self.clock), timed(self.clock, gamma=3, chunk_tokens=chunk_tokens)
        ) as made:
            yield made

    def start(self, *more: str) -> int:
        """Run the command; its exit status."""
        return gamma_sweep.main(flags(self.prompts_file, self.folder, *more))

    def read_page(self) -> str:
        """The page that it wrote."""
        return (self.folder / "out" / "sweep.md").read_text()


@pytest.fixture
def run(
    clock: Clock,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_picture: None,
) -> SweepRun:
    return SweepRun(clock, prompts_file, tmp_path, monkeypatch, capsys)


def two_loads(run: SweepRun) -> list[str]:
    """Flags for one and two requests at once, and a file of as many prompts as their intervals need."""
    run.prompts_file.write_text(
        "".join(json.dumps({"prompt": f"{text} {i}"}) + "\n" for i in (1, 2) for text in PROMPTS)
    )
    return ["--num-prompts", "16", "--concurrency", "1,2"]


def read(*argv: str) -> SweepConfig:
    return read_flags(SweepConfig, argv, prog="gamma_sweep.py", description=None)


def timed(clock: Clock, **more: Any) -> Settings:
    """Every step takes as long, by the clock."""
    return Settings(clock=clock, delay_s=0.002, **more)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return result


@pytest.mark.slow
def test_sweep_measures_chooses_and_stores(run: SweepRun) -> None:
    with run.engines() as made:
        assert run.start("--gammas", "3,1") == 0
        assert [config.gamma for config in made.configs] == [None, 1, 3]
        result = last_line(run.capsys)
        assert result["points"] == 2
        assert result["choices"][0]["gamma"] in (1, 3)
        stored = json.loads((run.folder / "out" / "sweep.json").read_text())
        assert {point["gamma"] for point in stored["points"]} == {1, 3}
        assert all(point["speedup"] == pytest.approx(3) for point in stored["points"])
        assert "| 1 | 3 |" in run.read_page()
        # Everything is there: no engine is started again.
        assert run.start("--gammas", "3,1") == 0
        assert made.started == 3
        # One more γ: the baseline and that one.
        assert run.start("--gammas", "1,2,3") == 0
        assert [config.gamma for config in made.configs[3:]] == [None, 2]
    advice = find_advice(str(TOY / "teacher"), str(TOY / "dflash"))
    assert advice.gamma in (1, 2, 3)
    assert advice.schedule[0][:2] == (1, 1)


@pytest.mark.slow
def test_adaptive_engine_is_held_against_plain_decoding_and_the_best_fixed_gamma(run: SweepRun) -> None:
    with run.engines() as made:
        assert run.start("--gammas", "1,3", "--adaptive") == 0
        assert [(config.gamma, config.adaptive) for config in made.configs] == [
            *[(None, False), (1, False), (3, False)],
            *[(None, False), (7, True)],
        ]
        run.capsys.readouterr()
        assert run.start("--gammas", "1,3", "--adaptive") == 0
        assert made.started == 5, "what was measured is kept"
    (point,) = last_line(run.capsys)["adaptive"]
    assert point["concurrency"] == 1
    assert point["best"] in (1, 3)
    assert point["speedup"] == pytest.approx(3)
    assert point["against_best"] == pytest.approx(1)
    assert "## γ decided in every step" in run.read_page()


def test_sampled_answers_are_not_compared_and_store_no_schedule(run: SweepRun) -> None:
    with run.engines() as made:
        start = made.__init__

        def differ(engine: MockLauncher, config: EngineConfig, **named: Any) -> None:
            start(engine, config, **named)
            if config.draft is not None:
                engine._fake.settings = replace(engine._fake.settings, flips={PROMPTS[4]: 3})

        run.patch.setattr(made, "__init__", differ)
        assert run.start("--gammas", "3", "--temperature", "1") == 0
    result = last_line(run.capsys)
    assert result["workload"]["temperature"] == 1
    assert result["stored"] is None
    assert "at temperature 1, drafts greedy. Each point" in run.read_page()
    assert any(line.endswith("| – |") for line in run.read_page().splitlines())


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--temperature", "1", "--stack", "fp8-kv"], "--stack: expected greedy answers"),
        (["--temperature", "3"], "--temperature: expected at most 2, got 3"),
        (["--draft-sampling", "probabilistic"], "--draft-sampling probabilistic: expected --temperature beside it"),
        (
            ["--adaptive", "--baseline-url", "http://127.0.0.1:1", "--candidate-url", "7=http://127.0.0.1:2"],
            "and --beyond-block: expected none with URLs",
        ),
        (
            [
                *("--baseline-url", "http://127.0.0.1:1", "--candidate-url", "7=http://127.0.0.1:2"),
                *("--temperature", "1", "--draft-sampling", "probabilistic"),
            ],
            "--draft-sampling probabilistic: expected none with URLs",
        ),
        (["--engine-args", "--cache 'dual"], "--engine-args: expected flags as in a shell, got no closing quotation"),
    ],
)
def test_what_does_not_go_with_a_temperature_or_urls(run: SweepRun, more: list[str], complaint: str) -> None:
    with pytest.raises(SystemExit):
        run.start(*more)
    assert complaint in run.capsys.readouterr().err


@pytest.mark.slow
def test_failing_gamma_does_not_lose_the_others(run: SweepRun) -> None:
    with run.engines(chunk_tokens=2) as made:
        enter = made.__enter__

        def fail_for_two(engine: MockLauncher) -> MockLauncher:
            if made.configs[-1].gamma == 2:
                raise EngineError("engine fake: no memory for two")
            return enter(engine)

        run.patch.setattr(made, "__enter__", fail_for_two)
        assert run.start("--gammas", "1,2,3") == 1
    result = last_line(run.capsys)
    assert result["failed"] == {"2": "engine fake: no memory for two"}
    assert result["points"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("order", ["--no-sequential", "--sequential"])
def test_a_failed_request_beside_the_ab_does_not_lose_it(run: SweepRun, order: str) -> None:
    """Rows are timed after the A/B, by a round of as many prompts: here γ + 1 = 4."""
    run_round = Client.run_round

    async def fail_one(client: Client, prompts: Sequence[Prompt], *more: Any, **named: Any) -> list[Record]:
        records = await run_round(client, prompts, *more, **named)
        if len(prompts) == 4:
            records[1] = Record(prompts[1].id, 0, 1, error="HTTP 500: out of luck")
        return records

    run.patch.setattr(Client, "run_round", fail_one)
    with run.engines():
        assert run.start("--gammas", "3", order) == 0
    (point,) = read_points(run.folder / "out" / "points")
    assert (point.speedup, point.draft_share) == (pytest.approx(3), None)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["--no-sequential", "--sequential"])
def test_adaptive_point_that_fails_does_not_lose_the_others(run: SweepRun, order: str) -> None:
    describe = points.describe_point

    def fail_at_two(config: SweepConfig, gamma: int, concurrency: int, *more: Any) -> Any:
        if (gamma, concurrency) == (7, 2):
            raise MeasurementStoppedError("adaptive: withheld")
        return describe(config, gamma, concurrency, *more)

    run.patch.setattr(points, "describe_point", fail_at_two)
    with run.engines():
        assert run.start("--gammas", "3", *two_loads(run), "--adaptive", order) == 1
    result = last_line(run.capsys)
    assert [point["concurrency"] for point in result["adaptive"]] == [1]
    assert result["failed"] == {"adaptive": "adaptive: withheld"}
    assert "γ adaptive failed: adaptive: withheld" in run.read_page()


@pytest.mark.slow
def test_sweep_of_fewer_loads_shows_no_others(run: SweepRun) -> None:
    """Other points in the folder were in its table, its picture and its schedule."""
    with run.engines():
        assert run.start("--gammas", "3", *two_loads(run)) == 0
        assert last_line(run.capsys)["points"] == 2
        assert run.start("--gammas", "3", *two_loads(run), "--concurrency", "2") == 0
    result = last_line(run.capsys)
    assert [choice["concurrency"] for choice in result["choices"]] == [2]
    assert result["points"] == 1


def test_other_sweep_is_not_continued(run: SweepRun) -> None:
    with run.engines(chunk_tokens=2):
        assert run.start("--gammas", "3") == 0
        run.capsys.readouterr()
        assert run.start("--gammas", "3", "--seed", "1") == 2
    assert "got another one's; choose another --out or remove it" in run.capsys.readouterr().err


def test_points_of_another_cache_or_machine_are_not_continued(run: SweepRun, arithmetic: dict[str, str]) -> None:
    """One table, and one γ*, would be of two settings."""
    with run.engines(chunk_tokens=2) as made:
        assert run.start("--gammas", "3") == 0
        started = made.started
        assert run.start("--gammas", "1,3", "--kv-cache-gib", "1") == 2
        with run.patch.context() as patch:
            patch.setenv("LAGUNA_CPU_KERNELS", "off")
            assert run.start("--gammas", "1,3") == 2
        arithmetic["sentinel op"] = "avx2, sources 02"
        assert run.start("--gammas", "1,3") == 2
        assert made.started == started
    assert run.capsys.readouterr().err.count("got another one's; choose another --out or remove it") == 3


def test_drafter_that_was_trained_anew_is_measured_anew(run: SweepRun, tmp_path: Path) -> None:
    """Its points were those of the drafter that lay there before, under the same path."""
    drafter = Path(shutil.copytree(TOY / "dflash", tmp_path / "drafter"))
    with run.engines(chunk_tokens=2):
        assert run.start("--gammas", "3", "--draft", str(drafter)) == 0
        weights = next(drafter.glob("*.safetensors"))
        os.utime(weights, (1, 1))
        run.capsys.readouterr()
        assert run.start("--gammas", "3", "--draft", str(drafter)) == 2
    assert "got another one's; choose another --out or remove it" in run.capsys.readouterr().err


def test_ablation_of_a_checkpoint_that_is_written_anew_has_other_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = parse_ablation(f"dense={tmp_path}").file_name
    assert parse_ablation(f"dense={tmp_path}").file_name == before
    (tmp_path / "config.json").write_text("{ }")
    assert parse_ablation(f"dense={tmp_path}").file_name != before
    assert parse_ablation("fp8-kv").file_name == "fp8-kv"


@pytest.mark.slow
def test_ablations_are_held_against_their_own_plain_decoding_and_the_plain_target(run: SweepRun) -> None:
    more = ["--gammas", "3", "--stack", "fp8-kv", "prefix-caching", f"dense={TOY / 'dense'}", "chunked-prefill"]
    with run.engines() as made:
        start = made.__init__

        def behave(engine: MockLauncher, config: EngineConfig, **named: Any) -> None:
            if "fp8" in config.extra_args:
                raise EngineError("engine fake: no fp8 here")
            start(engine, config, **named)
            if "dense" in config.model:  # another model: other tokens and another loss, with and without a drafter
                engine._fake.settings = replace(engine._fake.settings, flips={PROMPTS[4]: 3}, loss=2.6)

        run.patch.setattr(made, "__init__", behave)
        assert run.start(*more) == 1
        ablations = {item["lever"]: item for item in last_line(run.capsys)["stack"]}
        assert ablations["fp8-kv"]["failed"] == "engine fake: no fp8 here"
        assert ablations["prefix-caching"]["speedup"] == pytest.approx(3)
        assert ablations["prefix-caching"]["differ_from_plain_target"] == 0
        assert ablations["prefix-caching"]["loss_change"] == 0
        assert ablations["dense"]["parity"]["mismatches"] == 0
        assert ablations["dense"]["differ_from_plain_target"] == 1
        assert ablations["dense"]["loss_change"] == pytest.approx(0.1)
        page = run.read_page()
        assert "| fp8-kv | 3 | failed |" in page
        assert "ablation fp8-kv failed: engine fake: no fp8 here" in page
        # What was measured is kept; the one that failed is tried again.
        started = made.started
        assert run.start(*more) == 1
        assert made.started == started  # it fails before it starts


def test_schedule_is_held_against_the_best_single_gamma(run: SweepRun) -> None:
    with run.engines():
        assert run.start("--gammas", "1,3", "--mixed") == 0
    mixed = last_line(run.capsys)["mixed"]
    assert mixed["skipped"] == "the schedule is a single γ"
    assert "mixed load: not measured" in run.read_page()


def test_schedule_is_measured_under_changing_load(
    clock: Clock, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--gammas", "3", "--num-prompts", "14", "--max-tokens", "12", "--out", str(tmp_path)]
    config = replace(read(*PAIR, "--prompts", str(prompts_file), *more, "--num-prompts", "16"), concurrency=(1, 2))
    (tmp_path / "points").mkdir()
    behaviour = timed(clock, gamma=3, chunk_tokens=3)
    with mock_launchers(monkeypatch, behaviour, behaviour) as made:
        prompts, schedule = load_prompts(prompts_file), [(1, 1, 3), (2, 2, 0)]
        mixed = compare_schedule(config, 3, schedule, prompts, Progress(quiet=True))
        assert [config.gamma_schedule for config in made.configs] == [None, ((1, 1, 3), (2, 2, 0))]
        assert [config.gamma for config in made.configs] == [3, 3]
        assert compare_schedule(config, 3, schedule, prompts, Progress(quiet=True)) == mixed
        assert made.started == 2, "what was measured is kept"
    assert (mixed.single, mixed.rounds) == (3, 9)
    assert mixed.ci95
    assert mixed.speedup is not None
    assert mixed.speedup == pytest.approx(1)
    assert mixed.ci95 == pytest.approx((1, 1))


def test_best_single_gamma_needs_the_least_time_over_all_loads() -> None:
    measured = read_result(COMMITTED, SweepResult).points[0]

    def point(gamma: int, concurrency: int, plain: float, rate: float) -> PointFigures:
        rates = {"baseline": plain, "candidate": rate}
        return structs.replace(measured, gamma=gamma, concurrency=concurrency, tok_per_s=rates)

    points = [point(7, 1, 100, 200), point(7, 8, 400, 300), point(3, 1, 100, 150), point(3, 8, 400, 420)]
    # Seconds for a token and eight: γ 7: 1/200 + 8/300, γ 3: 1/150 + 8/420, none: 1/100 + 8/400.
    assert find_best_single(points) == 3
    assert find_best_single([*points, point(5, 1, 100, 900)]) == 3  # not measured at 8
    assert find_best_single([point(7, 1, 100, 80)]) == 0


def test_mixed_rounds_interleave_every_concurrency() -> None:
    prompts = [Prompt(str(i), f"text {i}") for i in range(40)]
    config = read(*PAIR, "--prompts", "p", "--out", "o", "--concurrency", "1,4", "--max-tokens", "8")
    plan = make_mixed_plan(config, prompts)
    assert [len(r) for r in plan.rounds] == [1, 4] * 8
    assert len(plan.orders) == 16
    assert plan.concurrency == 4
    assert {1, 4} <= {len(r) for r in plan.warmup}, "no timed round is the first of its size"
    for size in (1, 4):
        first = [order[0] for order, r in zip(plan.orders, plan.rounds, strict=True) if len(r) == size]
        assert sorted(first) == ["baseline"] * 4 + ["candidate"] * 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gammas", "9"], "--gammas: expected at most 7, the drafter's block − 1, got 9"),
        (["--draft", "nowhere"], "expected an existing folder or a hub id"),
    ],
)
def test_bad_input_is_one_line(
    prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert gamma_sweep.main(flags(prompts_file, tmp_path, *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gammas", "1,x"], "expected positive numbers like 1,3,7, got '1,x'"),
        (["--stack", "fp9"], "expected fp8-kv, prefix-caching, chunked-prefill, pruned=CHECKPOINT"),
        (["--stack", "dense"], "or dense=CHECKPOINT, got 'dense'"),
        (["--concurrency", "2"], "--num-prompts: expected at least 16, 8 rounds of 2, got 9"),
    ],
)
def test_bad_flags_are_refused(
    prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gamma_sweep.main(flags(prompts_file, tmp_path, *more))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("more", "gammas"), [([], [1, 2, 3, 4, 5, 6, 7]), (["--quick"], [1, 4, 7])])
def test_gammas_by_default(more: list[str], gammas: list[int]) -> None:
    assert read(*PAIR, "--prompts", "p", "--out", "o", *more).list_gammas() == gammas


def serve_config(*more: str) -> EngineConfig:
    config = read_flags(ServeConfig, [str(TOY / "teacher"), *more], prog="laguna serve", description=None)
    return engine_config(config)


def test_auto_gamma_is_what_was_stored(capsys: pytest.CaptureFixture[str]) -> None:
    store_advice(Advice(str(TOY / "teacher"), str(TOY / "dflash"), ((1, 1, 7), (2, 8, 0)), "2026-01-01"))
    config = serve_config("--draft", str(TOY / "dflash"), "--gamma", "auto")
    assert (config.gamma, config.gamma_schedule) == (7, ((1, 1, 7), (2, 8, 0)))
    assert "γ 7, by the sweep of 2026-01-01" in capsys.readouterr().err


def test_auto_gamma_may_be_none_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    store_advice(Advice(str(TOY / "teacher"), str(TOY / "dflash"), ((1, 8, 0),), "2026-01-01"))
    config = serve_config("--draft", str(TOY / "dflash"), "--gamma", "auto")
    assert (config.draft, config.gamma) == (None, None)
    assert "plain decoding is fastest here" in capsys.readouterr().err


def test_auto_gamma_without_a_sweep_says_how_to_get_one(cache: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected a sweep of this model.*run `python bench/gamma_sweep.py --model"
    ):
        serve_config("--draft", str(TOY / "dflash"), "--gamma", "auto")
    with pytest.raises(CheckpointError, match="expected --draft beside it"):
        serve_config("--gamma", "auto")
    path = store_advice(Advice(str(TOY / "teacher"), str(TOY / "dflash"), ((1, 8, 3),), "2026-01-01"))
    path.write_text("{")
    with pytest.raises(CheckpointError, match="expected a sweep's schedule"):
        serve_config("--draft", str(TOY / "dflash"), "--gamma", "auto")


def test_cost_that_falls_with_gamma_is_written_with_one_sign() -> None:
    result = read_result(COMMITTED, SweepResult)
    falling = {key: structs.replace(cost, fixed=2.81, per_token=-0.353) for key, cost in result.cost.items()}
    assert "costs 3.81 − 0.353·γ plain steps" in render_text(structs.replace(result, cost=falling))


def test_picture_is_drawn(tmp_path: Path) -> None:
    gamma_plot.draw(read_result(COMMITTED, SweepResult), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_sweep_from_python(run: SweepRun) -> None:
    config = SweepConfig(
        model=str(TOY / "teacher"),
        draft=str(TOY / "dflash"),
        prompts=run.prompts_file,
        num_prompts=9,
        max_tokens=12,
        gammas=(3,),
        out=run.folder / "out",
    )
    with run.engines():
        result = gamma_sweep.sweep(config)
    assert result.held
    assert [point.gamma for point in result.points] == [3]
    assert read_result(run.folder / "out" / "sweep.json", SweepResult) == result
    assert run.capsys.readouterr().out == ""
    with pytest.raises(FlagError, match="--num-prompts: expected at least 16, 8 rounds of 2, got 9"):
        replace(config, concurrency=(2,))


def test_sweep_is_reported_though_its_ablations_could_not_be_made(run: SweepRun) -> None:
    def fail(*_: Any) -> None:
        raise EngineError("engine fake: gone")

    run.patch.setattr(gamma_sweep, "measure_ablations", fail)
    with run.engines():
        assert run.start("--gammas", "3", "--stack", "fp8-kv") == 2
    captured = run.capsys.readouterr()
    assert json.loads(captured.out.strip().splitlines()[-1])["points"] == 1
    assert "engine fake: gone" in captured.err


def test_points_of_earlier_versions_are_continued(tmp_path: Path) -> None:
    point = json.loads(COMMITTED.read_text())["points"][0]
    del point["predicted"]
    (tmp_path / "gamma1-c1.json").write_text(json.dumps(point | {"pairs": [[96, 0.3, 96, 0.25]] * 8}))
    (measured,) = read_points(tmp_path)
    assert (measured.speedup, measured.pairs[0].speedup) == (point["speedup"], pytest.approx(1.2))
    (tmp_path / "gamma2-c1.json").write_text("{")
    with pytest.raises(ResultError, match=r"gamma2-c1\.json: expected a MeasuredPoint result"):
        read_points(tmp_path)
