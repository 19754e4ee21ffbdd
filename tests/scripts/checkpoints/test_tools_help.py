"""The tools' help and refusals of flags are there at once: nothing heavy is imported for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOOLS = ("compact", "unpad", "pad", "quantise", "drafter train", "drafter convert")
PROBE = """
import sys
from laguna_serve.serving import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as ended:
    heavy = [name for name in ("torch", "transformers", "numpy", "safetensors") if name in sys.modules]
    print(ended.code, heavy, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "status"), [(["--help"], 0), (["--nonsense"], 2)], ids=["help", "a wrong flag"])
@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy(tool: str, flags: list[str], status: int) -> None:
    """It took two seconds, and `drafter train` three."""
    command = [sys.executable, "-c", PROBE, *tool.split(), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.splitlines()[-1] == f"{status} []"
    assert not status or "error: " in done.stderr
