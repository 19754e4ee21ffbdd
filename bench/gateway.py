"""What does the gateway add? Streams through it against streams straight to a fast mock engine, interleaved.

Added latency is the difference of medians, of the time to the first event and of every event's way from the engine to
the client, paired by round. The direct path is the mock's own ceiling; a bare splice of two sockets shows what any
relay adds on this machine, which client, engine and relays share. Other relays stand beside it in the same run:
--start NAME=COMMAND runs one, with {engine} and {port} for the ports, and --peer NAME=URL takes one that runs already.
The gateway has keys with limits and usage, access log, affinity and admin port on.
The last stdout line is one JSON object (schema laguna_serve.gateway_bench/1).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import psutil

from laguna_serve.bench.relay.measuring import Paths, list_loads, measure_load
from laguna_serve.bench.relay.options import DIRECT, GATEWAY, SPLICE, GatewayBenchConfig, name_workers
from laguna_serve.bench.relay.processes import GATEWAY_COMMAND, run_child, write_config
from laguna_serve.bench.relay.report import render_markdown, render_text
from laguna_serve.bench.relay.result import GatewayBenchResult
from laguna_serve.serving.engine import find_port
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import hold_out
from laguna_serve.serving.planning.launch import require_port

__all__ = ["GatewayBenchConfig", "GatewayBenchResult", "main", "measure_gateway"]
EXAMPLES = """
examples:
  python bench/gateway.py --out out/gateway
  python bench/gateway.py --streams 1,16,64,256 --rounds 15 --out out/gateway
  python bench/gateway.py --streams 256 --workers 2,4 --out out/gateway
  python bench/gateway.py --out out/gateway --start "vllm-router=vllm-router --host 127.0.0.1 --port {port} \\
      --worker-urls http://127.0.0.1:{engine}"

exit status: 0 no stream failed, 1 some did, 2 could not run, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    interrupted = "gateway.json has the loads that were done, if any"
    command = Command("bench/gateway.py", GatewayBenchConfig, __doc__, EXAMPLES, measures=True, interrupted=interrupted)
    return command.run(
        argv, measure_gateway, show=render_text, judge=lambda result: HELD if result.held else FELL_SHORT
    )


@hold_out
def measure_gateway(config: GatewayBenchConfig) -> GatewayBenchResult:
    """Measure every path, and write gateway.json and gateway.md to `config.out`.

    Raises:
        EngineError: the mock engine, the gateway or a relay did not start or takes no connections, or a relay brought
            no whole stream in a round; the loads before are in the files.
    """
    progress, environment, load = Progress(), read_environment(current_argv()), OtherLoad()
    with start_paths(config, progress) as paths:
        loads = []
        for streams, at_once in list_loads(config):
            loads.append(measure_load(config, paths, streams, at_once, progress))
            result = GatewayBenchResult(
                environment=load.note(environment),
                chunks=config.chunks,
                gap_ms=config.gap_ms,
                loads=list(loads),
            )
            write_result(config.out / "gateway.json", result)
            write_text(config.out / "gateway.md", render_markdown(result))
    return result


@contextmanager
def start_paths(config: GatewayBenchConfig, progress: Progress) -> Iterator[Paths]:
    """Keep the mock engine, the gateway and every relay up while the block lasts. Raises EngineError."""
    python = [sys.executable, "-m"]
    with ExitStack() as stack:
        engine = find_port("127.0.0.1") if config.engine_port is None else require_port("127.0.0.1", config.engine_port)
        mock = [*python, "laguna_serve.bench.relay.mock_engine", str(engine), str(config.chunks), str(config.gap_ms)]
        stack.enter_context(run_child(mock, engine, config.out / "engine.log"))
        gateway = [*GATEWAY_COMMAND, "--config", str(write_config(config.out, [engine])), "--port", "{port}"]
        commands = {
            SPLICE: [*python, "laguna_serve.bench.relay.splice", "{port}", "{engine}"],
            GATEWAY: gateway,
            **{name_workers(n): [*gateway, "--workers", str(n)] for n in config.workers},
            **{name: shlex.split(line) for name, line in config.start},
        }
        addresses, relays = {DIRECT: ("127.0.0.1", engine)}, dict[str, psutil.Process]()
        for name, command in commands.items():
            progress.say(f"starting {name}")
            port = find_port("127.0.0.1")
            filled = [part.replace("{engine}", str(engine)).replace("{port}", str(port)) for part in command]
            relays[name] = stack.enter_context(run_child(filled, port, config.out / f"{name}.log"))
            addresses[name] = ("127.0.0.1", port)
        addresses |= {name: (urlsplit(url).hostname or "", urlsplit(url).port or 80) for name, url in config.peer}
        yield Paths(addresses, relays)


if __name__ == "__main__":
    raise SystemExit(main())
