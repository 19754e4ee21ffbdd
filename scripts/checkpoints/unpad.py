"""`laguna unpad`: store a dense Laguna at its true widths, without the zeros that fill its layers up."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from laguna_serve.plugins.padding import PaddingError
from laguna_serve.scripts.checkpoints.output import open_output
from laguna_serve.scripts.checkpoints.tool import run_tool
from laguna_serve.scripts.checkpoints.widths import (
    Source,
    compare,
    count_negative_zeros,
    read_padded,
    read_unpadded,
    write,
)
from laguna_serve.serving.checkpoint import require_folder
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, Parser

UNPAD_EXAMPLES = """examples:
  laguna unpad tests/toy/dense --out out/dense --verify
  laguna unpad STUDENT --dry-run                  which layers are padded, and what would be saved?

The result loads in `laguna serve` without a scan; `laguna pad` turns it back for other engines.
Stopped?  The same command continues.
exit status: 0 done, 1 --verify found a difference, 2 it could not run, 130 interrupted
"""
PAD_EXAMPLES = """examples:
  laguna pad out/dense --out out/dense-padded --verify

Stopped?  The same command continues.
exit status: 0 done, 1 --verify found a difference, 2 it could not run, 130 interrupted
"""


def parse(tool: str, description: str, examples: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of either tool."""
    parser = Parser(prog=f"laguna {tool}", description=description, epilog=examples)
    parser.add_argument(
        "source", metavar="IN", help="dense Laguna checkpoint: a folder, or a hub id in the local cache"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--verify", action="store_true", help="read back what was written and compare every bit")
    parser.add_argument("--dry-run", action="store_true", help="say what would change; write nothing")
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out: expected a folder, got none; pass one, or --dry-run to write nothing")
    return args


def run(tool: str, args: argparse.Namespace) -> int:
    """The whole command; the last line of stdout is the result as JSON."""
    folder = require_folder(args.source)
    started = time.monotonic()
    source = read_padded(folder, args.source) if tool == "unpad" else read_unpadded(folder, args.source)
    read_s = round(time.monotonic() - started, 2)
    if args.dry_run:
        result = summarise(tool, args, source) | {"read_s": read_s}
        print(format_summary(source, result))
        print(json.dumps({**result, "status": "dry run"}))
        return HELD
    output = open_output(args.out, folder, {"source": source.fingerprint, "tool": tool}, f"{tool}.json")
    status = "already complete" if output.complete else "written"
    if not output.complete:
        write(source, output)
    result = summarise(tool, args, source) | {"read_s": read_s, "status": status}
    print(format_summary(source, result))
    print(f"{'checkpoint':<15} {args.out}: {result['status']}")
    held = True
    if args.verify:
        held = verify(source, args.out)
        result["verified"] = held
    print(json.dumps(result))
    return HELD if held else FELL_SHORT


def verify(source: Source, out: Path) -> bool:
    """Compare and say how it went."""
    try:
        compare(source, out)
    except PaddingError as error:
        print(f"laguna: verify: {error}", file=sys.stderr)
        return False
    print(f"{'verify':<15} held: every tensor is the source's, bit for bit")
    return True


def summarise(tool: str, args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What changes, for the JSON line; says on stderr what a person should know."""
    broken = {layer: units.broken for layer, units in source.units.items() if units.broken is not None}
    for layer, unit in broken.items():
        print(f"laguna: note: layer {layer} is kept whole: unit {unit} is zero in part only", file=sys.stderr)
    negative = count_negative_zeros(source) if source.unpads else 0
    if negative:
        print(f"laguna: note: {negative:,} zeros of the padding are −0; `laguna pad` gives +0", file=sys.stderr)
    before, after = (sum(source.num_bytes(name, changed=c) for name in source.tensors) for c in (False, True))
    return {
        "schema": f"laguna_serve.{tool}/1",
        "source": args.source,
        "out": str(args.out or "") or None,
        "parameters_before": source.parameters(changed=False),
        "parameters_after": source.parameters(changed=True),
        "bytes_saved": before - after,
        "widths": [source.units[layer].width for layer in sorted(source.units)],
        "stored_width": next(iter(source.units.values())).stored,
        "whole_layers": sorted(broken),
        "negative_zeros": negative,
    }


def format_summary(source: Source, result: dict[str, Any]) -> str:
    """The same for people."""
    before, after = result["parameters_before"], result["parameters_after"]
    runs: list[list[int]] = []
    for layer, width in enumerate(result["widths"]):
        if runs and runs[-1][2] == width:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer, width])
    widths = ", ".join(f"{a if a == b else f'{a}–{b}'}: {width}" for a, b, width in runs)
    saved = abs(result["bytes_saved"])
    rows = [
        ("layers", f"{widths} of {result['stored_width']} units"),
        ("parameters", f"{before:,} → {after:,} ({(after - before) / before:+.2%})"),
        (
            "saved" if source.unpads else "added",
            f"{saved / 2**30:.3f} GiB" if saved >= 2**30 else f"{saved / 2**20:.2f} MiB",
        ),
    ]
    if "read_s" in result and source.unpads:
        rows.append(("found in", f"{result['read_s']} s"))
    return "\n".join(f"{name:<15} {value}" for name, value in rows)


def main(argv: Sequence[str] | None = None, tool: str = "unpad") -> int:
    """Either tool, by its name."""
    about = {
        "unpad": ("Store a dense Laguna at its layers' true widths.", UNPAD_EXAMPLES),
        "pad": ("Give an unpadded dense Laguna its stock layout back, for engines that know one width.", PAD_EXAMPLES),
    }
    args = parse(tool, *about[tool], argv)
    return run_tool(partial(run, tool), args, "the same command continues from the last finished file")


if __name__ == "__main__":
    sys.exit(main())
