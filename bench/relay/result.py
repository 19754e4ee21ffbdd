"""The results of bench/gateway.py and bench/soak.py.

`gateway.json` has the schema laguna_serve.gateway_bench/1, `soak.json` laguna_serve.gateway_soak/1.
"""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType, field

from laguna_serve.bench.stats.quartiles import Quartiles
from laguna_serve.serving.kit.command import Brief
from laguna_serve.serving.kit.environment import Environment


class PathResult(Struct, frozen=True, kw_only=True):
    """One path at one load; `added_…`: against the direct one in the same round.

    Attributes:
        cpu_us_per_event, rss_mib: of a relay that was started here.
        own_us_per_event: by our gateway's own metrics.
    """

    ttft_ms_p50: float
    ttft_ms_p99: float
    chunk_us_p50: float
    added_ttft_ms: Quartiles
    added_chunk_us: Quartiles
    added_gap_us: Quartiles
    chunks_per_s: float
    errors: int
    events: int
    events_expected: int
    cpu_us_per_event: float | UnsetType = UNSET
    rss_mib: float | UnsetType = UNSET
    own_us_per_event: float | UnsetType = UNSET


class RelayLoad(Struct, frozen=True, kw_only=True):
    """Every path at so many streams, which begin one after the other or all `at_once`."""

    streams: int
    at_once: bool
    requests_per_round: int
    paths: dict[str, PathResult]


class GatewayBenchResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.gateway_bench/1"):
    """What the gateway, and relays beside it, add to streams of `chunks` events, `gap_ms` apart."""

    environment: Environment
    chunks: int
    gap_ms: float
    loads: list[RelayLoad]

    @property
    def held(self) -> bool:
        """Whether no stream failed on any path."""
        return not any(path.errors for load in self.loads for path in load.paths.values())


class StartEnd(Struct, frozen=True, kw_only=True):
    """A figure before the first request and after the last."""

    start: float
    end: float


class ProcessSample(Struct, frozen=True, kw_only=True):
    """The gateway's resident memory and open files, so many seconds after the start."""

    seconds: float = field(name="s")
    rss_mib: float
    files: int


class SoakResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.gateway_soak/1"):
    """A soak of the gateway.

    Attributes:
        requests: by kind; `wrong`: how many ended otherwise than they must.
        memory_growth: the last quarter's memory ÷ the second's; None for a run too short.
        failures: what was wrong, in words; of the requests the first twenty.
    """

    environment: Environment
    requests: dict[str, int]
    wrong: int
    wall_s: float
    requests_per_s: float
    updates: int
    reloads: int
    open_files: StartEnd
    memory_growth: float | None
    rss_mib: StartEnd
    samples: list[ProcessSample]
    failures: list[str]


# The line for programs.
LINE = Brief(without=("samples",))
