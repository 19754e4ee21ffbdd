"""Is speculation faster here, and does it give the same tokens? The A/B of bench/ab.py, from Python.

python examples/compare_engines.py [PROMPTS]
"""

from __future__ import annotations

import sys
from pathlib import Path

from laguna_serve.bench.ab import AbConfig, compare
from laguna_serve.bench.harness.result import AbResult
from laguna_serve.serving.kit.results import read_result

OUT = Path("out/examples/ab")


def main() -> None:
    """Measure sixteen prompts, then read the result back from its file."""
    result = compare(
        AbConfig(
            model="tests/toy/teacher",
            draft="tests/toy/dflash",
            gamma=7,
            eager=True,
            prompts=Path(sys.argv[1] if len(sys.argv) > 1 else "tests/toy/prompts.jsonl"),
            num_prompts=16,
            max_tokens=32,
            out=OUT,
        )
    )
    assert read_result(OUT / "ab.json", AbResult).parity == result.parity
    for withheld in result.refused:
        print(f"{withheld.figure}: withheld, as {withheld.reason}")
    if result.speedup.point is not None and result.speedup.ci95 is not None:
        low, high = result.speedup.ci95
        print(f"{result.speedup.point:.2f}× ({low:.2f}–{high:.2f}) over {result.speedup.pairs} prompts")
    print(f"{result.parity.mismatches} of {result.parity.prompts} prompts differ")


if __name__ == "__main__":
    main()
