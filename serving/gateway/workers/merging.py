"""One gateway's metrics, status and usage, of what its processes know.

What counts for all of them (slots, queues, limits) each knows whole: that of the one which was asked is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from laguna_serve.serving.gateway.telemetry.exposition import SAMPLE, split_lines
from laguna_serve.serving.kit.results import JsonObject

Number = float | int
# What counts for all processes has one sample; of all else each has its own, so that counters of one that was started
# again begin anew as Prometheus expects it.
WHOLE = frozenset(
    f"laguna_gateway_{name}"
    for name in (
        *("queued", "queued_bytes", "upstream_in_flight"),
        *("key_in_flight", "key_tokens_today", "key_budget_left_tokens"),
    )
)
SUMMED = ("requests", "output_tokens")
MEANS = (("ttft_s", "requests"), ("itl_s", "output_tokens"))  # each of so many
MOST_ERRORS = 20


def join_metrics(worker: int, own: bytes, others: Mapping[int, bytes]) -> bytes:
    """Join the texts of /metrics of all workers: each sample with its worker as a label."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for number, text in sorted({worker: own, **others}.items()):
        family = ""
        for line in split_lines(text.decode()):
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if line not in (known := headers.setdefault(family, [])):
                    known.append(line)
            elif (match := SAMPLE.match(line)) is not None:
                name, labels, value = match.groups()
                if family not in WHOLE:
                    line = f'{name}{{worker="{number}"{"," + labels if labels else ""}}} {value}'
                if family not in WHOLE or number == worker:
                    samples.setdefault(family, []).append(line)
    lines = [line for family, known in headers.items() for line in (*known, *samples.get(family, ()))]
    return "\n".join(lines).encode() + b"\n"


def add_up_status(own: JsonObject, others: Iterable[JsonObject]) -> JsonObject:
    """Add up what `/admin/status` tells."""
    all_of = [own, *others]
    models = {name: _add_up_model(model, _find_same(name, all_of)) for name, model in own["models"].items()}
    keys = [
        {**key, "refused": sum(k["refused"] for status in all_of for k in status["keys"] if k["name"] == key["name"])}
        for key in own["keys"]
    ]
    errors = sorted((e for status in all_of for e in status["last_errors"]), key=lambda e: e["time"], reverse=True)
    return {
        **own,
        "workers": len(all_of),
        "draining": any(status["draining"] for status in all_of),
        "in_flight": sum(status["in_flight"] for status in all_of),
        "models": models,
        "keys": keys,
        "last_errors": errors[:MOST_ERRORS],
    }


def _find_same(name: str, all_of: Iterable[JsonObject]) -> list[JsonObject]:
    return [status["models"][name] for status in all_of if name in status["models"]]


def _add_up_model(own: JsonObject, all_of: list[JsonObject]) -> JsonObject:
    upstreams = []
    for engine in own["upstreams"]:
        same = [e for model in all_of for e in model["upstreams"] if e["name"] == engine["name"]]
        worst = next((e for e in same if e["state"] != "up"), engine)
        found = {**engine, "state": worst["state"], "last_error": worst["last_error"]}
        found |= {name: sum(e[name] for e in same) for name in SUMMED}
        found |= {name: _find_mean([(e[name], e[count]) for e in same]) for name, count in MEANS}
        upstreams.append(found)
    return {**own, "upstreams": upstreams}


def _find_mean(parts: Iterable[tuple[float | None, int]]) -> float | None:
    """Find the mean of means, each of so many."""
    known = [(mean, count) for mean, count in parts if mean is not None and count]
    return sum(mean * count for mean, count in known) / sum(count for _, count in known) if known else None


def add_up_tallies(parts: Iterable[Mapping[str, Mapping[str, Number]]]) -> dict[str, dict[str, Number]]:
    """Add up what was used, by model."""
    found: dict[str, dict[str, Number]] = {}
    for part in parts:
        for model, tally in part.items():
            known = found.setdefault(model, dict.fromkeys(tally, 0))
            for name, value in tally.items():
                known[name] += value
    return found
