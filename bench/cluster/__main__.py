"""Serve a model by two replicas on Ray, on this machine alone, and see that nothing is lost that need not be.

The tokens of two replicas against one engine's by itself; a replica killed under load, and an engine; one replica, two
under load, one again; new weights on both, on one that starts later, and weights that cannot be loaded. The client is
OpenAI's own, without retries. It runs in .venv-ray (bash scripts/client_env.sh ray). DIR gets cluster.json (schema
laguna_serve.cluster/1) and cluster.md.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from laguna_serve.bench.arms.arms import check_answers
from laguna_serve.bench.cluster.result import ClusterResult, Latency, render_markdown, render_text
from laguna_serve.bench.harness.prompts import load_texts, split_prompts
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.checkpoint.stored.weight_files import read_headers
from laguna_serve.serving.engine import Engine, EngineConfig, find_port
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import BoundedConfig, Flag
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import JsonObject, write_result
from laguna_serve.serving.kit.run_dir import hold_out
from laguna_serve.serving.planning.launch import check_launches

if TYPE_CHECKING:
    from laguna_serve.bench.cluster.load import Asker

EXAMPLES = """
examples:
  .venv-ray/bin/python bench/cluster --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --out out/cluster

exit status: 0 it held, 1 an answer or an outcome was not what it should be, 2 could not run
"""
NAME = "teacher"
KV_GIB, SEQUENCES = 0.25, 8
WEIGHTS = "model.safetensors"
# Of equal shape in the toy family's checkpoint; changed places make another model of it.
SWAPPED = ("model.layers.1.self_attn.o_proj.weight", "model.layers.2.self_attn.o_proj.weight")


@dataclass(frozen=True, kw_only=True)
class ClusterBenchConfig(BoundedConfig):
    """A model of the toy family, its prompts, and how hard it is pressed."""

    model: Annotated[Path, Flag("the toy teacher: a folder")]
    draft: Annotated[Path | None, Flag("its drafter: a folder")] = None
    prompts: Annotated[Path, Flag('JSONL, one {"prompt": "…"} per line', metavar="FILE")]
    num_prompts: Annotated[int, Flag("the first N prompts (default: 32)", metavar="N", at_least=4)] = 32
    max_tokens: Annotated[int, Flag("tokens of an answer (default: 64)", metavar="N", at_least=1)] = 64
    clients: Annotated[int, Flag("streams at once under load (default: 8)", metavar="N", at_least=2)] = 8
    routing: Annotated[Literal["power-of-two", "prefix"], Flag("Ray's router")] = "power-of-two"
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("bench/cluster", ClusterBenchConfig, __doc__, EXAMPLES, measures=True)
    return command.run(argv, prove, show=render_text, judge=lambda result: HELD if result.held else FELL_SHORT)


@hold_out
def prove(config: ClusterBenchConfig) -> ClusterResult:
    """Run all parts, and write cluster.json and cluster.md to `config.out`.

    Raises:
        CommandError: Ray is not there, an engine or the cluster did not do in time what it was to do.
    """
    try:
        from laguna_serve.bench.cluster import local, phases
        from laguna_serve.bench.cluster.load import compare
    except ModuleNotFoundError as error:
        remedy = "run it by .venv-ray/bin/python (bash scripts/client_env.sh ray makes it)"
        raise CommandError(f"bench/cluster: expected Ray and OpenAI's client, got no {error.name}; {remedy}") from None
    progress, load, environment = Progress(), OtherLoad(), read_environment(current_argv())
    prompts = [prompt.text for prompt in split_prompts(load_texts(config.prompts), config.num_prompts, 0)[0]]
    engine = make_engine(config, config.model)
    require_swappable(config.model)
    check_answers(engine, config.max_tokens)
    check_launches([engine])
    with tempfile.TemporaryDirectory(prefix="laguna-cluster-") as temporary:
        swapped = write_swapped(config.model, Path(temporary, "swapped"))
        progress.say("one engine by itself")
        expected, alone = ask_engine(config, config.model, prompts)
        expected_swapped, _ = ask_engine(config, swapped, prompts)
        before = local.list_descendants()
        tables = make_tables(config, Path(temporary, "weights.json"))
        progress.say("two replicas")
        started = time.monotonic()
        with local.local_cluster(tables, find_port("127.0.0.1")) as application:
            bench = phases.Bench(application, make_asker(config, application.url), prompts, config.clients)
            bench.wait_for_replicas(2)
            start_s = time.monotonic() - started
            agreement = compare(bench.asker.ask_all(prompts), expected, prompts)
            latency = bench.asker.measure(prompts)
            progress.say("killing a replica, then an engine")
            losses = [
                phases.measure_loss(bench, "replica", phases.kill_replica),
                phases.measure_loss(bench, "engine", phases.kill_engine),
            ]
            progress.say("one replica, two, one")
            scaling = phases.measure_scaling(bench, tables)
            progress.say("new weights")
            local.deploy(tables)

            def wait_for_late() -> str:
                lost = bench.wait_for_replicas(2)
                phases.kill_replica(lost[0])
                known = {state.replica for state in lost}
                return next(s.replica for s in bench.wait_for_replicas(2, lost[0].pid) if s.replica not in known)

            updates = phases.measure_updates(bench, swapped, expected_swapped, wait_for_late)
    result = ClusterResult(
        environment=load.note(environment),
        ray=metadata.version("ray"),
        openai=metadata.version("openai"),
        model=str(config.model),
        draft=None if config.draft is None else str(config.draft),
        routing=config.routing,
        max_tokens=config.max_tokens,
        start_s=round(start_s, 1),
        agreement=agreement,
        engine=alone,
        cluster=latency,
        losses=losses,
        scaling=scaling,
        updates=updates,
        left=local.count_left(before),
    )
    write_result(config.out / "cluster.json", result)
    write_text(config.out / "cluster.md", render_markdown(result))
    return result


def make_tables(config: ClusterBenchConfig, weights: Path) -> JsonObject:
    """Make the cluster's configuration, two replicas of one model; `weights` is the file that keeps their version."""
    engine: JsonObject = {"model": str(config.model.absolute()), "eager": True, "weight_updates": True}
    engine |= {"kv_cache_gib": KV_GIB, "max_num_seqs": SEQUENCES}
    if config.draft is not None:
        engine["draft"] = str(config.draft.absolute())
    replicas: JsonObject = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.5, "routing": config.routing}
    replicas |= {"shutdown_timeout_s": 30.0, "target_ongoing_requests": float(config.clients)}
    return {"models": [{"name": NAME, "engine": engine, "replicas": replicas}], "weights": {"file": str(weights)}}


def ask_engine(
    config: ClusterBenchConfig, model: Path, prompts: Sequence[str]
) -> tuple[dict[str, tuple[int, ...]], Latency]:
    """Ask one engine by itself, started as the replicas' are: its answers' tokens by prompt, and its latency."""
    with _engine(config, model) as engine:
        asker = make_asker(config, engine.base_url)
        answers = asker.ask_all(prompts)
        return {p: answer.tokens for p, answer in zip(prompts, answers, strict=True)}, asker.measure(prompts)


def make_asker(config: ClusterBenchConfig, url: str) -> Asker:
    """Make a client of an endpoint."""
    from laguna_serve.bench.cluster.load import Asker

    return Asker(url, NAME, config.max_tokens)


def require_swappable(model: Path) -> None:
    """Refuse a checkpoint in which no matrices can change places.

    Raises:
        CheckpointError: it has no such matrices, or not in one file.
    """
    tensors = read_headers(model) if (model / WEIGHTS).is_file() else {}
    if missing := [name for name in SWAPPED if name not in tensors]:
        raise CheckpointError(f"{model}: expected {missing[0]} in {WEIGHTS}, got none; give tests/toy/teacher")


def write_swapped(model: Path, folder: Path) -> Path:
    """Write the checkpoint with two of its matrices in each other's place. Returns the folder."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(model / WEIGHTS)
    one, other = SWAPPED
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / WEIGHTS)
    return folder


@contextmanager
def _engine(config: ClusterBenchConfig, model: Path) -> Iterator[Engine]:
    with Engine(make_engine(config, model), log_path=config.out / "engine.log") as engine:
        yield engine


def make_engine(config: ClusterBenchConfig, model: Path) -> EngineConfig:
    """Make an engine as the replicas' are."""
    return EngineConfig(
        model=str(model),
        draft=None if config.draft is None else str(config.draft),
        served_model_name=NAME,
        enforce_eager=True,
        kv_cache_gib=KV_GIB,
        max_num_seqs=SEQUENCES,
        weight_updates=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
