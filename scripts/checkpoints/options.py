"""The flags of the tools that make checkpoints, and their help: read before torch is, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from laguna_serve.serving.checkpoint.drafter import LAGUNA
from laguna_serve.serving.kit.flags import MOST_SEED, Flag, FlagError, check_bounds, read_flags_and_json

COMPACT = "Make a smaller Laguna: of the routed experts only the blocks that a mask keeps are stored."
COMPACT_EXAMPLES = """examples:
  laguna compact poolside/Laguna-XS.2 --keep-mask group_keep_mask_10pct.npy \\
      --group-indices group_indices_importance_sorted.npy --out xs2-10pct
  laguna compact BASE --random-mask 0.1 --dry-run         what would it save? (needs config.json only)
  laguna compact BASE --shares 0,0.1,0.25,0.4 --dry-run   the same for several shares, in one table
  laguna compact BASE --random-mask 0.25 --seed 1 --out random-25pct --verify
  laguna compact BASE --keep-mask M --group-indices G --out DIR --zeroed    for engines that know no blocks
  laguna compact poolside/Laguna-XS.2-FP8 --random-mask 0.25 --dry-run      and beside which context does it fit?
  laguna compact BF16 --keep-mask M --group-indices G --to fp8 --out DIR    experts in FP8, a scale per atom

Bases in bf16, fp16, fp32, or in FP8 as released (compressed-tensors, 128×128 blocks), of which no value is changed.

`python scripts/score_experts.py` makes the mask and the indices.  Stopped?  The same command continues.
exit status: 0 done, 1 --verify found a difference, 2 it could not run, 130 interrupted
"""
UNPAD_EXAMPLES = """examples:
  laguna unpad tests/toy/dense --out out/dense --verify
  laguna unpad STUDENT --dry-run                  which layers are padded, and what would be saved?

FP8 as released (compressed-tensors, 128×128 blocks) is cut with its scales, behind the last unit that is not padding.
The result loads in `laguna serve` without a scan; `laguna pad` turns it back for other engines.
Stopped?  The same command continues.
exit status: 0 done, 1 --verify found a difference, 2 it could not run, 130 interrupted
"""
PAD_EXAMPLES = """examples:
  laguna pad out/dense --out out/dense-padded --verify

Stopped?  The same command continues.
exit status: 0 done, 1 --verify found a difference, 2 it could not run, 130 interrupted
"""


DESCRIPTIONS = {
    "unpad": ("Store a dense Laguna at its layers' true widths.", UNPAD_EXAMPLES),
    "pad": ("Give an unpadded dense Laguna its stock layout back, for engines that know one width.", PAD_EXAMPLES),
}
QUANTISE = "Store a Laguna's feed-forward layers in FP8 as the releases have them, or dequantise those of one in FP8."
QUANTISE_EXAMPLES = """examples:
  laguna quantise tests/toy/teacher --to fp8 --out out/teacher-fp8     128×128 blocks, compressed-tensors
  laguna quantise poolside/Laguna-XS.2-FP8 --to bf16 --out xs2-bf16    for a device without FP8
  laguna quantise out/teacher-fp8 --to fp32 --out out/exact            every FP8 value times its scale, exactly

`laguna compact --to fp8` is for experts alone, with a scale per atom.  Stopped?  The same command continues.
exit status: 0 done, 2 it could not run, 130 interrupted
"""
CONVERT = "`laguna drafter convert`: a DFlash drafter in the other published format, where the architectures permit it."
CONVERT_EXAMPLES = """examples:
  laguna drafter convert DRAFTER --to speculators --target MODEL --dry-run     what would carry over?
  laguna drafter convert DRAFTER --to speculators --target MODEL --out DIR
  laguna drafter convert DRAFTER --to speculators --target MODEL --draft-vocab 32000 --text code.jsonl --out DIR
  laguna drafter convert DRAFTER --to laguna --target MODEL --out DIR

The two architectures are not the same: a gate, norms at several taps or a reduced vocabulary have no counterpart.  What
does not carry over is listed, and then nothing is written: a drafter that is only nearly right loses its acceptance
without a word.
exit status: 0 done, 1 something does not carry over, 2 it could not run, 130 interrupted
"""


def require_out(out: Path | None, *, dry_run: bool) -> None:
    """Raise FlagError where something is to be written and there is no place for it."""
    if out is None and not dry_run:
        raise FlagError("--out: expected a folder, got none; pass one, or --dry-run to write nothing")


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """What to make smaller, by which mask, and where to."""

    base: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id in the local cache", metavar="BASE", positional=True)
    ]
    keep_mask: Annotated[
        Path | None, Flag("bool [layers, experts, groups]: what stays; this, or --random-mask", metavar="M.npy")
    ] = None
    random_mask: Annotated[float | None, Flag("prune this share of the groups at random", metavar="RATIO")] = None
    shares: Annotated[
        tuple[float, ...], Flag("with --dry-run: sizes of masks of these shares, in one table", metavar="RATIOS")
    ] = ()
    group_indices: Annotated[Path | None, Flag("int64 [layers, experts, groups, atoms]", metavar="G.npy")] = None
    block_size: Annotated[int | None, Flag("random mask without indices: atoms in a group", metavar="N")] = None
    seed: Annotated[int | None, Flag("of the random mask (default 0)", metavar="N", at_least=0, at_most=MOST_SEED)] = (
        None
    )
    out: Annotated[Path | None, Flag("folder for the checkpoint", metavar="DIR")] = None
    to: Annotated[Literal["fp8"] | None, Flag("round a plain base's experts to FP8, a scale per atom")] = None
    zeroed: Annotated[bool, Flag("keep the base's layout, with what is pruned at zero")] = False
    verify: Annotated[bool, Flag("compare the files written with the masked base")] = False
    dry_run: Annotated[bool, Flag("say what would be saved; write nothing")] = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.shares:
            self._check_shares()
            return
        if (self.keep_mask is None) == (self.random_mask is None):
            got = "neither" if self.keep_mask is None else "both"
            raise FlagError(f"--keep-mask or --random-mask: expected one of them, got {got}")
        if self.keep_mask is not None and self.group_indices is None:
            raise FlagError(
                "--keep-mask: expected --group-indices beside it, got none; pass the indices of the same scores"
            )
        if self.keep_mask is not None and self.seed is not None:
            raise FlagError("--seed: expected --random-mask with it, got --keep-mask; leave it out")
        if self.block_size is not None and (self.keep_mask is not None or self.group_indices is not None):
            raise FlagError(
                "--block-size: expected a random mask without indices, got groups that have a size; leave it out"
            )
        if self.zeroed and self.to is not None:
            raise FlagError(f"--zeroed: expected the base's own numbers, got --to {self.to}; leave one of them out")
        require_out(self.out, dry_run=self.dry_run)

    def _check_shares(self) -> None:
        if self.keep_mask is not None or self.random_mask is not None:
            given = "--keep-mask" if self.keep_mask is not None else "--random-mask"
            raise FlagError(f"--shares: expected no other mask, got {given}; leave one of them out")
        if not self.dry_run or self.zeroed:
            raise FlagError(
                "--shares: expected --dry-run and no --zeroed, as it only counts; add --dry-run, drop --zeroed"
            )


@dataclass(frozen=True, kw_only=True)
class WidthsConfig:
    """A dense checkpoint to store at other widths."""

    source: Annotated[
        str, Flag("dense Laguna checkpoint: a folder, or a hub id in the local cache", metavar="IN", positional=True)
    ]
    out: Annotated[Path | None, Flag("folder for the checkpoint", metavar="DIR")] = None
    verify: Annotated[bool, Flag("read back what was written and compare every bit")] = False
    dry_run: Annotated[bool, Flag("say what would change; write nothing")] = False

    def __post_init__(self) -> None:
        require_out(self.out, dry_run=self.dry_run)


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """A checkpoint to store in other numbers."""

    source: Annotated[
        str, Flag("Laguna checkpoint: a folder, or a hub id in the local cache", metavar="IN", positional=True)
    ]
    to: Annotated[Literal["fp8", "bf16", "fp32"], Flag("the numbers that are wanted")]
    out: Annotated[Path | None, Flag("folder for the checkpoint", metavar="DIR")] = None
    dry_run: Annotated[bool, Flag("say how large it becomes; write nothing")] = False

    def __post_init__(self) -> None:
        require_out(self.out, dry_run=self.dry_run)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A drafter, and the format that is wanted of it."""

    drafter: Annotated[str, Flag("drafter: a folder, or a hub id in the local cache", metavar="IN", positional=True)]
    to: Annotated[Literal["speculators", "laguna"], Flag("the format that is wanted")]
    target: Annotated[str, Flag("what it drafts for: a folder or cached hub id", metavar="MODEL")]
    out: Annotated[Path | None, Flag("folder for the drafter", metavar="DIR")] = None
    draft_vocab: Annotated[
        int | None, Flag("speculators: draft only this many tokens, the most frequent in --text", metavar="N")
    ] = None
    text: Annotated[str | None, Flag(".txt, .jsonl with text or prompt, or toy:training")] = None
    dry_run: Annotated[bool, Flag("say what carries over; write nothing")] = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if (self.draft_vocab is None) != (self.text is None):
            raise FlagError("--draft-vocab and --text: expected both or neither, got one; pass the other too")
        if self.draft_vocab is not None and self.to == LAGUNA:
            raise FlagError("--draft-vocab: expected --to speculators with it, got laguna, which drafts every token")
        require_out(self.out, dry_run=self.dry_run)


def read_compact(argv: Sequence[str] | None) -> tuple[CompactConfig, bool]:
    """Read the command line of `laguna compact`; whether `--json` was given."""
    return read_flags_and_json(CompactConfig, argv, prog="laguna compact", description=COMPACT, epilog=COMPACT_EXAMPLES)


def read_widths(argv: Sequence[str] | None, tool: Literal["unpad", "pad"]) -> tuple[WidthsConfig, bool]:
    """Read the command line of `laguna unpad` or `laguna pad`; whether `--json` was given."""
    description, examples = DESCRIPTIONS[tool]
    return read_flags_and_json(WidthsConfig, argv, prog=f"laguna {tool}", description=description, epilog=examples)


def read_quantise(argv: Sequence[str] | None) -> tuple[QuantiseConfig, bool]:
    """Read the command line of `laguna quantise`; whether `--json` was given."""
    return read_flags_and_json(
        QuantiseConfig, argv, prog="laguna quantise", description=QUANTISE, epilog=QUANTISE_EXAMPLES
    )


def read_convert(argv: Sequence[str] | None) -> tuple[ConvertConfig, bool]:
    """Read the command line of `laguna drafter convert`; whether `--json` was given."""
    return read_flags_and_json(
        ConvertConfig, argv, prog="laguna drafter convert", description=CONVERT, epilog=CONVERT_EXAMPLES
    )
