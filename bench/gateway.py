"""What does the gateway add? Streams through it against streams straight to a fast stand-in engine, by turns.

Added latency is the difference of medians, of the time to the first event and of every event's way from the engine to
the client, paired by round. Client, engine and gateway share this machine. Other relays that already run in front of
the same engine can stand beside ours (--peer NAME=URL; start the engine alone with --engine-port to point them at it).
The last stdout line is one JSON object (schema laguna_serve.gateway_bench/1).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from laguna_serve.bench.arm_flags import parse_numbers
from laguna_serve.bench.endings import COULD_NOT_RUN, FELL_SHORT, HELD, INTERRUPTED, stop_on_signals
from laguna_serve.bench.progress import Progress
from laguna_serve.bench.record import current_argv, describe_environment, write_json, write_text
from laguna_serve.bench.stream_client import Sample, run_round
from laguna_serve.serving.engine import EngineError, find_port

SCHEMA = "laguna_serve.gateway_bench/1"
DIRECT, OURS = "direct", "laguna"
START_S = 15.0
EXAMPLES = """
examples:
  python bench/gateway.py --out out/gateway
  python bench/gateway.py --streams 1,16,64,256 --rounds 15 --out out/gateway
  python bench/gateway.py --engine-port 9000 --peer router=http://127.0.0.1:9100 --out DIR

exit status: 0 no stream failed, 1 some did, 2 could not run, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    stop_on_signals()
    progress = Progress()
    try:
        environment = describe_environment(current_argv())
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            engine = args.engine_port or find_port("127.0.0.1")
            module = "laguna_serve.bench.stream_engine"
            stack.enter_context(_child(["-m", module, str(engine), str(args.chunks), str(args.gap_ms)], engine))
            port = find_port("127.0.0.1")
            command = ["-m", "laguna_serve.serving.cli", "gateway", "--upstream", f"http://127.0.0.1:{engine}"]
            gateway = stack.enter_context(_child([*command, "--model", "fake", "--port", str(port)], port))
            paths = {DIRECT: ("127.0.0.1", engine), OURS: ("127.0.0.1", port)}
            paths |= {name: (urlsplit(url).hostname or "", urlsplit(url).port or 80) for name, url in args.peer}
            loads = [measure(args, paths, streams, gateway, progress) for streams in args.streams]
    except KeyboardInterrupt:
        print("gateway.py: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (EngineError, OSError, TimeoutError) as error:
        print(f"gateway.py: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    result = {
        "schema": SCHEMA,
        "environment": environment,
        "chunks": args.chunks,
        "gap_ms": args.gap_ms,
        "loads": loads,
    }
    write_json(out / "gateway.json", result)
    write_text(out / "gateway.md", render_markdown(result))
    print(render_text(result))
    print(json.dumps(result, ensure_ascii=False))
    return FELL_SHORT if any(path["errors"] for load in loads for path in load["paths"].values()) else HELD


def measure(
    args: argparse.Namespace,
    paths: Mapping[str, tuple[str, int]],
    streams: int,
    gateway: psutil.Process,
    progress: Progress,
) -> dict[str, Any]:
    """Rounds of every path by turns at one number of streams."""
    requests = max(streams, args.requests)
    rounds: dict[str, list[Sample]] = {name: [] for name in paths}
    cpu_s = 0.0
    progress.say(f"{streams} streams: {args.rounds} rounds of {requests} on {', '.join(paths)}")
    for index in range(-1, args.rounds):
        names = list(paths)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            before = _cpu_s(gateway)
            sample = run_round(*paths[name], streams, requests)
            if index >= 0:  # the first round warms up
                rounds[name].append(sample)
                cpu_s += _cpu_s(gateway) - before if name == OURS else 0.0
    return {
        "streams": streams,
        "requests_per_round": requests,
        "gateway_cpu_us_per_chunk": cpu_s * 1e6 / (len(rounds[OURS]) * requests * args.chunks),
        "gateway_rss_mib": gateway.memory_info().rss / 2**20,
        "paths": {name: describe(samples, rounds[DIRECT], args.chunks) for name, samples in rounds.items()},
    }


def describe(samples: Sequence[Sample], direct: Sequence[Sample], chunks: int) -> dict[str, Any]:
    """Medians of a path, and what it adds to the direct one, with the interquartile range over rounds."""
    ttft = np.array([np.median(sample.ttft_ms) for sample in samples])
    chunk = np.array([np.median(sample.chunk_ms) for sample in samples])
    added_ttft = ttft - [np.median(sample.ttft_ms) for sample in direct]
    added_chunk = chunk - [np.median(sample.chunk_ms) for sample in direct]
    return {
        "ttft_ms_p50": float(np.median(ttft)),
        "ttft_ms_p99": float(np.percentile(np.concatenate([s.ttft_ms for s in samples]), 99)),
        "chunk_us_p50": float(np.median(chunk)) * 1e3,
        "added_ttft_ms": _spread(added_ttft),
        "added_chunk_us": _spread(added_chunk * 1e3),
        "chunks_per_s": float(np.median([len(s.chunk_ms) / s.wall_s for s in samples])),
        "errors": sum(s.errors for s in samples),
        "events": sum(len(s.chunk_ms) for s in samples),
        "events_expected": sum(len(s.ttft_ms) for s in samples) * chunks,
    }


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def render_text(result: Mapping[str, Any]) -> str:
    """In columns."""
    header = ("streams", "path", "TTFT p50", "added TTFT, ms", "added per event, µs", "events/s")
    lines = ["{:>7}  {:<10} {:>9} {:>20} {:>20} {:>9}".format(*header)]
    for load in result["loads"]:
        for name, path in load["paths"].items():
            ttft, chunk = path["added_ttft_ms"], path["added_chunk_us"]
            lines.append(
                f"{load['streams']:>7}  {name:<10} {path['ttft_ms_p50']:>9.2f} "
                f"{ttft['median']:>8.2f} ({ttft['q25']:.2f}–{ttft['q75']:.2f}) "
                f"{chunk['median']:>9.0f} ({chunk['q25']:.0f}–{chunk['q75']:.0f}) {path['chunks_per_s']:>9,.0f}"
            )
        lines.append(
            f"{'':>7}  gateway: {load['gateway_cpu_us_per_chunk']:.0f} µs of CPU per event, "
            f"{load['gateway_rss_mib']:.0f} MiB resident"
        )
    return "\n".join(lines)


def render_markdown(result: Mapping[str, Any]) -> str:
    """As a page."""
    environment = result["environment"]
    lines = [
        "# What the gateway adds",
        "",
        f"Streams of {result['chunks']} events, {result['gap_ms']} ms apart; client, stand-in engine and relays on"
        f" {environment['cores']} cores of {environment['cpu']}. Medians over rounds by turns, quartiles in brackets.",
        "",
        "| streams | path | TTFT p50, ms | added TTFT, ms | added per event, µs | events/s | failed |",
        "|--|--|--|--|--|--|--|",
    ]
    for load in result["loads"]:
        for name, path in load["paths"].items():
            ttft, chunk = path["added_ttft_ms"], path["added_chunk_us"]
            lines.append(
                f"| {load['streams']} | {name} | {path['ttft_ms_p50']:.2f} | "
                f"{ttft['median']:.2f} ({ttft['q25']:.2f}–{ttft['q75']:.2f}) | "
                f"{chunk['median']:.0f} ({chunk['q25']:.0f}–{chunk['q75']:.0f}) | {path['chunks_per_s']:,.0f} | "
                f"{path['errors']} |"
            )
    return "\n".join([*lines, "", f"`{environment['command']}`, {environment['date']}."]) + "\n"


@contextmanager
def _child(arguments: Sequence[str], port: int) -> Iterator[psutil.Process]:
    """A Python process that listens on `port` when the block begins, and is gone when it ends."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_S
            while not any(c.laddr.port == port for c in psutil.Process(process.pid).net_connections() if c.laddr):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise EngineError(f"{arguments[1]}: expected it to listen on {port}, got none")
                time.sleep(0.05)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def parse_peer(text: str) -> tuple[str, str]:
    """`NAME=URL`."""
    name, _, url = text.partition("=")
    if not name or urlsplit(url).scheme != "http":
        raise argparse.ArgumentTypeError(f"expected NAME=http://host:port, got {text!r}")
    return name, url


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = argparse.ArgumentParser(
        prog="bench/gateway.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--streams", metavar="N,…", type=parse_numbers, default=[1, 16], help="default: 1,16")
    parser.add_argument(
        "--requests", metavar="N", type=int, default=32, help="streams per round (default: %(default)s)"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=11, help="of every path (%(default)s)")
    parser.add_argument("--chunks", metavar="N", type=int, default=64, help="events per stream (%(default)s)")
    parser.add_argument("--gap-ms", metavar="MS", type=float, default=5.0, help="between events (%(default)s)")
    parser.add_argument("--engine-port", metavar="P", type=int, help="of the stand-in engine (default: a free one)")
    parser.add_argument(
        "--peer", metavar="NAME=URL", type=parse_peer, action="append", default=[], help="another relay"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    args = parser.parse_args(argv)
    for name in ("requests", "rounds", "chunks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
