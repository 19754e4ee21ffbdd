"""Mean loss and perplexity of a model on a text or a token array, through an endpoint's prompt log-probabilities.

The mean is over scored tokens: every one counts the same, and the first of each row is not scored, as nothing stands
before it. Text is tokenised by the endpoint and cut into rows of --length tokens. A --stride below the length makes
rows overlap: a token is then scored in the first row that holds it, so that every token but a document's first counts
once, with at least length − stride tokens of context after the first row. Bits per byte = tokens of the text ÷ its
bytes × loss ÷ ln 2. The 95% interval draws documents, or rows where the documents are few.

DIR gets loss.json, loss.md and rows.jsonl, which grows as rows come in, so that the same command continues; the last
stdout line is one JSON object (schema laguna_serve.loss/1).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laguna_serve.evals.perplexity.endpoint import ScoringEndpoint, check_vocabulary, open_endpoint, score_rows
from laguna_serve.evals.perplexity.journal import Journal
from laguna_serve.evals.perplexity.mean import average, to_bits_per_byte
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
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.kit.cli import CONTINUES, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder

SCHEMA = "laguna_serve.loss/1"
USUAL_LENGTH = 512
EXAMPLES = """
examples:
  python evals/loss.py --base-url http://127.0.0.1:8000 --text held-out.jsonl --out out/loss
  python evals/loss.py --base-url http://127.0.0.1:8000 --tokens chunks.npy --pad-id 0 --out out/loss
  python evals/loss.py --base-url https://gateway.example/v1 --model laguna --api-key-env LAGUNA_KEY \\
      --text book.txt --length 2048 --stride 1024 --out out/loss

exit status:
  0    held: measured
  2    could not run: bad input, or the endpoint failed; what was scored is kept
  130  interrupted: the same command continues
"""


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("loss.py", lambda: run(args), interrupted=CONTINUES)


def run(args: argparse.Namespace) -> int:
    """Score what is missing, write the result and print it. Returns the exit status."""
    out = Path(args.out)
    source = read_source(args)
    environment = describe_environment(current_argv())
    result = asyncio.run(measure(args, source, Progress()))
    result = {"schema": SCHEMA, "environment": environment, **result}
    write_json(out / "loss.json", result)
    write_text(out / "loss.md", render_markdown(result))
    print_result(render_text(result), result, out, always_json=args.json)
    return HELD


def read_source(args: argparse.Namespace) -> Source:
    """The file that is asked for. Raises RowsError."""
    if args.text is not None:
        return Source(Path(args.text).name, documents=tuple(read_documents(Path(args.text))))
    return Source(Path(args.tokens).name, rows=tuple(read_array(Path(args.tokens), args.pad_id)))


async def measure(args: argparse.Namespace, source: Source, progress: Progress) -> dict[str, Any]:
    """Cut, score what the folder lacks, and average."""
    async with open_session() as session:
        endpoint = await open_endpoint(session, args.base_url, args.model, args.api_key)
        cut = await cut_source(endpoint, source, args)
        settings = {"model": endpoint.model_name, "root": endpoint.root, "rows": digest_rows(cut.rows)}
        claim_folder(Path(args.out), settings)
        journal = Journal(Path(args.out) / "rows.jsonl")
        missing = len(cut.rows) - len(journal.nats)
        progress.say(f"{source.name}: {len(cut.rows)} rows, {missing} of them to score, by {endpoint.model_name}")
        progress.begin()
        await score_rows(
            endpoint, cut.rows, journal, args.concurrency, lambda done: progress.step("rows", done, missing)
        )
    return describe(endpoint, source, cut, journal)


async def cut_source(endpoint: ScoringEndpoint, source: Source, args: argparse.Namespace) -> Cut:
    """The rows to score, every one of which the endpoint takes.

    Raises:
        RowsError: rows too long for it, or text too short for one.
        EndpointError: the endpoint failed, or takes no such token ids.
    """
    most = endpoint.max_model_len - 1  # one token is always generated
    if source.rows:
        rows = choose_evenly(source.rows, args.rows)
        check_length(rows, most, source.name)
        await check_vocabulary(endpoint, rows, source.name)
        return Cut(rows)
    length = min(USUAL_LENGTH, most) if args.length is None else args.length
    stride = length if args.stride is None else args.stride
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
    return Cut(choose_evenly(rows, args.rows), text_tokens, length, stride)


def describe(endpoint: ScoringEndpoint, source: Source, cut: Cut, journal: Journal) -> dict[str, Any]:
    """The result, JSON-ready."""
    mean = average(cut.rows, journal.nats)
    bounds = None if mean.ci95 is None else [math.exp(bound) for bound in mean.ci95]
    result: dict[str, Any] = {
        "endpoint": {"model": endpoint.model_name, "root": endpoint.root, "max_model_len": endpoint.max_model_len},
        "data": {
            "source": source.name,
            "documents": len(source.documents) or None,
            "rows": len(cut.rows),
            "scored_tokens": sum(row.scored for row in cut.rows),
            "length": cut.length,
            "stride": cut.stride,
            "sha256": digest_rows(cut.rows),
        },
        "loss": mean.to_json(),
        "perplexity": {"value": math.exp(mean.nats), "ci95": bounds},
        "bits_per_byte": None,
    }
    if source.documents:
        values = [mean.nats, *(mean.ci95 or ())]
        point, *interval = [to_bits_per_byte(value, cut.text_tokens, source.text_bytes) for value in values]
        result["bits_per_byte"] = {"value": point, "ci95": interval or None}
        result["data"] |= {"text_tokens": cut.text_tokens, "text_bytes": source.text_bytes}
    return result


def render_text(result: dict[str, Any]) -> str:
    """In columns."""
    lines = [f"{name:<16} {value:>10} {interval:>20}" for name, value, interval in _list_figures(result)]
    return "\n".join([f"{'':<16} {'':>10} {'95% interval':>20}", *lines, "", _tell_data(result)])


def render_markdown(result: dict[str, Any]) -> str:
    """The same as a page."""
    environment = result["environment"]
    lines = [f"# Loss of {result['endpoint']['model']} on {result['data']['source']}", ""]
    lines += ["| | | 95% interval |", "|--|--|--|"]
    lines += [f"| {name} | {value} | {interval} |" for name, value, interval in _list_figures(result)]
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return "\n".join([*lines, "", _tell_data(result), "", f"`{environment['command']}` on {where}; {versions}."]) + "\n"


def _list_figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    loss, bits = result["loss"], result["bits_per_byte"]
    figures = [("loss, nats/token", loss["nats_per_token"], loss["ci95"])]
    figures += [("perplexity", result["perplexity"]["value"], result["perplexity"]["ci95"])]
    figures += [] if bits is None else [("bits per byte", bits["value"], bits["ci95"])]
    return [
        (name, f"{value:.4f}", "–" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}")
        for name, value, interval in figures
    ]


def _tell_data(result: dict[str, Any]) -> str:
    data, loss = result["data"], result["loss"]
    cut = "" if data["length"] is None else f" of at most {data['length']} tokens, stride {data['stride']}"
    return (
        f"{data['scored_tokens']:,} tokens scored in {data['rows']} rows{cut}; the interval draws"
        f" {loss['units']} {loss['drawn']}."
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="evals/loss.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--base-url", metavar="URL", required=True, help="vLLM or a gateway, with or without /v1")
    source = parser.add_mutually_exclusive_group(required=True)
    text = 'UTF-8 text; of a .jsonl the "text" or "prompt" of each line is a document'
    source.add_argument("--text", metavar="FILE", help=text)
    source.add_argument("--tokens", metavar="FILE.npy", help="token ids, an integer array [N, L]")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(parser)
    parser.add_argument("--model", metavar="NAME", help="served model name (default: the endpoint's first)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    length = f"text: tokens in a row (default: the most that the endpoint takes, at most {USUAL_LENGTH})"
    parser.add_argument("--length", metavar="N", type=int, help=length)
    parser.add_argument("--stride", metavar="N", type=int, help="text: tokens from row to row (default: the length)")
    parser.add_argument("--pad-id", metavar="ID", type=int, help="tokens: id that pads the rows' ends")
    parser.add_argument("--rows", metavar="N", type=int, help="evenly spaced rows to score (default: all)")
    parser.add_argument("--concurrency", metavar="N", type=int, default=8, help="rows in flight (default: 8)")
    args = parser.parse_args(argv)
    args.api_key = None if args.api_key_env is None else os.environ.get(args.api_key_env)
    if args.api_key_env is not None and not args.api_key:
        parser.error(f"--api-key-env: expected the key in ${args.api_key_env}, got nothing; export it")
    for name, least in {"length": 2, "stride": 1, "rows": 1, "concurrency": 1}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name}: expected at least {least}, got {value}")
    if args.text is None and (args.length is not None or args.stride is not None):
        parser.error("--length and --stride: expected --text beside them, got --tokens, which has rows; leave them out")
    if args.tokens is None and args.pad_id is not None:
        parser.error("--pad-id: expected --tokens beside it, got --text, which is not padded; leave it out")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
