"""The table that scripts/fp8_toy.sh ends in, of whatever was measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fp8_toy.sh"


def test_a_speedup_of_few_prompts_has_no_interval(tmp_path: Path) -> None:
    """Below eight prompts ab.py refuses one, and the script ended in a traceback after all of its measurements."""
    program = re.findall(r"<< 'END'\n(.*?)\nEND\n", SCRIPT.read_text(), re.DOTALL)[-1]
    for percent, interval in ((10, None), (25, [1.1, 1.4])):
        (tmp_path / f"compact-{percent}.txt").write_text(json.dumps({"bytes_after": 2**20, "held_bytes": 2**21}))
        (tmp_path / f"dflash-{percent}").mkdir()
        speed = {"speedup": {"point": 1.25, "ci95": interval}, "parity": {"mismatches": 0, "prompts": 4}}
        (tmp_path / f"dflash-{percent}" / "ab.json").write_text(json.dumps(speed))
    command = [sys.executable, "-c", program, str(tmp_path), "10", "25"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[2:] == [
        "| 10% | 1.00 | 2.00 |  | 1.25× | 0 of 4 |  |",
        "| 25% | 1.00 | 2.00 |  | 1.25× (1.10–1.40) | 0 of 4 |  |",
    ]
