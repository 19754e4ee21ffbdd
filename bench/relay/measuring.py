"""Measures every path from the client to the mock engine at one load, interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
from msgspec import structs

from laguna_serve.bench.relay.load_client import Sample, run_round
from laguna_serve.bench.relay.options import DIRECT, GATEWAY, GatewayBenchConfig
from laguna_serve.bench.relay.processes import KEY, START_S, read_cpu_s, read_rss_mib
from laguna_serve.bench.relay.result import PathResult, RelayLoad
from laguna_serve.bench.stats.quartiles import find_quartiles
from laguna_serve.serving.client.exposition import read_samples
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.machine.local_http import OK, ask_engine

OWN_TIME = "laguna_gateway_added_chunk_seconds_"


@dataclass(frozen=True, slots=True)
class Paths:
    """Where every path begins (host and port, by name), and the processes of those that were started here."""

    addresses: Mapping[str, tuple[str, int]]
    relays: Mapping[str, psutil.Process]


def list_loads(config: GatewayBenchConfig) -> list[tuple[int, bool]]:
    """(streams, at once) of every load; a single stream begins only one way."""
    kinds = [(streams, at_once) for streams in config.streams for at_once in (False, True)]
    return [(streams, at_once) for streams, at_once in kinds if streams > 1 or not at_once]


def measure_load(
    config: GatewayBenchConfig, paths: Paths, streams: int, at_once: bool, progress: Progress
) -> RelayLoad:
    """Interleaved rounds of every path at one number of streams, which begin one after the other or all at once.

    Raises:
        EngineError: a path takes no connections, or brought no whole stream in a round.
    """
    names, relays = list(paths.addresses), paths.relays
    requests = max(streams, config.requests)
    spread_s = 0.0 if at_once else config.chunks * config.gap_ms / 1000
    rounds: dict[str, list[Sample]] = {name: [] for name in names}
    cpu_s = dict.fromkeys(relays, 0.0)
    own_before = read_own_time(*paths.addresses[GATEWAY])
    progress.say(f"{streams} streams{' at once' * at_once}: {config.rounds} rounds of {requests} on {', '.join(names)}")
    for index in range(-1, config.rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            before_s = read_cpu_s(relays[name]) if name in relays else 0.0
            try:
                sample = run_round(*paths.addresses[name], streams, requests, KEY, spread_s)
            except OSError as error:
                got = error.strerror or str(error)
                expected = f"expected {':'.join(map(str, paths.addresses[name]))} to take connections"
                raise EngineError(f"{name}: {expected}, got {got}; is it up?") from None
            if index < 0:  # the first round warms up
                continue
            rounds[name].append(sample)
            if name in relays:
                cpu_s[name] += read_cpu_s(relays[name]) - before_s
    for name, samples in rounds.items():
        if not all(sample.gap_ms or (sample.ttft_ms and config.chunks == 1) for sample in samples):
            raise EngineError(
                f"{name}: expected a whole stream in every round of {streams}, got none in one; see its log"
            )
    results = {name: describe(samples, rounds[DIRECT], config.chunks) for name, samples in rounds.items()}
    for name, process in relays.items():
        each_us = cpu_s[name] * 1e6 / max(1, results[name].events)
        results[name] = structs.replace(results[name], cpu_us_per_event=each_us, rss_mib=read_rss_mib(process))
    own_s, own_events = np.subtract(read_own_time(*paths.addresses[GATEWAY]), own_before)
    own_us = float(own_s * 1e6 / max(1.0, own_events))
    results[GATEWAY] = structs.replace(results[GATEWAY], own_us_per_event=own_us)
    return RelayLoad(streams=streams, at_once=at_once, requests_per_round=requests, paths=results)


def read_own_time(host: str, port: int) -> tuple[float, float]:
    """Read the gateway's own time over all chunks of answers so far, in seconds, and how many there were.

    Raises:
        EngineError: it does not say.
    """
    address = f"http://{host}:{port}"
    try:
        status, answer = ask_engine(address, "/metrics", timeout_s=START_S, api_key=KEY)
    except OSError as error:
        raise EngineError(f"{address}/metrics: expected an answer, got {error}; is the gateway up?") from None
    if status != OK:
        raise EngineError(f"{address}/metrics: expected the gateway's metrics, got HTTP {status}; is it the gateway?")
    samples = read_samples(answer.decode())
    seconds, chunks = (
        sum(sample.value for sample in samples if sample.name == OWN_TIME + kind) for kind in ("sum", "count")
    )
    return seconds, chunks


def describe(samples: Sequence[Sample], direct: Sequence[Sample], chunks: int) -> PathResult:
    """Medians of a path, and what it adds to the direct one, with the interquartile range over rounds."""
    ttft = np.array([np.median(sample.ttft_ms) for sample in samples])
    chunk = np.array([np.median(sample.chunk_ms) for sample in samples])
    gap = np.array([np.median(sample.gap_ms) for sample in samples])
    return PathResult(
        ttft_ms_p50=float(np.median(ttft)),
        ttft_ms_p99=float(np.percentile(np.concatenate([s.ttft_ms for s in samples]), 99)),
        chunk_us_p50=float(np.median(chunk)) * 1e3,
        added_ttft_ms=find_quartiles(ttft - [np.median(sample.ttft_ms) for sample in direct]),
        added_chunk_us=find_quartiles((chunk - [np.median(sample.chunk_ms) for sample in direct]) * 1e3),
        added_gap_us=find_quartiles((gap - [np.median(sample.gap_ms) for sample in direct]) * 1e3),
        chunks_per_s=float(np.median([len(s.chunk_ms) / s.wall_s for s in samples])),
        errors=sum(s.errors for s in samples),
        events=sum(len(s.chunk_ms) for s in samples),
        events_expected=sum(len(s.ttft_ms) for s in samples) * chunks,
    )
