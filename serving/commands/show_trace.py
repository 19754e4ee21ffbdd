"""`laguna traces show`: one recorded request: versions, times, tokens; its text where a model is given."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import Flag
from laguna_serve.serving.kit.tables import Table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from laguna_serve.serving.gateway.traces.store import Trace

DESCRIPTION = """Shows the answers to one request as they were recorded. A file of traces has no text: with --model the
token ids are read by that folder's tokenizer.json, which must be the one that they were made with."""
EXAMPLES = """examples:
  laguna traces show traces.db 3f2a…                              the id is the answer's X-Request-ID
  laguna traces show traces.db 3f2a… --tokens --model tests/toy/teacher
"""
# What a terminal would obey.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ShowError(CommandError):
    """A request or a tokenizer that is not there, as one line."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Which request, and how much of it."""

    file: Annotated[Path, Flag("of traces: traces.file of gateway.toml", positional=True, metavar="FILE")]
    id: Annotated[str, Flag("of the request", positional=True, metavar="ID")]
    tokens: Annotated[bool, Flag("a line for every token of the answer, with its log-probability")] = False
    model: Annotated[Path | None, Flag("folder with the tokenizer.json that reads the ids", metavar="FOLDER")] = None


class ShownAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One of a request's answers, without its tokens.

    Attributes:
        ended: UTC.
        temperature: as the request said, else its engine's own default; None where that is not known.
        logprob_sum, logprob_mean: of its tokens, nats; None where they were not asked for.
        prompt, answer: their text; None without a tokenizer.
    """

    choice: int
    model: str
    engine: str
    key: str | None
    ended: str
    first_token_s: float | None
    total_s: float
    weight_versions: tuple[str, ...]
    draft_versions: tuple[str, ...]
    temperature: float | None
    seed: int | None
    finish_reason: str | None
    prompt_tokens: int
    output_tokens: int
    logprob_sum: float | None
    logprob_mean: float | None
    has_experts: bool
    speculation: str | None
    prompt: str | None
    answer: str | None


class TraceResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.trace/1"):
    """What a gateway recorded of one request, an item per answer."""

    file: str
    id: str
    answers: list[ShownAnswer]


def show(config: ShowConfig) -> tuple[TraceResult, str]:
    """Read a request; for programs and for people. Raises TraceFileError, ShowError."""
    from laguna_serve.serving.gateway.traces.store import TraceFile

    file = TraceFile(config.file)
    try:
        traces = list(file.read("request_id = ?", [config.id]))
    finally:
        file.close()
    if not traces:
        raise ShowError(
            f"{config.id}: expected a request that {config.file} has, got none; the id is the answer's X-Request-ID, "
            "and only whole answers with return_token_ids are recorded"
        )
    tokenizer = None if config.model is None else load_tokenizer(config.model)
    answers = [describe(trace, tokenizer) for trace in traces]
    blocks = [
        "\n".join([render(config.id, answer, len(traces)), *([list_tokens(trace, tokenizer)] if config.tokens else [])])
        for answer, trace in zip(answers, traces, strict=True)
    ]
    return TraceResult(file=str(config.file), id=config.id, answers=answers), "\n\n".join(blocks)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a folder's tokenizer.json. Raises ShowError: there is none, or it cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ShowError(f"--model: expected a folder with a tokenizer.json, got {folder}; leave it out for ids alone")
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no class of its own
        raise ShowError(f"{path}: expected a tokenizer, got {error}; leave --model out for ids alone") from None


def describe(trace: Trace, tokenizer: Tokenizer | None) -> ShownAnswer:
    """Describe an answer; with its text where there is a tokenizer."""
    total = None if trace.logprobs is None else math.fsum(trace.logprobs)
    return ShownAnswer(
        choice=trace.choice,
        model=trace.model,
        engine=trace.engine,
        key=trace.key,
        ended=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(trace.time)),
        first_token_s=trace.first_token_s,
        total_s=trace.total_s,
        weight_versions=trace.weight_versions,
        draft_versions=trace.draft_versions,
        temperature=trace.temperature,
        seed=trace.seed,
        finish_reason=trace.finish_reason,
        prompt_tokens=len(trace.prompt_token_ids),
        output_tokens=len(trace.token_ids),
        logprob_sum=total,
        logprob_mean=None if total is None else total / len(trace.token_ids),
        has_experts=trace.routed_experts is not None,
        speculation=trace.speculation,
        prompt=None if tokenizer is None else decode(tokenizer, trace.prompt_token_ids),
        answer=None if tokenizer is None else decode(tokenizer, trace.token_ids),
    )


def render(request: str, answer: ShownAnswer, choices: int) -> str:
    """Render an answer as lines under their heads."""
    first = "" if answer.first_token_s is None else f", first token after {answer.first_token_s:.3f} s"
    nats = "not asked for"
    if answer.logprob_sum is not None:
        nats = f"sum {answer.logprob_sum:.3f}, mean {answer.logprob_mean:.3f} nats"
    lines = {
        "request": f"{request}, answer {answer.choice + 1} of {choices}",
        "model": f"{answer.model} by {answer.engine}" + (f", for {answer.key}" if answer.key else ""),
        "ended": f"{answer.ended} UTC, {answer.total_s:.3f} s{first}",
        "weights": ", then ".join(answer.weight_versions),
        "drafter": ", then ".join(answer.draft_versions),
        "sampling": _tell_sampling(answer),
        "tokens": f"prompt {answer.prompt_tokens:,}, answer {answer.output_tokens:,}; {answer.finish_reason}",
        "logprobs": nats,
        "experts": "recorded" if answer.has_experts else "not asked for",
        "drafts": answer.speculation or "none reported",
    }
    shown = [f"{head:<9} {text}" for head, text in lines.items()]
    for head, text in (("prompt", answer.prompt), ("answer", answer.answer)):
        if text is not None:
            shown += [
                f"{head}:",
                *(f"  | {line}" for line in CONTROL.sub("\N{REPLACEMENT CHARACTER}", text).split("\n")),
            ]
    return "\n".join(shown)


def _tell_sampling(answer: ShownAnswer) -> str:
    warmth = "temperature not stated" if answer.temperature is None else f"temperature {answer.temperature:g}"
    return warmth + ("" if answer.seed is None else f", seed {answer.seed}")


def list_tokens(trace: Trace, tokenizer: Tokenizer | None) -> str:
    """List the answer's tokens: place, id, log-probability, text."""
    logprobs: Sequence[float | None] = trace.logprobs or [None] * len(trace.token_ids)
    rows = [
        (
            str(place),
            str(token),
            "" if logprob is None else f"{logprob:.4f}",
            "" if tokenizer is None else repr(decode(tokenizer, [token])),
        )
        for place, (token, logprob) in enumerate(zip(trace.token_ids, logprobs, strict=True))
    ]
    return Table("rrrl", ("place", "id", "logprob", "text"), rows).to_text()


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Read ids, with the special ones among them."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    return text
