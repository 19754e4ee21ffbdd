"""Programs beside these tests that ask vLLM in a process of their own, as what they patch stays patched."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMIT_S = 300.0


@functools.cache
def run_probe(name: str, *arguments: str) -> Any:
    """The JSON on the last line of a probe's stdout; run once for equal arguments.

    It does not inherit what the plugin has set in this process, where another test has loaded it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_MAX_N_SEQUENCES"}
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
