"""How long a client waits for its first token where two models share the room for one, and must change places.

Time to first token of a gateway that owns both engines (docs/gateway.md): warm, with room for both; cold, the first
request of a model; swap, where the other model is ended first; woken (--sleep-level, on a GPU), where both engines run
and one sleeps. Beside them restart: what a script does, which ends one engine, starts the other and asks it as soon as
it is healthy. All in turn, in rounds. The gateway's own count of loads and evictions says whether each was what it is
called. DIR gets swap.json, written anew after every round, and swap.md.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, ClassVar

from laguna_serve.bench.arms.arms import check_answers
from laguna_serve.bench.stats.quartiles import find_quartiles
from laguna_serve.bench.swap.report import WHAT, render_markdown, render_text
from laguna_serve.bench.swap.result import Situation, SituationName, SwapResult
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.records import Prompt, Record
from laguna_serve.serving.engine import Engine, EngineError
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.gateway.config.owned import OwnedEngine
from laguna_serve.serving.gateway.residence.plans import make_engine_config, plan_bytes
from laguna_serve.serving.gateway.run import Background, open_background
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.environment import (
    Environment,
    OtherLoad,
    current_argv,
    read_environment,
)
from laguna_serve.serving.kit.files import expand, write_text
from laguna_serve.serving.kit.flags import Flag, FlagError, Quick, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import JsonObject, write_result
from laguna_serve.serving.kit.run_dir import hold_out
from laguna_serve.serving.machine.memory import GIB
from laguna_serve.serving.planning.launch import check_launches, require_device

__all__ = ["SwapConfig", "SwapResult", "main", "measure_swaps"]
EXAMPLES = """
examples:
  python bench/swap --model tests/toy/teacher --model tests/toy/dense --out out/swap
  python bench/swap --model tests/toy/teacher --model tests/toy/dense --quick --out out/swap
  python bench/swap --model poolside/Laguna-XS.2 --model ./student --kv-cache-gib 8 --sleep-level 1 --out out/swap

exit status: 0 measured, 2 could not run, 130 interrupted: swap.json has the rounds that are done
"""
PROMPT = Prompt("prompt", "def add(a, b):\n")
# Requests of a round for every time that both models are in memory.
WARM = 5
# Room for the larger of two, as it was measured, and no second one.
HEADROOM = 1.3


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """Two models, and the room that they share; files go to `out`."""

    model: Annotated[
        tuple[str, ...], Flag("checkpoint, folder or hub id; given twice", metavar="M", group="engines", repeated=True)
    ]
    eager: Annotated[bool, Flag("no compilation: starts fast, runs slowly")] = False
    kv_cache_gib: Annotated[float, Flag("KV cache of each engine (default: 1)", metavar="G", at_least=0.01)] = 1.0
    max_model_len: Annotated[int, Flag("longest prompt and answer (default: 256)", metavar="N", at_least=32)] = 256
    sleep_level: Annotated[
        int, Flag("of vLLM's: measure engines that sleep, too; needs a GPU (default: 0, none)", metavar="L", at_least=0)
    ] = 0
    rest: Annotated[
        float,
        Flag("seconds that an engine is there before a swap is measured again (default: 10)", metavar="S", at_least=0),
    ] = 10.0
    rounds: Annotated[
        int, Flag("every situation in each (default: 5)", metavar="N", at_least=1, group="what to ask")
    ] = 5
    max_tokens: Annotated[int, Flag("output tokens per request (default: 8)", metavar="N", at_least=1)] = 8
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    QUICK: ClassVar = Quick("one round, not compiled", {"rounds": 1, "eager": True})

    def __post_init__(self) -> None:
        """Refuse anything but two models. Raises FlagError."""
        check_bounds(self)
        if len(self.model) != 2 or len(self.names) != 2:
            got = ", ".join(self.model) or "none"
            remedy = "give the flag twice, or one of them a link of another name"
            raise FlagError(f"--model: expected two checkpoints of different names, got {got}; {remedy}")
        if self.sleep_level > 2:
            raise FlagError(f"--sleep-level: expected 0, 1 or 2, got {self.sleep_level}")

    @property
    def names(self) -> dict[str, str]:
        """Find the checkpoint of each name in requests, which is its folder's."""
        return {expand(model).resolve().name: model for model in self.model}

    def make_table(self, model: str, log: str, sleep_level: int = 0) -> OwnedEngine:
        """Make a model's engine, whose log goes to a file of `out`."""
        return OwnedEngine(
            model=model,
            eager=self.eager,
            kv_cache_gib=self.kv_cache_gib,
            max_model_len=self.max_model_len,
            sleep_level=sleep_level,
            log=str(self.out / f"{log}.log"),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "bench/swap",
        SwapConfig,
        __doc__,
        EXAMPLES,
        measures=True,
        interrupted="swap.json has the rounds that were done, if any",
    )
    return command.run(argv, measure_swaps, show=render_text, line=Brief())


@hold_out
def measure_swaps(config: SwapConfig) -> SwapResult:
    """Ask both models in every situation, round after round; write swap.json and swap.md to `config.out`.

    Raises:
        FlagError: there is no GPU for engines to sleep on.
        RunDirError: `out` cannot be a folder.
        EngineError: an engine cannot or did not start, a request failed, or the room was not for one model.
    """
    device = require_device()
    if config.sleep_level and device.kind == "cpu":
        raise FlagError("--sleep-level: expected a GPU, got a CPU, on which vLLM's engines do not sleep; leave it out")
    engines = [make_engine_config(name, config.make_table(model, name)) for name, model in config.names.items()]
    for engine in engines:
        check_answers(engine, config.max_tokens)
    check_launches(engines)
    measured = _Run(config)
    environment, load, progress = read_environment(current_argv()), OtherLoad(), Progress()
    parts = [measured.ask_by_turns, measured.restart, *([measured.wake] if config.sleep_level else [])]
    for number in range(config.rounds):
        turn = number % len(parts)
        for part in (measured.ask_side_by_side, *parts[turn:], *parts[:turn]):
            progress.say(f"round {number + 1} of {config.rounds}: {part.__name__.replace('_', ' ')}")
            part()
        measured.end_round()
        result = measured.sum_up(load.note(environment))
        write_result(config.out / "swap.json", result)
        write_text(config.out / "swap.md", render_markdown(result))
    return result


@dataclass
class _Run:
    """What was measured so far.

    Attributes:
        ttft_s: by situation and model.
        ratios, rested: swaps ÷ restarts, of every round; of engines that have been there for a while.
        held_gib: what each model's engine takes.
    """

    config: SwapConfig
    ttft_s: dict[tuple[SituationName, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    ratios: list[float] = field(default_factory=list)
    rested: list[float] = field(default_factory=list)
    held_gib: dict[str, float] = field(default_factory=dict)

    @property
    def room_gib(self) -> float:
        """Return the memory of the group in which one model makes way for the other, in GiB."""
        return HEADROOM * max(self.held_gib.values())

    def ask_side_by_side(self) -> None:
        """Start each with its first request, then ask both in turn; see what their engines take."""
        planned = [plan_bytes(name, self.config.make_table(model, name)) for name, model in self.config.names.items()]
        with self._open(gib=2 * sum(planned) / GIB) as gateway:
            for name in self.config.names:
                self._note("cold", name, gateway.url)
            for _ in range(WARM):
                for name in self.config.names:
                    self._note("warm", name, gateway.url)
            for name, model in _read_models(gateway).items():
                if model["loads"] != 1:
                    raise EngineError(
                        f"{name}: expected one load with room for both, got {model['loads']}; see its log"
                    )
                self.held_gib[name] = model["memory_bytes"] / GIB

    def ask_by_turns(self) -> None:
        """Ask each while the other one has the room."""
        first, second = self.config.names
        with self._open(gib=self.room_gib) as gateway:
            self._note("cold", first, gateway.url)
            for name in (second, first):
                self._note("swap", name, gateway.url)
            for name in (second, first):
                time.sleep(self.config.rest)
                self._note("rested", name, gateway.url)
            found = {name: (model["loads"], model["evictions"]) for name, model in _read_models(gateway).items()}
            if found != {first: (3, 2), second: (2, 2)}:
                room = f"room for one model in {self.room_gib:.2f} GiB"
                raise EngineError(f"memory: expected {room}, got (loads, evictions) {found}; see their logs")

    def wake(self) -> None:
        """Ask each while it sleeps and the other one is awake."""
        first, second = self.config.names
        with self._open(gib=self.room_gib, sleep_level=self.config.sleep_level) as gateway:
            for name in (first, second):
                self._ask(name, gateway.url)
            for name in (first, second):
                self._note("woken", name, gateway.url)
            found = {name: (model["loads"], model["wakes"]) for name, model in _read_models(gateway).items()}
            if found != dict.fromkeys(self.config.names, (2, 1)):
                expected = f"{self.room_gib:.2f} GiB to hold one model beside one asleep"
                raise EngineError(f"memory: expected {expected}, got (loads, wakes) {found}; see their logs")

    def restart(self) -> None:
        """End an engine and start the other one, as a script would."""
        first, second = self.config.names
        with ExitStack() as running:
            running.enter_context(self._make_engine(first))
            for name in (second, first):
                began = time.perf_counter()
                running.close()
                engine = running.enter_context(self._make_engine(name))
                self._ask(name, engine.base_url)
                self.ttft_s["restart", name].append(time.perf_counter() - began)

    def end_round(self) -> None:
        """Compare the round's swaps with its restarts."""
        kinds: tuple[SituationName, ...] = ("swap", "rested", "restart")
        swap, rested, restart = (fmean(self.ttft_s[kind, name][-1] for name in self.config.names) for kind in kinds)
        self.ratios.append(swap / restart)
        self.rested.append(rested / restart)

    def sum_up(self, environment: Environment) -> SwapResult:
        """Everything so far, by situation."""
        config = self.config
        first, second = config.names
        return SwapResult(
            environment=environment,
            models=(first, second),
            max_tokens=config.max_tokens,
            eager=config.eager,
            kv_cache_gib=config.kv_cache_gib,
            memory_gib=self.room_gib,
            sleep_level=config.sleep_level,
            rounds=len(self.ratios),
            situations=[
                Situation(name=kind, model=name, ttft_s=seconds, spread=find_quartiles(seconds))
                for kind in WHAT
                for name in config.names
                if (seconds := self.ttft_s.get((kind, name)))
            ],
            swap_to_restart=find_quartiles(self.ratios),
            rest_s=config.rest,
            rested_to_restart=find_quartiles(self.rested),
        )

    @contextmanager
    def _open(self, *, gib: float, sleep_level: int = 0) -> Iterator[Background]:
        """Open a gateway whose engines have so much memory together."""
        models = []
        for name, model in self.config.names.items():
            engine = self.config.make_table(model, name, sleep_level).model_dump()
            models.append({"name": name, "engine": {**engine, "memory_gib": self.held_gib.get(name)}})
        tables = {"server": {"port": 0}, "models": models, "groups": [{"name": "default", "memory_gib": gib}]}
        with open_background(parse_config(tables, "bench/swap")) as gateway:
            yield gateway

    def _make_engine(self, name: str) -> Engine:
        table = self.config.make_table(self.config.names[name], f"{name}-by-hand")
        return Engine(make_engine_config(name, table), log_path=Path(str(table.log)))

    def _note(self, kind: SituationName, name: str, url: str) -> None:
        self.ttft_s[kind, name].append(self._ask(name, url))

    def _ask(self, name: str, url: str) -> float:
        """Ask, and return the seconds to the first token. Raises EngineError: the request failed."""

        async def stream() -> Record:
            async with open_session() as session:
                (record,) = await Client(session, url, name, self.config.max_tokens).run_round([PROMPT])
                return record

        record = asyncio.run(stream())
        if record.error is not None or not record.chunk_ns:
            raise EngineError(f"{name}: expected an answer at {url}, got {record.error or 'no token'}; see its log")
        return (record.chunk_ns[0] - record.started_ns) / 1e9


def _read_models(gateway: Background) -> dict[str, JsonObject]:
    """Read what the gateway says of its models, by name."""

    async def read() -> dict[str, JsonObject]:
        async with open_session() as session, session.get(f"{gateway.admin_url}/admin/models") as answer:
            models: dict[str, JsonObject] = (await answer.json())["models"]
            return models

    return asyncio.run(read())
