"""`laguna traces`: lists what a gateway has recorded, shows one of it, exports it for the drafter's trainer."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from laguna_serve.serving.client.traffic import TrafficRecord
from laguna_serve.serving.commands import show_trace
from laguna_serve.serving.kit.cli import Parser, choose_command
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_stream
from laguna_serve.serving.kit.flags import ANY, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.run_dir import check_out_file
from laguna_serve.serving.kit.tables import Table

if TYPE_CHECKING:
    from laguna_serve.serving.gateway.traces.store import Trace, TraceFile

DESCRIPTION = "What a gateway has recorded of its requests, in tokens (traces.file in gateway.toml)."
EXPORT = """Exports traces as JSON Lines: `traffic` is what `laguna drafter train --tokens` reads, tokens alone;
`full` has everything. Answers that ran under several versions of the weights, or at a temperature that is not known,
are left out of `traffic`, and counted; those that were cut off by an error never were recorded."""
EXPORT_EXAMPLES = """examples:
  laguna traces export traces.db --out traffic.jsonl
  laguna traces export traces.db --model policy --weight-version step-12 --format full --out rollouts.jsonl
"""
LIST_EXAMPLES = """examples:
  laguna traces list traces.db                      by model, versions and key
"""
# SQLite has no larger number.
MOST_ROWS = (1 << 63) - 1
# Engines in a message.
MOST_NAMED = 5
File = Annotated[Path, Flag("of traces: traces.file of gateway.toml", positional=True, metavar="FILE")]


class ExportError(CommandError):
    """Traces that cannot be exported, as one line."""


@dataclass(frozen=True, kw_only=True)
class TracesConfig:
    """Which of the traces in a file."""

    file: File
    model: Annotated[str | None, Flag("of this model alone")] = None
    weight_version: Annotated[str | None, Flag("that ran under this version of the weights alone")] = None
    key: Annotated[str | None, Flag("of requests under the key of this name alone")] = None
    last: Annotated[int | None, Flag("the last N of them", metavar="N", at_least=1, at_most=ANY)] = None

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in (self.model, self.weight_version, self.key):
            if name == "":
                raise FlagError("--model, --weight-version, --key: expected a name, got nothing; leave it out")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(TracesConfig):
    """Which of the traces in a file, and in which form."""

    out: Annotated[Path, Flag("file to write, whole or not at all", metavar="FILE")]
    format: Annotated[Literal["traffic", "full"], Flag("default traffic")] = "traffic"


class TracesResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.traces/1"):
    """How many answers there were, how many were exported, their tokens, and why others were left out."""

    file: str
    answers: int
    exported: int
    prompt_tokens: int
    output_tokens: int
    left_out_versions: int = 0
    left_out_temperature: int = 0


class LeftOut:
    """Answers that have no place in `traffic`, and why."""

    def __init__(self) -> None:
        self.versions = 0
        # Those at no known temperature, by their engines.
        self.engines = Counter[str]()

    def admit(self, trace: Trace) -> bool:
        """Say whether an answer has its place there; one that has none is counted."""
        if len(trace.weight_versions) != 1 or len(trace.draft_versions) != 1:
            self.versions += 1
        elif trace.temperature is None:
            self.engines[trace.engine] += 1
        else:
            return True
        return False

    def describe(self, total: int) -> Iterator[str]:
        """Describe what was left out of so many answers, a line for each reason."""
        if self.versions:
            yield f"{self.versions:,} of {total:,} answers left out: they ran under several versions of the weights"
        if self.engines:
            named = [f"{name} ({count:,})" for name, count in self.engines.most_common(MOST_NAMED)]
            more = len(self.engines) - len(named)
            yield (
                f"{self.engines.total():,} of {total:,} answers left out: their requests state no temperature, and none"
                f" is known of {', '.join(named)}{f' and {more:,} more' if more else ''}; for answers to come set"
                " default_temperature of these upstreams in gateway.toml, or state one in requests; --format full has"
                " all"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """`laguna traces`: one tool of several. Returns the exit status."""
    parser = Parser(prog="laguna traces", description=DESCRIPTION)
    tools = {
        "list": "count answers by model, versions and key",
        "show": "show the answers to one request",
        "export": "write them as JSON Lines",
    }
    tool, rest = choose_command(parser, tools, argv)
    if tool == "export":
        return Command("laguna traces export", ExportConfig, EXPORT, EXPORT_EXAMPLES).run(rest, export)
    if tool == "show":
        return _show(rest)
    rows: list[tuple[str, ...]] = []

    def act(config: TracesConfig) -> TracesResult:
        result, groups = count(config)
        rows[:] = groups
        return result

    heads = ("model", "weights", "drafter", "key", "answers", "prompt tokens", "tokens", "first", "last")
    command = Command("laguna traces list", TracesConfig, DESCRIPTION, LIST_EXAMPLES)
    return command.run(rest, act, show=lambda _: Table("llllrrrll", heads, rows).to_text())


def _show(argv: Sequence[str]) -> int:
    text = ""

    def act(config: show_trace.ShowConfig) -> show_trace.TraceResult:
        nonlocal text
        result, text = show_trace.show(config)
        return result

    command = Command("laguna traces show", show_trace.ShowConfig, show_trace.DESCRIPTION, show_trace.EXAMPLES)
    return command.run(argv, act, show=lambda _: text)


def export(config: ExportConfig) -> TracesResult:
    """Write the traces that were asked for.

    Raises:
        ExportError: there is nothing to write over an older file, which stays, or it is the one with the traces.
        RunDirError, TraceFileError, WriteError: as they say.
    """
    check_out_file(config.out)
    if config.out.exists() and config.file.exists() and config.out.samefile(config.file):
        raise ExportError("--out: expected a file to write, got the one with the traces; choose another")
    total, exported, prompts, tokens = 0, 0, 0, 0
    left_out = LeftOut()

    def write(file: object) -> None:
        nonlocal total, exported, prompts, tokens
        for trace in read(config):
            total += 1
            if config.format == "traffic" and not left_out.admit(trace):
                continue
            file.write(_encode(trace, config.format) + b"\n")  # type: ignore[attr-defined]
            exported, prompts = exported + 1, prompts + len(trace.prompt_token_ids)
            tokens += len(trace.token_ids)
        if not exported and config.out.is_file() and config.out.stat().st_size:
            got = "; ".join(left_out.describe(total)) or "none"
            expected = "expected answers to export over a file that has some"
            raise ExportError(f"{config.file}: {expected}, got {got}; see `laguna traces list`")

    write_stream(config.out, write)
    for line in left_out.describe(total):
        print(f"laguna: warning: {config.file}: {line}", file=sys.stderr)
    return TracesResult(
        file=str(config.file),
        answers=total,
        exported=exported,
        prompt_tokens=prompts,
        output_tokens=tokens,
        left_out_versions=left_out.versions,
        left_out_temperature=left_out.engines.total(),
    )


def _encode(trace: Trace, form: str) -> bytes:
    """Encode a line, of `traffic` one that has its place there."""
    if form == "full":
        return msgspec.json.encode(trace)
    (version,) = trace.weight_versions
    assert trace.temperature is not None
    return msgspec.json.encode(
        TrafficRecord(
            prompt_token_ids=trace.prompt_token_ids,
            token_ids=trace.token_ids,
            temperature=trace.temperature,
            seed=trace.seed,
            weight_version=version,
        )
    )


def count(config: TracesConfig) -> tuple[TracesResult, list[tuple[str, ...]]]:
    """Count the traces, and a row for every model, versions and key. Raises TraceFileError."""
    with _open(config) as (file, where, values):
        groups = file.count(where, values)
    rows = []
    for group in groups:
        counts = (f"{count:,}" for count in (group.answers, group.prompt_tokens, group.tokens))
        names = (group.model, group.weight_versions, group.draft_versions, group.key)
        rows.append((*names, *counts, _show_time(group.first), _show_time(group.last)))
    result = TracesResult(
        file=str(config.file),
        answers=sum(group.answers for group in groups),
        exported=0,
        prompt_tokens=sum(group.prompt_tokens for group in groups),
        output_tokens=sum(group.tokens for group in groups),
    )
    return result, rows


def read(config: TracesConfig) -> Iterator[Trace]:
    """Read the traces that were asked for, in the order in which they came. Raises TraceFileError."""
    with _open(config) as (file, where, values):
        yield from file.read(where, values)


@contextmanager
def _open(config: TracesConfig) -> Iterator[tuple[TraceFile, str, list[object]]]:
    """Open the file, with the SQL condition of what was asked for and its values. Raises TraceFileError."""
    from laguna_serve.serving.gateway.traces.store import TraceFile

    given = {"model": config.model, "weight_versions": config.weight_version, "key": config.key}
    asked = {name: value for name, value in given.items() if value is not None}
    where, values = " AND ".join(f"{name} = ?" for name in asked) or "1", list[object](asked.values())
    if config.last is not None:
        where = f"rowid IN (SELECT rowid FROM traces WHERE {where} ORDER BY rowid DESC LIMIT ?)"
        values.append(min(config.last, MOST_ROWS))
    with closing(TraceFile(config.file)) as file:
        yield file, where, values


def _show_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
