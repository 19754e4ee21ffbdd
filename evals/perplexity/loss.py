"""The loss of one model on a text or an array of tokens: configuration, measurement, result."""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from laguna_serve.evals.perplexity.endpoint import ScoringEndpoint, check_vocabulary, open_endpoint, score_rows
from laguna_serve.evals.perplexity.loss_report import (
    AskedEndpoint,
    Bounded,
    Data,
    LossResult,
    render_markdown,
)
from laguna_serve.evals.perplexity.mean import Mean, average, to_bits_per_byte
from laguna_serve.evals.perplexity.rows import (
    Row,
    RowsError,
    check_length,
    choose_evenly,
    cut_rows,
    digest_rows,
    read_array,
    read_documents,
)
from laguna_serve.evals.perplexity.scored import ScoredRows
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.kit.environment import Environment, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import claim_folder, hold_out

USUAL_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is measured, and how. One of `text` and `tokens`."""

    base_url: Annotated[str, Flag("vLLM or a gateway, with or without /v1", metavar="URL")]
    text: Annotated[
        Path | None, Flag('UTF-8 text; of a .jsonl the "text" or "prompt" of each line is a document', metavar="FILE")
    ] = None
    tokens: Annotated[Path | None, Flag("token ids, an integer array [N, L]", metavar="FILE.npy")] = None
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]
    model: Annotated[str | None, Flag("served model name (default: the endpoint's first)", metavar="NAME")] = None
    api_key_env: Annotated[str | None, Flag("environment variable that holds the API key", metavar="NAME")] = None
    length: Annotated[
        int | None,
        Flag(
            f"text: tokens in a row (default: the most that the endpoint takes, at most {USUAL_LENGTH})",
            metavar="N",
            at_least=2,
        ),
    ] = None
    stride: Annotated[
        int | None, Flag("text: tokens from row to row (default: the length)", metavar="N", at_least=1)
    ] = None
    pad_id: Annotated[int | None, Flag("tokens: id that pads the rows' ends", metavar="ID")] = None
    rows: Annotated[int | None, Flag("evenly spaced rows to score (default: all)", metavar="N", at_least=1)] = None
    concurrency: Annotated[int, Flag("rows in flight (default: 8)", metavar="N", at_least=1)] = 8

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if (self.text is None) == (self.tokens is None):
            got = "neither" if self.text is None else "both"
            raise FlagError(f"--text and --tokens: expected one of them, got {got}")
        if self.text is None and (self.length is not None or self.stride is not None):
            expected = "expected --text beside them, got --tokens, which has rows"
            raise FlagError(f"--length and --stride: {expected}; leave them out")
        if self.tokens is None and self.pad_id is not None:
            raise FlagError("--pad-id: expected --tokens beside it, got --text, which is not padded; leave it out")
        if self.api_key_env is not None and not self.api_key:
            raise FlagError(f"--api-key-env: expected the key in ${self.api_key_env}, got nothing; export it")

    @property
    def api_key(self) -> str | None:
        """The endpoint's key, from the environment."""
        return None if self.api_key_env is None else os.environ.get(self.api_key_env)


@dataclass(frozen=True, slots=True)
class Source:
    """What was read from the file: documents to be cut, or rows. `name` is for people."""

    name: str
    documents: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return sum(len(document.encode()) for document in self.documents)


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows to score, and of text the tokens it has in all, without special ones."""

    rows: list[Row]
    text_tokens: int = 0
    length: int | None = None
    stride: int | None = None


@hold_out
def measure_loss(config: LossConfig) -> LossResult:
    """Score the rows that `config.out` lacks, average, and write loss.json and loss.md there.

    Raises:
        RowsError: the file cannot be used, or its rows are too long for the endpoint.
        EndpointError: no endpoint, or it failed; what was scored is kept.
        RunDirError: the folder holds another measurement.
    """
    source = read_source(config)
    environment = read_environment(current_argv())
    result = asyncio.run(_measure(config, source, environment))
    write_result(config.out / "loss.json", result)
    write_text(config.out / "loss.md", render_markdown(result))
    return result


def read_source(config: LossConfig) -> Source:
    """Read the file that is asked for. Raises RowsError."""
    if config.text is not None:
        return Source(config.text.name, documents=tuple(read_documents(config.text)))
    assert config.tokens is not None
    return Source(config.tokens.name, rows=tuple(read_array(config.tokens, config.pad_id)))


async def _measure(config: LossConfig, source: Source, environment: Environment) -> LossResult:
    progress = Progress()
    async with open_session() as session:
        endpoint = await open_endpoint(session, config.base_url, config.model, config.api_key)
        cut = await cut_source(endpoint, source, config)
        settings = {"model": endpoint.model_name, "root": endpoint.root, "rows": digest_rows(cut.rows)}
        claim_folder(config.out, settings)
        scored = ScoredRows(config.out / "rows.jsonl")
        missing = len(cut.rows) - len(scored.nats)
        progress.say(f"{source.name}: {len(cut.rows)} rows, {missing} of them to score, by {endpoint.model_name}")
        progress.begin()
        await score_rows(
            endpoint, cut.rows, scored, config.concurrency, lambda done: progress.step("rows", done, missing)
        )
    mean = average(cut.rows, scored.nats)
    return LossResult(
        environment=environment,
        endpoint=AskedEndpoint(endpoint.model_name, endpoint.root, endpoint.max_model_len),
        data=_describe_data(source, cut),
        loss=mean,
        perplexity=_find_perplexity(mean),
        bits_per_byte=_find_bits(source, cut, mean),
    )


async def cut_source(endpoint: ScoringEndpoint, source: Source, config: LossConfig) -> Cut:
    """Cut the source into rows to score, every one of which the endpoint takes.

    Raises:
        RowsError: rows too long for it, or text too short for one.
        EndpointError: the endpoint failed, or takes no such token ids.
    """
    most = endpoint.max_model_len - 1  # one token is always generated
    if source.rows:
        rows = choose_evenly(source.rows, config.rows)
        check_length(rows, most, source.name)
        await check_vocabulary(endpoint, rows, source.name)
        return Cut(rows)
    length = min(USUAL_LENGTH, most) if config.length is None else config.length
    stride = length if config.stride is None else config.stride
    if length > most:
        raise RowsError(f"--length: expected at most {most} (the endpoint's longest sequence less one), got {length}")
    if not 1 <= stride <= length:
        raise RowsError(f"--stride: expected 1 to {length}, the rows' length, got {stride}; leave it out for {length}")
    documents = [await endpoint.tokenize(document) for document in source.documents]
    rows = [row for number, ids in enumerate(documents) for row in cut_rows(number, ids, length, stride)]
    if not rows:
        raise RowsError(f"{source.name}: expected at least 2 tokens of text, got fewer; pass more text")
    special = len(await endpoint.tokenize("a")) - len(await endpoint.tokenize("a", special=False))
    text_tokens = sum(len(ids) - special for ids in documents)
    return Cut(choose_evenly(rows, config.rows), text_tokens, length, stride)


def _describe_data(source: Source, cut: Cut) -> Data:
    is_text = bool(source.documents)
    return Data(
        source=source.name,
        documents=len(source.documents) or None,
        rows=len(cut.rows),
        scored_tokens=sum(row.scored for row in cut.rows),
        length=cut.length,
        stride=cut.stride,
        sha256=digest_rows(cut.rows),
        text_tokens=cut.text_tokens if is_text else msgspec.UNSET,
        text_bytes=source.text_bytes if is_text else msgspec.UNSET,
    )


def _find_perplexity(mean: Mean) -> Bounded:
    try:
        return Bounded(math.exp(mean.nats_per_token), mean.ci95 and [math.exp(bound) for bound in mean.ci95])
    except OverflowError:
        got = f"{mean.nats_per_token:g} nats a token"
        raise RowsError(f"loss: expected one whose perplexity is a number, got {got}; is the model sound?") from None


def _find_bits(source: Source, cut: Cut, mean: Mean) -> Bounded | None:
    if not source.documents:
        return None
    values = [mean.nats_per_token, *(mean.ci95 or ())]
    point, *interval = [to_bits_per_byte(value, cut.text_tokens, source.text_bytes) for value in values]
    return Bounded(point, interval or None)
