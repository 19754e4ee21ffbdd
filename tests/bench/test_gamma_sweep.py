"""The sweep on stand-ins for the engines: resume, failures, what is stored and found again; and once for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ab_harness import StandInEngine, stand_ins
from fake_engine import Behaviour

from laguna_serve.bench import gamma_plot, gamma_sweep
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.cli import build_parser
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.gamma_store import Advice, find_advice, store_advice
from laguna_serve.serving.serve import read_config

TOY = Path(__file__).resolve().parents[1] / "toy"
PAIR = ["--model", str(TOY / "teacher"), "--draft", str(TOY / "dflash")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return result


def test_sweep_measures_chooses_and_stores(
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_picture: None,
) -> None:
    slow, quick = Behaviour(delay_s=0.004), Behaviour(delay_s=0.004, gamma=3, chunk_tokens=3)
    with stand_ins(monkeypatch, slow, quick) as made:
        assert gamma_sweep.main(flags(prompts_file, tmp_path, "--gammas", "3,1")) == 0
        assert [config.gamma for config in made.configs] == [None, 1, 3]
        result = last_line(capsys)
        assert result["points"] == 2
        assert result["choices"][0]["gamma"] in (1, 3)
        stored = json.loads((tmp_path / "out" / "sweep.json").read_text())
        assert {point["gamma"] for point in stored["points"]} == {1, 3}
        assert all(point["speedup"] > 1.5 for point in stored["points"])
        assert "| 1 | 3 |" in (tmp_path / "out" / "sweep.md").read_text()
        # Everything is there: no engine is started again.
        assert gamma_sweep.main(flags(prompts_file, tmp_path, "--gammas", "3,1")) == 0
        assert made.started == 3
        # One more γ: the baseline and that one.
        assert gamma_sweep.main(flags(prompts_file, tmp_path, "--gammas", "1,2,3")) == 0
        assert [config.gamma for config in made.configs[3:]] == [None, 2]
    advice = find_advice(str(TOY / "teacher"), str(TOY / "dflash"))
    assert advice.gamma in (1, 2, 3)
    assert advice.schedule[0][:2] == (1, 1)


def test_failing_gamma_does_not_lose_the_others(
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_picture: None,
) -> None:
    with stand_ins(monkeypatch, Behaviour(delay_s=0.002), Behaviour(gamma=3, chunk_tokens=2)) as made:
        enter = made.__enter__

        def fail_for_two(engine: StandInEngine) -> StandInEngine:
            if made.configs[-1].gamma == 2:
                raise EngineError("engine fake: no memory for two")
            return enter(engine)

        monkeypatch.setattr(made, "__enter__", fail_for_two)
        assert gamma_sweep.main(flags(prompts_file, tmp_path, "--gammas", "1,2,3")) == 1
    result = last_line(capsys)
    assert result["failed"] == {"2": "engine fake: no memory for two"}
    assert result["points"] == 2


def test_other_sweep_is_not_continued(
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_picture: None,
) -> None:
    with stand_ins(monkeypatch, Behaviour(delay_s=0.002), Behaviour(gamma=3, chunk_tokens=2)):
        assert gamma_sweep.main(flags(prompts_file, tmp_path, "--gammas", "3")) == 0
        capsys.readouterr()
        assert gamma_sweep.main(flags(prompts_file, tmp_path, "--gammas", "3", "--seed", "1")) == 2
    assert "got another one's; choose another --out or remove it" in capsys.readouterr().err


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
        (["--concurrency", "2"], "--num-prompts: expected at least 16, 8 rounds of 2, got 9"),
    ],
)
def test_bad_flags_are_refused(
    prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gamma_sweep.main(flags(prompts_file, tmp_path, *more))
    assert message in capsys.readouterr().err


def serve_config(*more: str) -> EngineConfig:
    args = build_parser().parse_args(["serve", str(TOY / "teacher"), *more])
    args.extra_args = []
    return read_config(args)


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


def test_picture_is_drawn(tmp_path: Path) -> None:
    points = [
        {"gamma": g, "concurrency": 1, "speedup": 1 + g / 10, "ci95": [1.0, 1.9], "predicted": 1.2} for g in (1, 3, 7)
    ]
    environment = {"cpu": "c", "date": "2026-01-01"}
    work = {"num_prompts": 8, "max_tokens": 16}
    choices = [{"concurrency": 1, "gamma": 7, "reason": ""}]
    result = {"points": points, "environment": environment, "workload": work, "choices": choices}
    gamma_plot.draw(result, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
