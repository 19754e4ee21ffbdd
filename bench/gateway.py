"""What does the gateway add? Streams through it against streams straight to a fast mock engine, interleaved.

Added latency is the difference of medians, of the time to the first event and of every event's way from the engine to
the client, paired by round. The direct path is the mock's own ceiling; a bare splice of two sockets shows what any
relay adds on this machine, which client, engine and relays share. Other relays stand beside ours in the same run:
--start NAME=COMMAND runs one, with {engine} and {port} for the ports, and --peer NAME=URL takes one that runs already.
Our gateway has keys, access log, affinity and admin port on.
The last stdout line is one JSON object (schema laguna_serve.gateway_bench/1).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from laguna_serve.bench.harness.arm_options import parse_numbers
from laguna_serve.bench.relay.load_client import Sample, run_round
from laguna_serve.bench.relay.report import render_markdown, render_text
from laguna_serve.serving.engine import EngineError, find_port
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress

SCHEMA = "laguna_serve.gateway_bench/1"
DIRECT, SPLICE, OURS = "direct", "splice", "laguna"
START_S = 90.0
KEY = "sk-bench"
OWN_TIME = r"^laguna_gateway_added_chunk_seconds_{}{{[^}}]*}} ([0-9.e+-]+)$"
EXAMPLES = """
examples:
  python bench/gateway.py --out out/gateway
  python bench/gateway.py --streams 1,16,64,256 --rounds 15 --out out/gateway
  python bench/gateway.py --out out/gateway --start "vllm-router=vllm-router --host 127.0.0.1 --port {port} \
      --worker-urls http://127.0.0.1:{engine}"

exit status: 0 no stream failed, 1 some did, 2 could not run, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("gateway.py", lambda: run(args), measures=True)


def run(args: argparse.Namespace) -> int:
    """Measure every path, write the result and print it. Returns the exit status."""
    progress = Progress()
    environment = describe_environment(current_argv())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        engine = args.engine_port or find_port("127.0.0.1")
        module = "laguna_serve.bench.relay.mock_engine"
        command = [sys.executable, "-m", module, str(engine), str(args.chunks), str(args.gap_ms)]
        stack.enter_context(run_child(command, engine, out / "engine.log"))
        python = [sys.executable, "-m"]
        ours = [*python, "laguna_serve.serving.cli", "gateway", "--config", str(write_config(out, [engine]))]
        commands = {
            SPLICE: [*python, "laguna_serve.bench.relay.splice", "{port}", "{engine}"],
            OURS: [*ours, "--port", "{port}"],
            **{name: shlex.split(line) for name, line in args.start},
        }
        paths, relays = {DIRECT: ("127.0.0.1", engine)}, dict[str, psutil.Process]()
        for name, command in commands.items():
            progress.say(f"starting {name}")
            port = find_port("127.0.0.1")
            started = [part.replace("{engine}", str(engine)).replace("{port}", str(port)) for part in command]
            relays[name] = stack.enter_context(run_child(started, port, out / f"{name}.log"))
            paths[name] = ("127.0.0.1", port)
        paths |= {name: (urlsplit(url).hostname or "", urlsplit(url).port or 80) for name, url in args.peer}
        kinds = [(streams, at_once) for streams in args.streams for at_once in (False, True)]
        loads = [
            measure(args, paths, streams, at_once, relays, progress)
            for streams, at_once in kinds
            if streams > 1 or not at_once
        ]
    result = {
        "schema": SCHEMA,
        "environment": environment,
        "chunks": args.chunks,
        "gap_ms": args.gap_ms,
        "loads": loads,
    }
    write_json(out / "gateway.json", result)
    write_text(out / "gateway.md", render_markdown(result))
    print_result(render_text(result), result, out, always_json=args.json)
    return FELL_SHORT if any(path["errors"] for load in loads for path in load["paths"].values()) else HELD


def measure(
    args: argparse.Namespace,
    paths: Mapping[str, tuple[str, int]],
    streams: int,
    at_once: bool,
    relays: Mapping[str, psutil.Process],
    progress: Progress,
) -> dict[str, Any]:
    """Interleaved rounds of every path at one number of streams, which begin one after the other or all at once."""
    requests = max(streams, args.requests)
    spread_s = 0.0 if at_once else args.chunks * args.gap_ms / 1000
    rounds: dict[str, list[Sample]] = {name: [] for name in paths}
    cpu_s = dict.fromkeys(relays, 0.0)
    own_s, own_events = np.array(read_own_time(*paths[OURS]))
    progress.say(f"{streams} streams{' at once' * at_once}: {args.rounds} rounds of {requests} on {', '.join(paths)}")
    for index in range(-1, args.rounds):
        names = list(paths)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            before = _measure(relays[name])[0] if name in relays else 0.0
            sample = run_round(*paths[name], streams, requests, KEY, spread_s)
            if index >= 0:  # the first round warms up
                rounds[name].append(sample)
                if name in relays:
                    cpu_s[name] += _measure(relays[name])[0] - before
    found = {name: describe(samples, rounds[DIRECT], args.chunks) for name, samples in rounds.items()}
    for name, process in relays.items():
        found[name]["cpu_us_per_event"] = cpu_s[name] * 1e6 / max(1, found[name]["events"])
        found[name]["rss_mib"] = _measure(process)[1]
    own_s, own_events = np.array(read_own_time(*paths[OURS])) - (own_s, own_events)
    found[OURS]["own_us_per_event"] = float(own_s * 1e6 / max(1.0, own_events))
    return {"streams": streams, "at_once": at_once, "requests_per_round": requests, "paths": found}


def read_own_time(host: str, port: int) -> tuple[float, float]:
    """Our gateway's own time over all chunks of answers so far, in seconds, and how many there were."""
    request = urllib.request.Request(f"http://{host}:{port}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=START_S) as answer:
        text = answer.read().decode()
    sums = {kind: sum(map(float, re.findall(OWN_TIME.format(kind), text, re.MULTILINE))) for kind in ("sum", "count")}
    return sums["sum"], sums["count"]


def describe(samples: Sequence[Sample], direct: Sequence[Sample], chunks: int) -> dict[str, Any]:
    """Medians of a path, and what it adds to the direct one, with the interquartile range over rounds."""
    ttft = np.array([np.median(sample.ttft_ms) for sample in samples])
    chunk = np.array([np.median(sample.chunk_ms) for sample in samples])
    gap = np.array([np.median(sample.gap_ms) for sample in samples])
    added_gap = gap - [np.median(sample.gap_ms) for sample in direct]
    added_ttft = ttft - [np.median(sample.ttft_ms) for sample in direct]
    added_chunk = chunk - [np.median(sample.chunk_ms) for sample in direct]
    return {
        "ttft_ms_p50": float(np.median(ttft)),
        "ttft_ms_p99": float(np.percentile(np.concatenate([s.ttft_ms for s in samples]), 99)),
        "chunk_us_p50": float(np.median(chunk)) * 1e3,
        "added_ttft_ms": _spread(added_ttft),
        "added_chunk_us": _spread(added_chunk * 1e3),
        "added_gap_us": _spread(added_gap * 1e3),
        "chunks_per_s": float(np.median([len(s.chunk_ms) / s.wall_s for s in samples])),
        "errors": sum(s.errors for s in samples),
        "events": sum(len(s.chunk_ms) for s in samples),
        "events_expected": sum(len(s.ttft_ms) for s in samples) * chunks,
    }


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def write_config(folder: Path, engines: Sequence[int], admin: int = 0) -> Path:
    """A gateway's configuration with all that costs a request something."""
    upstreams = "".join(
        f"""
        [[models.upstreams]]
        name = "engine-{i}"
        url = "http://127.0.0.1:{port}"
        max_in_flight = 1024
        """
        for i, port in enumerate(engines)
    )
    text = f"""
        [server]
        access_log = true
        [admin]
        port = {admin}
        [[keys]]
        name = "bench"
        sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
        max_in_flight = 4096
        requests_per_minute = 1000000
        [[models]]
        name = "fake"
        affinity = "session"
        {upstreams}
        """
    path = folder / "gateway.toml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


@contextmanager
def run_child(command: Sequence[str], port: int, log: Path) -> Iterator[psutil.Process]:
    """A process that listens on `port` when the block begins, and is gone when it ends. Raises EngineError."""
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + START_S
            while not _listens(process.pid, port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise EngineError(f"{command[0]}: expected it to listen on {port}, got none; see {log}")
                time.sleep(0.05)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def _listens(pid: int, port: int) -> bool:
    try:
        return any(_has_port(process, port) for process in _list_family(psutil.Process(pid)))
    except psutil.Error:
        return False


def _has_port(process: psutil.Process, port: int) -> bool:
    return any(c.laddr and c.laddr.port == port and c.status == "LISTEN" for c in process.net_connections())


def _list_family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _measure(process: psutil.Process) -> tuple[float, float]:
    """CPU seconds and resident MiB of a relay, with its children."""
    cpu_s = mib = 0.0
    for one in _list_family(process):
        times = one.cpu_times()
        cpu_s += times.user + times.system
        mib += one.memory_info().rss / 2**20
    return cpu_s, mib


def parse_peer(text: str) -> tuple[str, str]:
    """`NAME=URL`."""
    name, _, url = text.partition("=")
    if not name or urlsplit(url).scheme != "http":
        raise argparse.ArgumentTypeError(f"expected NAME=http://host:port, got {text!r}")
    return name, url


def parse_start(text: str) -> tuple[str, str]:
    """`NAME=COMMAND`."""
    name, _, command = text.partition("=")
    if not name or "{port}" not in command or "{engine}" not in command:
        raise argparse.ArgumentTypeError(f"expected NAME=COMMAND with {{port}} and {{engine}}, got {text!r}")
    return name, command


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="bench/gateway.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--streams", metavar="N,…", type=parse_numbers, default=[1, 16], help="default: 1,16")
    parser.add_argument(
        "--requests", metavar="N", type=int, default=32, help="streams per round (default: %(default)s)"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=11, help="of every path (%(default)s)")
    parser.add_argument("--chunks", metavar="N", type=int, default=64, help="events per stream (%(default)s)")
    parser.add_argument("--gap-ms", metavar="MS", type=float, default=5.0, help="between events (%(default)s)")
    parser.add_argument("--engine-port", metavar="P", type=int, help="of the mock engine (default: a free one)")
    start = "a relay to run beside ours, with {engine} and {port}; repeatable"
    parser.add_argument("--start", metavar="NAME=COMMAND", type=parse_start, action="append", default=[], help=start)
    parser.add_argument(
        "--peer", metavar="NAME=URL", type=parse_peer, action="append", default=[], help="another relay"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    for name, least in {"requests": 1, "rounds": 1, "chunks": 2}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
