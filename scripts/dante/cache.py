"""Ask a teacher for the answers that a student is to learn: a cache of records in JSON Lines.

Each prompt gets a greedy answer with the log-probabilities of its likeliest tokens, and sampled ones, of any endpoint
that speaks OpenAI's API: vLLM, the gateway. Left out: prompts that occur twice, and prompts and answers that share 13
words in a row with a problem of --evaluations.

Writes shard-NNNNN.jsonl, cache.json and cache.png to --out. Every prompt's answers are noted as they come: the same
command continues, and with more prompts asks for what is new.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from laguna_serve.scripts.dante.asking import Manner, Said, ask_teacher, score_records
from laguna_serve.scripts.dante.overlap import join_text, list_grams, read_grams
from laguna_serve.scripts.training.dante.records import SHARDS, CacheError, CacheRecord, Prompt, read_prompts
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_SEED, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, hold_folder
from laguna_serve.serving.kit.tables import Table

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = ROOT / "evals" / "problem_sets" / "original.jsonl"
BINS = 20
EXAMPLES = """examples:
  python scripts/toy_text.py --training --prompts 200 --out prompts.jsonl
  python scripts/dante cache prompts.jsonl --endpoint http://127.0.0.1:8000 --out out/cache
  python scripts/dante cache prompts.jsonl --endpoint URL --evaluations gsm8k.jsonl --evaluations mbpp.jsonl --out DIR

prompts: JSON Lines of {"prompt": text} or {"messages": […]}.  OPENAI_API_KEY is sent to --endpoint if it is set.
exit status: 0 written, 2 it could not run, 130 interrupted (the same command continues)
"""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Whom to ask what, and how."""

    prompts: Annotated[Path, Flag("JSON Lines of prompts", positional=True)]
    endpoint: Annotated[str, Flag("that serves the teacher, as http://host:8000", metavar="URL")]
    out: Annotated[Path, Flag("folder for the shards", metavar="DIR")]
    model: Annotated[str | None, Flag("its name there (default: the first)", metavar="M")] = None
    max_tokens: Annotated[int, Flag("of an answer (default: 512)", metavar="N", at_least=1)] = 512
    samples: Annotated[int, Flag("sampled answers beside the greedy one (default: 4)", metavar="K", at_least=0)] = 4
    temperature: Annotated[float, Flag("of those (default: 0.7)", metavar="T", at_least=0)] = 0.7
    top_logprobs: Annotated[int, Flag("likeliest tokens that are asked for (default: 20)", at_least=1)] = 20
    concurrency: Annotated[int, Flag("prompts in flight (default: 8)", metavar="N", at_least=1)] = 8
    evaluations: Annotated[
        tuple[Path, ...],
        Flag("problems to be evaluated on, JSON Lines (default: this project's)", metavar="FILE", repeated=True),
    ] = (PROBLEMS,)
    openai_only: Annotated[bool, Flag("send no fields of vLLM's: its generation_config.json then has a say")] = False
    shard: Annotated[int, Flag("records of a shard (default: 4096)", metavar="N", at_least=1)] = 4096
    seed: Annotated[int, Flag("of the sampled answers (default: 42)", at_least=0, at_most=MOST_SEED)] = 42

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if self.samples and not self.temperature:
            raise FlagError("--temperature: expected more than 0, got 0: samples would all be the greedy answer")


class Counts(NamedTuple):
    """How many prompts there are, different ones of them, and of these without a problem's words."""

    given: int
    different: int
    clean: int


class CacheSpread(msgspec.Struct, frozen=True, kw_only=True):
    """A number over all records."""

    least: float
    median: float
    mean: float
    most: float


class CacheResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.dante_cache/1"):
    """What was asked, what is left of it, and how sure the teacher is.

    Attributes:
        prompts: lines of the file; those that occur again, overlap a problem or get no answer are not in `records`.
        empty: that the teacher says nothing to, or does not take, as they are longer than its context, say.
        contaminated_prompts, contaminated_answers: that share 13 words in a row with a problem.
        cut_off: records whose answer ended at --max-tokens.
        weight_versions: of the teacher, and how many records are of each.
        histogram: records by output_entropy: `edges` one more than `counts`.
    """

    out: str
    teacher: str
    prompts: int
    duplicates: int
    contaminated_prompts: int
    contaminated_answers: int
    empty: int
    records: int
    cut_off: int
    shards: int
    top_k: int
    weight_versions: dict[str, int]
    output_entropy: CacheSpread
    self_consistency: CacheSpread
    tail_mass: CacheSpread
    edges: tuple[float, ...]
    counts: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("scripts/dante cache", CacheConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
    return command.run(argv, make_cache, show=format_cache)


def make_cache(config: CacheConfig) -> CacheResult:
    """Ask for what is missing, and write the shards.

    Raises:
        CacheError: prompts or evaluations cannot be read, or nothing is left of the answers.
        EndpointError: there are no answers. RunDirError: --out holds another cache's.
    """
    check_out(config.out)
    every = read_prompts(config.prompts)
    prompts = list({msgspec.json.encode(prompt): prompt for prompt in every}.values())
    known = read_grams(config.evaluations)
    clean = [prompt for prompt in prompts if known.isdisjoint(list_grams(join_text(prompt)))]
    with hold_folder(config.out):
        said = _ask(config, clean)
        return _write(config, Counts(len(every), len(prompts), len(clean)), known, said)


def _write(config: CacheConfig, of: Counts, known: set[int], said: list[Said]) -> CacheResult:
    """Write the shards of what is kept of the answers, and what became of all."""
    spoken = [answer for answer in said if answer.text]
    kept = [answer for answer in spoken if known.isdisjoint(list_grams(answer.text))]
    if not kept:
        got = f"{of.given} prompts, {of.clean} of them different and clean, {len(spoken)} with an answer"
        raise CacheError(f"{config.prompts}: expected prompts with answers to keep, got none of {got}")
    records = score_records(kept)
    shards = _write_shards(config, records)
    entropies = np.array([record.output_entropy for record in records])
    counts, edges = np.histogram(entropies, BINS, (0.0, max(1e-6, float(entropies.max()))))
    result = CacheResult(
        out=str(config.out),
        teacher=records[0].teacher,
        prompts=of.given,
        duplicates=of.given - of.different,
        contaminated_prompts=of.different - of.clean,
        contaminated_answers=len(spoken) - len(kept),
        empty=of.clean - len(spoken),
        records=len(records),
        cut_off=sum(record.is_cut_off for record in records),
        shards=shards,
        top_k=min(record.top_k for record in records),
        weight_versions=dict(Counter(record.weight_version or "" for record in records)),
        output_entropy=_spread([record.output_entropy for record in records]),
        self_consistency=_spread([record.self_consistency for record in records]),
        tail_mass=_spread([record.tail_mass for record in records]),
        edges=tuple(round(float(edge), 6) for edge in edges),
        counts=tuple(map(int, counts)),
    )
    write_result(config.out / "cache.json", result)
    _draw(result, config.out / "cache.png")
    return result


def format_cache(result: CacheResult) -> str:
    """Format the counts, and how sure the teacher is, as tables."""
    counts = Table(
        "lr",
        ("of the prompts", ""),
        [
            ("given", f"{result.prompts}"),
            ("twice", f"{result.duplicates}"),
            ("overlap with a problem: prompt", f"{result.contaminated_prompts}"),
            ("overlap with a problem: answer", f"{result.contaminated_answers}"),
            ("without an answer", f"{result.empty}"),
            ("records", f"{result.records}"),
            ("of them cut off", f"{result.cut_off}"),
        ],
    )
    spreads = {"output entropy, nats": result.output_entropy, "self-consistency": result.self_consistency}
    spreads |= {f"mass beyond the top {result.top_k}": result.tail_mass}
    rows = [
        (name, *(f"{value:.3f}" for value in (one.least, one.median, one.mean, one.most)))
        for name, one in spreads.items()
    ]
    return f"{counts.to_text()}\n\n{Table('lrrrr', ('per record', 'least', 'median', 'mean', 'most'), rows).to_text()}"


def _ask(config: CacheConfig, prompts: list[Prompt]) -> list[Said]:
    manner = Manner(
        config.max_tokens, config.samples, config.temperature, config.top_logprobs, config.seed, config.openai_only
    )
    work = config.out / "work"
    claim_folder(work, {"manner": asdict(manner), "model": config.model}, alone=True)
    progress = Progress()
    journal = Journal(work / "answers.jsonl", Said, progress.say)
    asyncio.run(ask_teacher(prompts, manner, journal, config.endpoint, config.model, config.concurrency, progress))
    answers = {msgspec.json.encode(answer.prompt): answer for answer in journal.entries}
    found = (answers.get(msgspec.json.encode(prompt)) for prompt in prompts)
    return [answer for answer in found if answer is not None]


def _write_shards(config: CacheConfig, records: list[CacheRecord]) -> int:
    starts = range(0, len(records), config.shard)
    names = [f"shard-{number:05d}.jsonl" for number in range(len(starts))]
    for name, start in zip(names, starts, strict=True):
        lines = [json.dumps(msgspec.to_builtins(record)) for record in records[start : start + config.shard]]
        write_text(config.out / name, "\n".join(lines) + "\n")
    for path in config.out.glob(SHARDS):
        if path.name not in names:
            path.unlink()
    return len(names)


def _spread(values: list[float]) -> CacheSpread:
    array = np.array(values)
    least, median, mean, most = array.min(), np.median(array), array.mean(), array.max()
    return CacheSpread(
        least=round(float(least), 6),
        median=round(float(median), 6),
        mean=round(float(mean), 6),
        most=round(float(most), 6),
    )


def _draw(result: CacheResult, path: Path) -> None:
    from matplotlib.axes import Axes

    from laguna_serve.scripts.training.figure import draw_figure
    from laguna_serve.serving.kit.figures import GOOD

    def bars(axes: Axes) -> None:
        widths = np.diff(result.edges)
        axes.bar(result.edges[:-1], result.counts, width=widths, align="edge", color=GOOD, alpha=0.8)

    measure = f"records by mean token entropy of the greedy answer, nats; top {result.top_k} and one tail"
    source = f"{result.records} answers of {result.teacher}"
    draw_figure(path, "How sure the teacher is", measure, source, bars, along="output entropy, nats")


if __name__ == "__main__":
    sys.exit(main())
