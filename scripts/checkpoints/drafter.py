"""`laguna drafter convert`: a DFlash drafter in the other published format, where the architectures permit it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from laguna_serve.scripts.checkpoints.drafters.agreement import TOLERANCE, measure_difference
from laguna_serve.scripts.checkpoints.drafters.algebra import Conversion, Tensors, to_laguna, to_speculators
from laguna_serve.scripts.checkpoints.drafters.speculators import choose_vocabulary
from laguna_serve.scripts.checkpoints.headers import open_file, read_headers
from laguna_serve.scripts.checkpoints.output import WEIGHT_SUFFIXES, check_space, write_file, write_tensors
from laguna_serve.scripts.checkpoints.tool import run_tool
from laguna_serve.scripts.text.rows import read_documents
from laguna_serve.serving.checkpoint import CheckpointError, read_config, read_target, require_folder
from laguna_serve.serving.checkpoint.drafter import LAGUNA, SPECULATORS, Drafter
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, Parser
from laguna_serve.serving.speculation.drafting import check_fit, open_drafter

SCHEMA = "laguna_serve.drafter_convert/1"
HEADS, EMBEDDING = ("lm_head.weight", "model.embed_tokens.weight"), "model.embed_tokens.weight"
EXAMPLES = """examples:
  laguna drafter convert DRAFTER --to speculators --target MODEL --dry-run     what would carry over?
  laguna drafter convert DRAFTER --to speculators --target MODEL --out DIR
  laguna drafter convert DRAFTER --to speculators --target MODEL --draft-vocab 32000 --text code.jsonl --out DIR
  laguna drafter convert DRAFTER --to laguna --target MODEL --out DIR

The two architectures are not the same: a gate, norms at several taps or a reduced vocabulary have no counterpart.  What
does not carry over is listed, and then nothing is written: a drafter that is only nearly right loses its acceptance
without a word.
exit status: 0 done, 1 something does not carry over, 2 it could not run, 130 interrupted
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked for flags that need or exclude each other."""
    parser = Parser(prog="laguna drafter", description="Tools for DFlash drafters.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    convert = commands.add_parser(
        "convert",
        help="turn a drafter into the other format",
        description=__doc__,
        epilog=EXAMPLES,
    )
    convert.add_argument("drafter", metavar="IN", help="drafter: a folder, or a hub id in the local cache")
    convert.add_argument("--to", required=True, choices=(SPECULATORS, LAGUNA), help="the format that is wanted")
    convert.add_argument(
        "--target", required=True, metavar="MODEL", help="what it drafts for: a folder or cached hub id"
    )
    convert.add_argument("--out", type=Path, metavar="DIR", help="folder for the drafter")
    vocabulary = "speculators: draft only this many tokens, the most frequent in --text"
    convert.add_argument("--draft-vocab", type=int, metavar="N", help=vocabulary)
    convert.add_argument("--text", help=".txt, .jsonl with text or prompt, or toy:training")
    convert.add_argument("--dry-run", action="store_true", help="say what carries over; write nothing")
    args = parser.parse_args(argv)
    if (args.draft_vocab is None) != (args.text is None):
        convert.error("--draft-vocab and --text: expected both or neither, got one; pass the other too")
    if args.draft_vocab is not None and args.to == LAGUNA:
        convert.error("--draft-vocab: expected --to speculators with it, got laguna, which drafts every token")
    if args.out is None and not args.dry_run:
        convert.error("--out: expected a folder, got none; pass one, or --dry-run to write nothing")
    return args


def run(args: argparse.Namespace) -> int:
    """The whole command; the last line of stdout is the result as JSON."""
    folder, target_folder = require_folder(args.drafter), require_folder(args.target)
    if args.out is not None and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise CheckpointError(f"{args.out}: expected an empty folder or none, got something else; choose another --out")
    drafter, target = open_drafter(folder, str(folder)), read_target(target_folder)
    check_fit(target, drafter)
    if drafter.format == args.to:
        raise CheckpointError(f"{args.drafter}: expected the other format, got {args.to} already; serve it as it is")
    head, embedding = read_shared(target_folder)
    config, tensors = read_config(folder), read_tensors(folder)
    if args.to == SPECULATORS:
        vocabulary = choose_tokens(args, target_folder, drafter)
        done = to_speculators(config, tensors, head, vocabulary, target_folder.name)
    else:
        done = to_laguna(config, tensors, head, embedding, target.num_layers)
    print(format_parts(done))
    result: dict[str, Any] = {"schema": SCHEMA, "drafter": args.drafter, "to": args.to, "target": args.target}
    result |= {"out": str(args.out or "") or None, "carried": done.carried, "lost": done.lost, "difference": None}
    if done.lost:
        print(f"laguna: {args.drafter}: {len(done.lost)} parts do not carry over; nothing was written", file=sys.stderr)
        print(json.dumps({**result, "status": "does not carry over"}))
        return FELL_SHORT
    difference = measure_difference(drafter, (config, tensors), (done.config, done.tensors), head, embedding)
    result["difference"] = difference
    shown = "sliding windows are not compared" if difference is None else f"{difference:.1e}, at most {TOLERANCE:.0e}"
    print(f"{'difference':<28} {shown}")
    if difference is not None and not difference <= TOLERANCE:
        print(json.dumps({**result, "status": "differs"}))
        return FELL_SHORT
    if not args.dry_run:
        write(folder, args.out, done)
        check_fit(target, open_drafter(args.out, str(args.out)))
        print(f"{'drafter':<28} {args.out}")
    print(json.dumps({**result, "status": "dry run" if args.dry_run else "written"}))
    return HELD


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a drafter."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_file(path) as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors


def read_shared(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's head and embedding, [V, H] each; one that ties them has the embedding alone."""
    headers, _ = read_headers(folder, str(folder))
    found: Tensors = {}
    for name in HEADS:
        if name in headers:
            with safe_open(folder / headers[name].file, framework="pt") as file:
                found[name] = file.get_tensor(name).clone()
    if EMBEDDING not in found:
        raise CheckpointError(f"{folder}: expected tensor {EMBEDDING}, got none; is the download complete?")
    return found.get(HEADS[0], found[EMBEDDING]), found[EMBEDDING]


def choose_tokens(args: argparse.Namespace, target_folder: Path, drafter: Drafter) -> torch.Tensor | None:
    """The tokens of a reduced vocabulary, by how often they are in the text."""
    if args.draft_vocab is None:
        return None
    if not 1 <= args.draft_vocab < drafter.target_vocab_size:
        limits = f"1 to {drafter.target_vocab_size - 1} tokens"
        raise CheckpointError(f"--draft-vocab: expected {limits}, got {args.draft_vocab}; leave it out for all")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    ids = [i for text in read_documents(args.text) for i in tokenizer(text, verbose=False)["input_ids"]]
    return choose_vocabulary(torch.tensor(ids), args.draft_vocab, drafter.target_vocab_size)


def format_parts(done: Conversion) -> str:
    """What carries over and what does not, a line each."""
    rows = [(name, f"carries over: {how}") for name, how in done.carried.items()]
    rows += [(name, f"DOES NOT CARRY OVER: {why}") for name, why in done.lost.items()]
    return "\n".join(f"{name:<28} {text}" for name, text in rows)


def write(source: Path, out: Path, done: Conversion) -> None:
    """Weights, other files, and config.json last, so that a folder that has one is whole."""
    check_space(out, sum(tensor.nbytes for tensor in done.tensors.values()))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: expected to create it, got {error.strerror}; choose another") from None
    write_tensors(out / "model.safetensors", done.tensors)
    for path in sorted(source.iterdir()):
        weights = path.name.endswith(WEIGHT_SUFFIXES)
        if path.is_file() and not weights and path.name != "config.json" and path.name[0] != ".":
            write_file(out / path.name, lambda partial, path=path: partial.write_bytes(path.read_bytes()))  # type: ignore[misc]
    text = json.dumps(done.config, indent=2, ensure_ascii=False) + "\n"
    write_file(out / "config.json", lambda partial: partial.write_text(text, encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(run, parse(argv), "nothing is left that looks like a drafter")


if __name__ == "__main__":
    sys.exit(main())
