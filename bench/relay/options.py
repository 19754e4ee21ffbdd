"""What a relay is measured with: the configurations of bench/gateway.py and bench/soak.py."""

from __future__ import annotations

import argparse
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from laguna_serve.serving.kit.flags import MOST_SEED, BoundedConfig, Flag, FlagError, check_bounds, parse_numbers

DIRECT, SPLICE, GATEWAY = "direct", "splice", "laguna"
LAST_PORT = 65535


def parse_peer(text: str) -> tuple[str, str]:
    """`NAME=URL` as (name, URL); raises ArgumentTypeError."""
    name, _, url = text.partition("=")
    try:
        parts = urlsplit(url)
        sound = bool(name) and parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number, or none of a port
        sound = False
    if not sound:
        raise argparse.ArgumentTypeError(f"expected NAME=http://host:port, got {text!r}")
    return name, url


def parse_start(text: str) -> tuple[str, str]:
    """`NAME=COMMAND` as (name, command with {port} and {engine}); raises ArgumentTypeError."""
    name, _, command = text.partition("=")
    if not name or "{port}" not in command or "{engine}" not in command:
        raise argparse.ArgumentTypeError(f"expected NAME=COMMAND with {{port}} and {{engine}}, got {text!r}")
    try:
        program = shlex.split(command)[0]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NAME=COMMAND as for a shell, got {text!r}: {error}") from None
    if shutil.which(program) is None:
        raise argparse.ArgumentTypeError(f"expected NAME=COMMAND that can be run, got no program {program!r}")
    return name, command


@dataclass(frozen=True, kw_only=True)
class GatewayBenchConfig:
    """How many streams of what size, and which relays beside the gateway; the files go to `out`."""

    streams: Annotated[tuple[int, ...], Flag("default: 1,16", metavar="N,…", at_least=1, parse=parse_numbers)] = (1, 16)
    requests: Annotated[int, Flag("streams per round (default: 32)", metavar="N", at_least=1)] = 32
    rounds: Annotated[int, Flag("of every path (default: 11)", metavar="N", at_least=1)] = 11
    chunks: Annotated[int, Flag("events per stream (default: 64)", metavar="N", at_least=2)] = 64
    gap_ms: Annotated[float, Flag("between events (default: 5)", metavar="MS", at_least=0)] = 5.0
    engine_port: Annotated[
        int | None, Flag("of the mock engine (default: a free one)", metavar="P", at_least=1, at_most=LAST_PORT)
    ] = None
    workers: Annotated[
        tuple[int, ...],
        Flag("the gateway with so many processes, too", metavar="N,…", at_least=2, parse=parse_numbers),
    ] = ()
    start: Annotated[
        tuple[tuple[str, str], ...],
        Flag(
            "a relay to run beside the gateway, with {engine} and {port}; repeatable",
            metavar="NAME=COMMAND",
            parse=parse_start,
            repeated=True,
        ),
    ] = ()
    peer: Annotated[
        tuple[tuple[str, str], ...],
        Flag("a relay that runs already; repeatable", metavar="NAME=URL", parse=parse_peer, repeated=True),
    ] = ()
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    def __post_init__(self) -> None:
        """Refuse values outside of their bounds, and names that another path has."""
        check_bounds(self)
        taken = [DIRECT, SPLICE, GATEWAY, *map(name_workers, self.workers)]
        for name, _ in (*self.start, *self.peer):
            if name in taken or "/" in name:
                expected = f"a name of its own, without a slash, beside {', '.join(taken)}"
                raise FlagError(f"--start and --peer: expected {expected}, got {name}; choose another")
            taken.append(name)


def name_workers(count: int) -> str:
    """Name the path through a gateway of several processes."""
    return f"{GATEWAY} {count} workers"


@dataclass(frozen=True, kw_only=True)
class SoakConfig(BoundedConfig):
    """How many requests of every kind go through the gateway; the files go to `out`."""

    requests: Annotated[int, Flag("in all (default: 216000)", metavar="N", at_least=1)] = 216_000
    streams: Annotated[int, Flag("at once (default: 32)", metavar="N", at_least=1)] = 32
    seed: Annotated[int, Flag("of the order of requests (default: 0)", at_least=0, at_most=MOST_SEED)] = 0
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]
