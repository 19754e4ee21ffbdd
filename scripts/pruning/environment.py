"""Where and with what a figure was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from typing import Any

from laguna_serve.serving.device import read_cpu_name


def describe_environment() -> dict[str, Any]:
    """Date (UTC), command, processor and versions of this run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": read_cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }
