"""Write the toy family's text as JSON Lines, a module of Python's standard library in each: {"id": …, "text": …}.

By default the held-out modules, which neither training nor calibration saw: what to measure a loss on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from laguna_serve.scripts.text import corpus

SCHEMA = "laguna_serve.toy_text/1"
EXAMPLES = """examples:
  python scripts/toy_text.py --out held-out.jsonl
  python scripts/toy_text.py --training --out training.jsonl

exit status: 0 written, 2 it could not run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--training", action="store_true", help="the modules that it was trained on instead")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON Lines")
    args = parser.parse_args(argv)
    modules = [module for module in corpus.read_modules() if module.held_out != args.training]
    lines = [json.dumps({"id": module.name, "text": module.text}, ensure_ascii=False) for module in modules]
    try:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"toy_text: {args.out}: expected a file to write, got {error.strerror}; check --out", file=sys.stderr)
        return 2
    print(json.dumps({"schema": SCHEMA, "out": str(args.out), "documents": len(modules)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
