"""bench/acceptance: its table says what its file does, differing answers included."""

from __future__ import annotations

from laguna_serve.bench.acceptance.__main__ import render_markdown, tabulate
from laguna_serve.bench.acceptance.result import AcceptanceCurve, Curve, CurvePoint
from laguna_serve.serving.kit.environment import read_environment


def make_point(differing: int | None) -> CurvePoint:
    positions = {"tau": 1.5, "per_position": [0.5], "speedup": 1.1, "ci95": (1.0, 1.2)}
    return CurvePoint(gamma=1, prompts=8, differing=differing, beyond_block=False, **positions)


def test_table_shows_answers_that_differ() -> None:
    result = AcceptanceCurve(
        environment=read_environment(["bench/acceptance"]),
        model="m",
        draft="d",
        prompts_file="prompts.jsonl",
        prompts_sha256="0",
        num_prompts=8,
        max_tokens=24,
        dtype="bfloat16",
        curves=[Curve(thinking="on", points=[make_point(2), make_point(None)])],
    )
    assert [row[-1] for row in tabulate(result).rows] == ["2 of 8", "–"]
    assert "| on | 1 | 1.50 | 50% | 1.10× | 2 of 8 |" in render_markdown(result)
