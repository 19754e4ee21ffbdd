"""Simulate how routers spread chats over replicas: prefix hits, shares of work and waits, for 1 to 64 replicas.

The same made-up trace of chats for every policy; load grows with the replicas. A replica is a few numbers, so that
policies can be told apart (replicas.py): no figure here is the speed of an engine. DIR gets routing.json (schema
laguna_serve.routing/1), routing.md and routing.png.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from laguna_serve.bench.routing.chats import Request, make_trace
from laguna_serve.bench.routing.policies import POLICIES
from laguna_serve.bench.routing.replicas import Machine, Replica
from laguna_serve.bench.routing.result import RoutingPoint, RoutingResult, draw, render_markdown, render_text
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_SEED, BoundedConfig, Flag, Quick
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import make_out

EXAMPLES = """
examples:
  python bench/routing --out out/routing
  python bench/routing --replicas 2,8 --sessions-per-s 0.6 --out out/routing

exit status: 0 done, 2 could not run
"""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(BoundedConfig):
    """How many replicas, and how much they have to do."""

    replicas: Annotated[tuple[int, ...], Flag("default: 1,2,4,8,16,32,64", metavar="N,…", at_least=1)] = (
        *(1, 2, 4, 8),
        *(16, 32, 64),
    )
    sessions: Annotated[int, Flag("of each replica (default: 200)", metavar="N", at_least=1)] = 200
    sessions_per_s: Annotated[float, Flag("of each replica (default: 0.5)", metavar="N", at_least=0.001)] = 0.5
    seed: Annotated[int, Flag("of the trace and of what is drawn (default: 0)", at_least=0, at_most=MOST_SEED)] = 0
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    QUICK: ClassVar = Quick("2 and 8 replicas, 50 sessions each", {"replicas": (2, 8), "sessions": 50})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return Command("bench/routing", RoutingConfig, __doc__, EXAMPLES).run(argv, simulate, show=render_text)


def simulate(config: RoutingConfig) -> RoutingResult:
    """Simulate every policy on every number of replicas, and write the files to `config.out`.

    Raises:
        RunDirError: the folder cannot be written to.
    """
    make_out(config.out)
    points = []
    for count in config.replicas:
        trace = make_trace(config.sessions * count, config.sessions_per_s * count, config.seed)
        points += [run_policy(name, trace, count, config.seed) for name in POLICIES]
    result = RoutingResult(
        environment=read_environment(current_argv()),
        sessions=config.sessions,
        sessions_per_s=config.sessions_per_s,
        seed=config.seed,
        points=points,
    )
    write_result(config.out / "routing.json", result)
    write_text(config.out / "routing.md", render_markdown(result))
    draw(result, config.out / "routing.png")
    return result


def run_policy(name: str, trace: Sequence[Request], count: int, seed: int) -> RoutingPoint:
    """Send a trace to so many replicas by a policy."""
    replicas = [Replica(Machine()) for _ in range(count)]
    choose = POLICIES[name](random.Random(seed))
    served = []
    for request in trace:
        for replica in replicas:
            replica.advance(request.at_s)
        served.append(replicas[choose(request, replicas)].serve(request))
    first = sorted(one.first_s for one in served)
    work = [replica.busy_s for replica in replicas]
    return RoutingPoint(
        policy=name,
        replicas=count,
        requests=len(served),
        hit_share=round(sum(one.cached_tokens for one in served) / sum(r.prompt_tokens for r in trace), 4),
        imbalance=round(max(work) / statistics.mean(work), 3),
        first_p50_s=round(first[len(first) // 2], 4),
        first_p99_s=round(first[min(len(first) - 1, int(len(first) * 0.99))], 4),
    )


if __name__ == "__main__":
    raise SystemExit(main())
