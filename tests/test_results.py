"""Every result file in the repository is what its type says: read through it, written back, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from laguna_serve.bench.certificate.result import Certificate
from laguna_serve.bench.cluster.result import ClusterResult
from laguna_serve.bench.diffusion.result import DiffusionResult
from laguna_serve.bench.fuzzing.result import FuzzResult
from laguna_serve.bench.gamma.result import SweepResult
from laguna_serve.bench.harness.result import AbResult
from laguna_serve.bench.linear.result import LinearResult
from laguna_serve.bench.moe_layer.result import MoeResult
from laguna_serve.bench.prefix.result import PrefixCacheResult
from laguna_serve.bench.rate_check.result import CrosscheckResult
from laguna_serve.bench.relay.result import GatewayBenchResult, SoakResult
from laguna_serve.bench.rollout.result import RolloutsResult
from laguna_serve.bench.routing.result import RoutingResult
from laguna_serve.bench.sampled.result import SamplingResult
from laguna_serve.bench.swap.result import SwapResult
from laguna_serve.evals.distance.result import ReferencesResult
from laguna_serve.scripts.release_matrix import ReleaseMatrix
from laguna_serve.serving.kit.results import ResultError, read_result, to_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SCHEMAS = ROOT / "docs" / "reference" / "schemas"
OF_TESTS = {"laguna_serve.grading_speed/1", "laguna_serve.grader_check/1"}
TYPES: tuple[type[msgspec.Struct], ...] = (
    AbResult,
    Certificate,
    ClusterResult,
    CrosscheckResult,
    DiffusionResult,
    FuzzResult,
    GatewayBenchResult,
    LinearResult,
    MoeResult,
    PrefixCacheResult,
    ReferencesResult,
    ReleaseMatrix,
    RolloutsResult,
    RoutingResult,
    SamplingResult,
    SoakResult,
    SwapResult,
    SweepResult,
)
BY_SCHEMA = {kind.__struct_config__.tag: kind for kind in TYPES}


def list_results() -> list[tuple[Path, type[msgspec.Struct]]]:
    """Every file whose schema has a type."""
    files = []
    for path in sorted(RESULTS.rglob("*.json")):
        content = json.loads(path.read_bytes())
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema in BY_SCHEMA:
            files.append((path, BY_SCHEMA[schema]))
    return files


def list_with_schema() -> list[Path]:
    """Every JSON file that says what it is, but for what programs in tests/ have written."""
    contents = {path: json.loads(path.read_bytes()) for path in sorted(RESULTS.rglob("*.json"))}
    schemas = {path: content.get("schema") for path, content in contents.items() if isinstance(content, dict)}
    return [path for path, schema in schemas.items() if schema is not None and schema not in OF_TESTS]


FILES = list_results()
each_file = pytest.mark.parametrize(
    ("path", "kind"), FILES, ids=[path.relative_to(RESULTS).as_posix() for path, _ in FILES]
)


@each_file
def test_file_is_read_and_written_back_whole(path: Path, kind: type[msgspec.Struct]) -> None:
    written = msgspec.json.decode(msgspec.json.encode(to_json(read_result(path, kind))))
    assert _fill(json.loads(path.read_bytes()), written) == written


@pytest.mark.slow
@pytest.mark.parametrize("path", list_with_schema(), ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_file_fits_the_schema_that_is_exported(path: Path) -> None:
    content = json.loads(path.read_bytes())
    name = content["schema"].removeprefix("laguna_serve.").replace("/", "-")
    Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_bytes())).validate(content)


def test_every_type_has_a_file() -> None:
    assert {kind for _, kind in FILES} == set(TYPES)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": "laguna_serve.loss/1"}', '{"schema": "laguna_serve.ab/1"}']
)
def test_another_file_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "ab.json"
    path.write_text(content)
    with pytest.raises(ResultError, match=r"ab\.json: expected a laguna_serve\.ab/1 result") as refused:
        read_result(path, AbResult)
    assert "\n" not in str(refused.value)


def test_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="No such file"):
        read_result(tmp_path / "ab.json", AbResult)


def _fill(old: Any, new: Any) -> Any:
    """The old content with what only newer files have: keys whose default was added by reading."""
    if isinstance(old, dict) and isinstance(new, dict):
        added = {key: value for key, value in new.items() if key not in old}
        assert all(value in (None, [], {}, 0, 0.0, "") for value in added.values()), added
        return {key: _fill(value, new.get(key)) for key, value in old.items()} | added
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [_fill(*pair) for pair in zip(old, new, strict=True)]
    return old
