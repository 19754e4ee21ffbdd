"""A request at the length limit: what it does to the others' drafts in stock vLLM, and in ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from probes import run_probe

pytestmark = pytest.mark.vllm
TOY = Path(__file__).resolve().parent.parent / "toy"


def run(worker: str) -> dict[str, Any]:
    report: dict[str, Any] = run_probe("limit_probe.py", str(TOY), worker)
    assert report["alone"]["tokens"] == report["beside"]["tokens"] == report["afterwards"]["tokens"]
    return report


def test_stock_worker_loses_the_context_of_other_requests() -> None:
    """When this fails, vLLM's V1 runner drafts on: retire plugins/worker.py."""
    report = run("auto")
    assert report["alone"]["length"] > 2.5
    assert report["beside"]["length"] < 0.7 * report["alone"]["length"]
    assert report["afterwards"]["length"] < 0.8 * report["alone"]["length"], "the prefix cache keeps what was lost"


def test_our_worker_drafts_on() -> None:
    report = run("laguna_serve.plugins.worker.CPUWorker")
    assert report["beside"]["length"] > 0.85 * report["alone"]["length"]
    assert report["afterwards"]["length"] == pytest.approx(report["alone"]["length"], rel=1e-6)
