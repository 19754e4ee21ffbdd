"""What would pruning save, and is what is written what the mask says? `laguna compact`, from Python.

python examples/compact_checkpoint.py [BASE]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from laguna_serve.scripts.checkpoints.compact import CompactConfig, compact

BASE = sys.argv[1] if len(sys.argv) > 1 else "tests/toy/teacher"
OUT = Path("out/examples/pruned")


def main() -> None:
    """Plan a quarter of the experts' blocks away, then write that checkpoint and compare it with its base."""
    plan = compact(CompactConfig(base=BASE, random_mask=0.25, dry_run=True))
    saved = 1 - plan.parameters_after / plan.parameters_before
    print(f"{plan.blocks_pruned} of {plan.blocks} blocks: {plan.bytes_saved:,} bytes, {saved:.0%} of the parameters")
    shutil.rmtree(OUT, ignore_errors=True)
    written = compact(CompactConfig(base=BASE, random_mask=0.25, out=OUT, verify=True))
    print(f"{written.status}: {written.out}, which {'is' if written.held else 'is not'} the masked base")


if __name__ == "__main__":
    main()
