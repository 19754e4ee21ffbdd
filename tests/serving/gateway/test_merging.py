"""What several processes know, added up: by family, by engine, by key."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config.keys import Key
from laguna_serve.serving.gateway.telemetry.exposition import merge, sum_samples
from laguna_serve.serving.gateway.telemetry.keys import KeyMetrics
from laguna_serve.serving.gateway.telemetry.metrics import Metrics
from laguna_serve.serving.gateway.traces.recorder import TraceRecorder
from laguna_serve.serving.gateway.workers.merging import (
    WHOLE,
    add_up_status,
    add_up_tallies,
    join_metrics,
)

# Of gauges these are each process's own.
OWN = {f"process_{name}" for name in ("max_fds", "open_fds", "resident_memory_bytes", "start_time_seconds")}
OWN |= {"process_virtual_memory_bytes", "upstream_up", "config_last_reload_successful"}
OWN |= {"config_last_reload_success_timestamp_seconds"}


def test_every_gauge_has_a_rule() -> None:
    """A new one would be shown once for each process, which is wrong of what all of them know."""
    metrics, keyring = Metrics(), Keyring(Ledger())
    keyring.configure([Key(name="k", sha256="0" * 64, tokens_per_day=10)])
    metrics.registry.register(KeyMetrics(keyring))
    TraceRecorder(None, metrics.registry)
    families = text_string_to_metric_families(asyncio.run(metrics.render()).decode())
    gauges = {family.name for family in families if family.type == "gauge" and not family.name.endswith("_created")}
    assert gauges == WHOLE | {f"laguna_gateway_{name}" for name in OWN}


def test_samples_have_their_worker_and_stand_under_their_family() -> None:
    own = b'# HELP a_total A.\n# TYPE a_total counter\na_total{x="1"} 2.0\n# HELP b B.\n# TYPE b gauge\nb 1.0\n'
    other = b'# HELP a_total A.\n# TYPE a_total counter\na_total{x="2 } "} 5.0\na_total{x="1"} 1e3\n'
    expected = b'# HELP a_total A.\n# TYPE a_total counter\na_total{worker="0",x="2 } "} 5.0\n'
    expected += b'a_total{worker="0",x="1"} 1e3\na_total{worker="1",x="1"} 2.0\n'
    assert join_metrics(1, own, {0: other}) == expected + b'# HELP b B.\n# TYPE b gauge\nb{worker="1"} 1.0\n'


def test_line_separator_in_a_label_ends_no_sample() -> None:
    """As in the name of an engine's model, which is the engine's to choose."""
    text = '# HELP vllm:x X.\n# TYPE vllm:x counter\nvllm:x{model_name="a\u2028b\x85"} 2.0\r\nvllm:x 1.0\n'
    joined = join_metrics(0, text.encode(), {}).decode()
    assert joined.split("\n")[2:4] == ['vllm:x{worker="0",model_name="a\u2028b\x85"} 2.0', 'vllm:x{worker="0"} 1.0']
    merged = merge({("m", "e"): text})
    assert merged.split("\n")[2:4] == ['vllm:x{upstream="e",model_name="a\u2028b\x85"} 2.0', 'vllm:x{upstream="e"} 1.0']
    assert sum_samples(text, ["vllm:x"]) == {"vllm:x": 3.0}


def test_what_is_known_whole_is_shown_once() -> None:
    text = "# HELP laguna_gateway_queued h\n# TYPE laguna_gateway_queued gauge\nlaguna_gateway_queued "
    assert join_metrics(0, f"{text}4.0\n".encode(), {1: f"{text}3.0\n".encode()}) == f"{text}4.0\n".encode()


def engine(**changes: Any) -> dict[str, Any]:
    found = {"name": "a", "state": "up", "last_error": None, "in_flight": 3, "requests": 0, "output_tokens": 0}
    return found | {"ttft_s": None, "itl_s": None} | changes


def status(*upstreams: dict[str, Any], **changes: Any) -> dict[str, Any]:
    models = {"m": {"queued": 2, "upstreams": list(upstreams)}}
    found = {"draining": False, "in_flight": 1, "queued_bytes": 9, "models": models, "keys": [], "last_errors": []}
    return found | changes


def test_status_of_all() -> None:
    own = status(engine(requests=1, ttft_s=0.4), last_errors=[{"time": "1"}], keys=[{"name": "k", "refused": 1}])
    other = status(
        engine(requests=3, ttft_s=0.8, state="down", last_error="gone", output_tokens=7),
        last_errors=[{"time": "3"}, {"time": "0"}],
        keys=[{"name": "k", "refused": 4}, {"name": "new", "refused": 1}],
        draining=True,
    )
    found = add_up_status(own, [other, status(engine(), in_flight=5)])
    assert (found["workers"], found["in_flight"], found["queued_bytes"], found["draining"]) == (3, 7, 9, True)
    (shown,) = found["models"]["m"]["upstreams"]
    assert (shown["requests"], shown["output_tokens"], shown["in_flight"]) == (4, 7, 3)
    assert (shown["state"], shown["last_error"]) == ("down", "gone")
    assert abs(shown["ttft_s"] - 0.7) < 1e-9
    assert shown["itl_s"] is None
    assert found["keys"] == [{"name": "k", "refused": 5}]
    assert [error["time"] for error in found["last_errors"]] == ["3", "1", "0"]


def test_tallies_of_all() -> None:
    parts = [
        {"m": {"requests": 1, "refused": 0}},
        {"m": {"requests": 2, "refused": 1}, "": {"requests": 0, "refused": 3}},
    ]
    assert add_up_tallies(parts) == {"m": {"requests": 3, "refused": 1}, "": {"requests": 0, "refused": 3}}
