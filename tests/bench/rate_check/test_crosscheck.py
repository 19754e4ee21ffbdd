"""bench/crosscheck.py, with a mock of vLLM's benchmark that gives the rates of its script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mock_engine import MockEngine, Settings

from laguna_serve.bench import crosscheck
from laguna_serve.bench.rate_check import clients

# Takes the flags that vLLM's benchmark is given, and writes the fields of its result that are read.
MOCK_BENCH = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
count, tokens = int(flags["--num-prompts"]), int(flags["--custom-output-len"])
assert len(open(flags["--dataset-path"]).readlines()) == count
assert flags["--served-model-name"] == "fake"
assert "--ignore-eos" in sys.argv and "--disable-shuffle" in sys.argv and flags["--temperature"] == "0"
assert {"--top-p", "--top-k", "--min-p", "--repetition-penalty"} < flags.keys()
found = {"completed": count - LOST, "total_output_tokens": (count - LOST) * tokens, "output_throughput": RATE}
(pathlib.Path(flags["--result-dir"]) / flags["--result-filename"]).write_text(json.dumps(found))
"""


def check(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rate: float,
    *,
    lost: int = 0,
    hits: int = 0,
    crash: bool = False,
    repeats: str = "1",
) -> int:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(6)))
    program = "raise SystemExit('no such flag')" if crash else MOCK_BENCH
    monkeypatch.setattr(clients, "VLLM_BENCH", program.replace("RATE", str(rate)).replace("LOST", str(lost)))
    with MockEngine(Settings(delay_s=0.002, prefix_hits=hits)) as engine:
        flags = [
            "--url",
            engine.url,
            "--model",
            "org/m",
            "--prompts",
            str(prompts),
            "--max-tokens",
            "8",
            "--repeats",
            repeats,
        ]
        return crosscheck.main([*flags, "--out", str(tmp_path / "found.json")])


def test_agreement_holds_and_disagreement_falls_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(monkeypatch, tmp_path, 1e6) == 1
    assert "OUTSIDE the mark" in capsys.readouterr().out
    monkeypatch.setattr(crosscheck, "MARK", 1e9)
    assert check(monkeypatch, tmp_path, 1.0) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last == json.loads((tmp_path / "found.json").read_text())
    assert last["ratio"] == pytest.approx(last["tok_per_s"]["ours"][0])


@pytest.mark.parametrize(
    ("lost", "hits", "crash", "message"),
    [
        (1, 0, False, "expected 6 requests and 48 tokens, got 5 and 40"),
        (0, 3, False, "prefix caching off"),
        (0, 0, True, "expected exit status 0, got 1: no such flag"),
    ],
    ids=["lost-request", "prefix-hits", "crash"],
)
def test_an_unfair_comparison_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lost: int,
    hits: int,
    crash: bool,
    message: str,
) -> None:
    assert check(monkeypatch, tmp_path, 100.0, lost=lost, hits=hits, crash=crash) == 2
    assert message in capsys.readouterr().err


def test_hits_end_it_in_the_first_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(monkeypatch, tmp_path, 100.0, hits=3, repeats="5") == 2
    said = capsys.readouterr().err
    assert "laguna serve MODEL --no-prefix-caching" in said
    assert "round 1 of 5" in said
    assert "round 2 of 5" not in said


def test_crosscheck_from_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(6)))
    monkeypatch.setattr(clients, "VLLM_BENCH", MOCK_BENCH.replace("RATE", "1e6").replace("LOST", "0"))
    with MockEngine(Settings(delay_s=0.002)) as engine:
        result = crosscheck.crosscheck(
            crosscheck.CrosscheckConfig(url=engine.url, model="org/m", prompts=prompts, max_tokens=8, repeats=2)
        )
    assert (result.held, len(result.tok_per_s["ours"]), result.tok_per_s["vllm_bench"]) == (False, 2, [1e6, 1e6])
    assert capsys.readouterr().out == ""


def test_file_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "p"}\n')
    with MockEngine() as engine:
        flags = ["--url", engine.url, "--model", "org/m", "--prompts", str(prompts)]
        for out in (tmp_path, prompts / "found.json"):
            assert crosscheck.main([*flags, "--out", str(out)]) == 2
            assert f"crosscheck.py: error: --out {out if out == tmp_path else prompts}: " in capsys.readouterr().err
        assert engine.bodies == []


def test_model_that_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was vLLM's word on a name of the hub, after the first round."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "p"}\n')
    with MockEngine() as engine:
        flags = ["--url", engine.url, "--model", str(tmp_path / "nowhere"), "--prompts", str(prompts)]
        assert crosscheck.main(flags) == 2
        assert engine.bodies == []
    assert "nowhere: expected an existing folder or a hub id" in capsys.readouterr().err
