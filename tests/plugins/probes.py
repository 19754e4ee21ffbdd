"""Programs beside these tests that ask vLLM in a process of their own, as what they patch stays patched."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from warm import run_warm


def run_program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program beside these tests, which must succeed.

    It does not inherit what the plugin has set in this process, where another test has loaded it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_MAX_N_SEQUENCES"}
    done = run_warm(Path(__file__).with_name(name), *arguments, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@functools.cache
def run_probe(name: str, *arguments: str) -> Any:
    """The JSON on the last line of a probe's stdout; run once for equal arguments."""
    return json.loads(run_program(name, *arguments).stdout.splitlines()[-1])
