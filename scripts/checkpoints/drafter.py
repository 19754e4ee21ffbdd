"""`laguna drafter convert`: a DFlash drafter in the other published format, where the architectures permit it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors.torch import save_file

from laguna_serve.scripts.checkpoints.drafters.agreement import TOLERANCE, measure_difference
from laguna_serve.scripts.checkpoints.drafters.algebra import Conversion, Tensors, to_laguna, to_speculators
from laguna_serve.scripts.checkpoints.drafters.speculators import choose_vocabulary
from laguna_serve.scripts.checkpoints.headers import open_file, read_headers, read_tensors
from laguna_serve.scripts.checkpoints.options import ConvertConfig, read_convert
from laguna_serve.scripts.checkpoints.output import check_space, copy_others, is_free, save_checkpoint
from laguna_serve.scripts.checkpoints.tool import run_tool
from laguna_serve.scripts.text.rows import read_documents
from laguna_serve.serving.checkpoint import CheckpointError, read_config, read_target, require_folder
from laguna_serve.serving.checkpoint.drafter import ORIGINAL, SPECULATORS, Drafter
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, print_result
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.speculation.drafting import check_fit, open_drafter

HEADS, EMBEDDING = ("lm_head.weight", "model.embed_tokens.weight"), "model.embed_tokens.weight"


class ConvertResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.drafter_convert/1"
):
    """What became of a drafter.

    Attributes:
        carried, lost: part → how it carries over, or why it does not.
        difference: between the two on random states, relative; None where it was not, or cannot be, computed.
    """

    drafter: str
    to: str
    target: str
    out: str | None
    carried: dict[str, str]
    lost: dict[str, str]
    difference: float | None
    status: Literal["written", "dry run", "does not carry over", "differs"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return execute(*read_convert(argv))


def execute(config: ConvertConfig, always_json: bool) -> int:
    """Convert; return the exit status."""
    return run_tool(lambda: run(config, always_json), "nothing is left that looks like a drafter")


def run(config: ConvertConfig, always_json: bool) -> int:
    """Convert and print it. Returns the exit status."""
    result = convert(config)
    print_result(format_result(result), to_json(result), None, always_json=always_json)
    if result.lost:
        count = len(result.lost)
        print(f"laguna: {result.drafter}: {count} parts do not carry over; nothing was written", file=sys.stderr)
    return HELD if result.status in ("written", "dry run") else FELL_SHORT


def convert(config: ConvertConfig) -> ConvertResult:
    """Write the drafter in the other format, if all of it carries over and both compute the same.

    Raises:
        CheckpointError: drafter, target or output folder cannot be used.
    """
    folder, target_folder = require_folder(config.drafter), require_folder(config.target)
    out = config.out
    if out is not None and (out.is_file() or not is_free(out)):
        raise CheckpointError(f"{out}: expected an empty folder or none, got something else; choose another --out")
    drafter, target = open_drafter(folder, str(folder)), read_target(target_folder)
    check_fit(target, drafter)
    if drafter.format == ORIGINAL:
        raise CheckpointError(
            f"{config.drafter}: expected Laguna's format or speculators', got DFlash's own; serve it as it is"
        )
    if drafter.format == config.to:
        expected = f"expected the other format, got {config.to} already"
        raise CheckpointError(f"{config.drafter}: {expected}; serve it as it is")
    head, embedding = read_shared(target_folder)
    described, tensors = read_config(folder), read_tensors(folder)
    if config.to == SPECULATORS:
        vocabulary = choose_tokens(config, target_folder, drafter)
        done = to_speculators(described, tensors, head, vocabulary, target_folder.name)
    else:
        done = to_laguna(described, tensors, head, embedding, target.num_layers)
    if done.lost:
        return _report(config, done, None, "does not carry over")
    difference = measure_difference(drafter, (described, tensors), (done.config, done.tensors), embedding)
    if difference is not None and not difference <= TOLERANCE:
        return _report(config, done, difference, "differs")
    if out is None or config.dry_run:
        return _report(config, done, difference, "dry run")
    write(folder, out, done)
    check_fit(target, open_drafter(out, str(out)))
    return _report(config, done, difference, "written")


def _report(
    config: ConvertConfig,
    done: Conversion,
    difference: float | None,
    status: Literal["written", "dry run", "does not carry over", "differs"],
) -> ConvertResult:
    return ConvertResult(
        drafter=config.drafter,
        to=config.to,
        target=config.target,
        out=None if config.out is None else str(config.out),
        carried=done.carried,
        lost=done.lost,
        difference=difference,
        status=status,
    )


def read_shared(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the target's head and embedding, [V, H] each; one that ties them has the embedding alone."""
    headers, _ = read_headers(folder, str(folder))
    shared: Tensors = {}
    for name in HEADS:
        if name in headers:
            with open_file(folder / headers[name].file) as file:
                shared[name] = file.get_tensor(name).clone()
    if EMBEDDING not in shared:
        raise CheckpointError(f"{folder}: expected tensor {EMBEDDING}, got none; is the download complete?")
    return shared.get(HEADS[0], shared[EMBEDDING]), shared[EMBEDDING]


def choose_tokens(config: ConvertConfig, target_folder: Path, drafter: Drafter) -> torch.Tensor | None:
    """Choose the tokens of a reduced vocabulary, by how often they are in the text."""
    if config.draft_vocab is None or config.text is None:
        return None
    if not 1 <= config.draft_vocab < drafter.target_vocab_size:
        limits = f"1 to {drafter.target_vocab_size - 1} tokens"
        raise CheckpointError(f"--draft-vocab: expected {limits}, got {config.draft_vocab}; leave it out for all")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    ids = [i for text in read_documents(config.text) for i in tokenizer(text, verbose=False)["input_ids"]]
    return choose_vocabulary(torch.tensor(ids), config.draft_vocab, drafter.target_vocab_size)


def format_result(result: ConvertResult) -> str:
    """Format what carries over and what does not, a line each, and what came of it."""
    rows = [(name, f"carries over: {how}") for name, how in result.carried.items()]
    rows += [(name, f"DOES NOT CARRY OVER: {why}") for name, why in result.lost.items()]
    if not result.lost:
        compared = "sliding windows are not compared"
        if result.difference is not None:
            compared = f"{result.difference:.1e}, at most {TOLERANCE:.0e}"
        rows.append(("difference", compared))
    if result.status == "written":
        rows.append(("drafter", str(result.out)))
    return "\n".join(f"{name:<28} {text}" for name, text in rows)


def write(source: Path, out: Path, done: Conversion) -> None:
    """Write weights, other files and config.json. Raises CheckpointError: too little space, or the disk refuses."""
    check_space(out, sum(tensor.nbytes for tensor in done.tensors.values()))

    def save(folder: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in done.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        copy_others(source, folder)
        text = json.dumps(done.config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")

    save_checkpoint(out, save)


if __name__ == "__main__":
    sys.exit(main())
