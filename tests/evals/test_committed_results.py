"""Every result of an evaluation that lies in bench/results is read by its type, and nothing of it is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from laguna_serve.evals.codegen.canonical import CanonicalResult
from laguna_serve.evals.codegen.result import CodeTasksResult
from laguna_serve.evals.equivalence.result import InvarianceResult
from laguna_serve.evals.harnesses.code_suites import SamplesResult
from laguna_serve.evals.harnesses.table import SuitesResult
from laguna_serve.evals.perplexity.loss_report import LossResult
from laguna_serve.evals.perplexity.pruning_report import PruningResult
from laguna_serve.serving.kit.results import read_result, to_json

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
KINDS: tuple[type[msgspec.Struct], ...] = (
    *(CanonicalResult, CodeTasksResult, InvarianceResult, LossResult, PruningResult, SamplesResult, SuitesResult),
)
BY_SCHEMA = {str(kind.__struct_config__.tag): kind for kind in KINDS}
# Of the sandbox's limits, before there were several kinds of walls.
FORMER = {"namespaces"}


def find_files() -> dict[Path, str]:
    found = {}
    for path in sorted(RESULTS.rglob("*.json")):
        body = json.loads(path.read_bytes())
        schema = body.get("schema", "") if isinstance(body, dict) else ""
        if schema in BY_SCHEMA:
            found[path] = schema
    return found


FILES = find_files()


def list_lost(before: Any, after: Any, where: str = "$") -> list[str]:
    """Where a file's values are not those that its type writes."""
    if isinstance(before, dict) and isinstance(after, dict):
        kept = [(name, value) for name, value in before.items() if name not in FORMER]
        return [lost for name, value in kept for lost in list_lost(value, after.get(name), f"{where}.{name}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [lost for pair in zip(before, after, strict=True) for lost in list_lost(*pair, f"{where}[]")]
    return [] if before == after else [f"{where}: {before!r} → {after!r}"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_committed_result_is_of_its_type(path: Path) -> None:
    before = json.loads(path.read_bytes())
    after = json.loads(json.dumps(to_json(read_result(path, BY_SCHEMA[FILES[path]]))))
    assert list_lost(before, after) == []
    assert next(iter(after)) == "schema"
    # In the published order, of the keys that were there then.
    assert [name for name in after if name in before] == list(before)


def test_there_are_files_of_most_schemas() -> None:
    assert set(BY_SCHEMA) - set(FILES.values()) == {"laguna_serve.suite_samples/1"}
