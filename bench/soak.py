"""Many requests of every kind through the gateway, with faults, departures, new weights and reloads all along.

Each must end as it should, and the gateway stay as it was. What is sent and checked: relay/soaking.py. The default is
what an hour brings at 60 requests per second. The last stdout line is one JSON object (schema
laguna_serve.gateway_soak/1).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from laguna_serve.bench.relay.options import SoakConfig
from laguna_serve.bench.relay.processes import GATEWAY_COMMAND, run_child, write_config
from laguna_serve.bench.relay.report import render_soak, render_soak_markdown
from laguna_serve.bench.relay.result import LINE, SoakResult
from laguna_serve.bench.relay.soaking import Soak
from laguna_serve.serving.engine import find_port
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import hold_out

__all__ = ["SoakConfig", "SoakResult", "main", "soak"]
EXAMPLES = """
examples:
  python bench/soak.py --out out/soak
  python bench/soak.py --requests 5000 --out out/soak

exit status: 0 held, 1 a request ended otherwise than it must or something was left behind, 2 could not run,
130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("bench/soak.py", SoakConfig, __doc__, EXAMPLES)
    return command.run(
        argv, soak, show=render_soak, line=LINE, judge=lambda result: FELL_SHORT if result.failures else HELD
    )


@hold_out
def soak(config: SoakConfig) -> SoakResult:
    """Start gateway and engines, send the load, and write soak.json and soak.md to `config.out`.

    Raises:
        EngineError: an engine or the gateway did not start.
    """
    environment = read_environment(current_argv())
    with ExitStack() as stack:
        engines = [find_port("127.0.0.1") for _ in range(2)]
        for port in engines:
            command = [sys.executable, "-m", "laguna_serve.bench.relay.faulty_engine", str(port)]
            stack.enter_context(run_child(command, port, config.out / "engine.log"))
        port, admin = find_port("127.0.0.1"), find_port("127.0.0.1")
        toml = write_config(config.out, engines, admin)
        command = [*GATEWAY_COMMAND, "--config", str(toml), "--port", str(port)]
        gateway = stack.enter_context(run_child(command, port, config.out / "gateway.log"))
        result = asyncio.run(Soak(port, admin, gateway, config, Progress()).run(environment))
    write_result(config.out / "soak.json", result)
    write_text(config.out / "soak.md", render_soak_markdown(result))
    return result


if __name__ == "__main__":
    raise SystemExit(main())
