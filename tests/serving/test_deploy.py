"""The dashboard and the alert rules: every expression is PromQL, of metrics and labels that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.gateway.access.ledger import Ledger, Tally
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.engines.pool import Pool
from laguna_serve.serving.gateway.residence.model import OwnedModel, State, Terms
from laguna_serve.serving.gateway.telemetry.exposition import ACCEPTED, DRAFTS, merge
from laguna_serve.serving.gateway.telemetry.keys import KeyMetrics
from laguna_serve.serving.gateway.telemetry.metrics import Metrics
from laguna_serve.serving.gateway.telemetry.owned import OwnedMetrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serving" / "deploy"
REFERENCE = ROOT / "docs" / "reference" / "metrics.md"
# Given by Prometheus, and by vLLM and the gateway to vLLM's.
GIVEN, ENGINES = {"instance", "job"}, {"upstream", "model_name", "engine"}
INTERVAL = "5m"


def list_dashboard() -> list[str]:
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def list_alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


EXPRESSIONS = [*list_dashboard(), *(rule["expr"] for rule in list_alerts())]


def walk(node: Any) -> Iterator[Any]:
    yield node
    for name in ("lhs", "rhs", "expr", "param", "args", "vector_selector"):
        below = getattr(node, name, None)
        for child in below if isinstance(below, list) else [below]:
            if child is not None:
                yield from walk(child)


def find_labels() -> dict[str, set[str]]:
    """The labels of every sample that a gateway with keys and a fallback has."""
    model = {"name": "m", "upstreams": [{"name": "a", "url": "http://127.0.0.1:9"}]}
    config = parse_config({"models": [model]}, "test")
    metrics, keyring = Metrics(), Keyring(Ledger())
    metrics.pools = {"m": Pool(config.models[0], config.limits)}
    metrics.pools["m"].configure(config.models[0], config.limits)  # type: ignore[attr-defined]
    metrics.note("/v1/models", 200, 1.0)
    metrics.note_refusal("queue_full", "k")
    metrics.note_fallback("m", "other", "no_engine")
    keyring.configure([Key(name="k", sha256="1" * 64, tokens_per_day=1)])
    holder = keyring.holders[0]
    holder.leave(holder.enter(), None)
    holder.since_start["m"] = Tally(1, 1, 1, 1)
    registry: CollectorRegistry = metrics.registry
    registry.register(KeyMetrics(keyring))
    registry.register(OwnedMetrics({"m": OwnedModel("m", Terms())}, [state.value for state in State]))
    families: list[Metric] = list(registry.collect())
    found: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    for line in merge({("m", "a"): f"{DRAFTS} 1\n{ACCEPTED} 1\n"}).splitlines():
        if line.startswith("laguna_gateway_"):
            found[line.partition("{")[0]] = set(re.findall(r'(\w+)="', line))
    return found


LABELS = find_labels()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_is_of_metrics_and_labels_that_are_there(expression: str) -> None:
    plain = expression.replace("$__rate_interval", INTERVAL).replace('"$model"', '".*"')
    assert "$" not in plain
    documented = set(re.findall(r"`(vllm:\w+)`", REFERENCE.read_text(encoding="utf-8")))
    known = set[str]()
    nodes = list(walk(promql_parser.parse(plain)))
    selectors = [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]
    assert selectors
    for selector in selectors:
        name = selector.name
        assert name in (documented if name.startswith("vllm:") else LABELS), name
        labels = GIVEN | (ENGINES if name.startswith("vllm:") else LABELS[name])
        known |= labels
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels, name
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", plain):
        assert {label.strip() for label in labels.split(",")} <= known, labels


def test_alerts_name_labels_that_their_expressions_have() -> None:
    names = [rule["alert"] for rule in list_alerts()]
    assert len(names) == len(set(names)) >= 8
    for rule in list_alerts():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        grouped = re.search(r"by \(([^)]*)\)", rule["expr"])
        selected = set().union(*(LABELS[name] for name in LABELS if name in rule["expr"]), GIVEN)
        kept = {label.strip() for label in grouped[1].split(",")} if grouped else selected
        assert used <= kept, rule["alert"]


def test_dashboard_is_whole() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board))) <= {*variables, "__rate_interval", "__all"}
    for panel in board["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_vllms_metrics_are_vllms() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("needs vLLM")
    folder = Path(spec.origin).parent / "v1"
    source = "".join(path.read_text(encoding="utf-8") for path in (folder / "metrics").glob("*.py"))
    documented = re.findall(r"`(vllm:\w+)`", REFERENCE.read_text(encoding="utf-8"))
    assert documented
    for name in documented:
        assert f'"{name.removesuffix("_total")}"' in source, name
