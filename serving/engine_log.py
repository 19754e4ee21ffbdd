"""What an engine's log says: what it is doing now, and why it died.

vLLM's processes write to one file.  Lines of the children begin with ``(EngineCore pid=7) ERROR 11-20 23:28:20
[file.py:953]``; the API server's last traceback only says that the root cause is above.
"""

from __future__ import annotations

import re
from pathlib import Path

# Searched in this order; the last phase that has begun is the current one.
PHASES = (
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine's processes"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "preparing the model"),
    ("Loading drafter model", "loading the drafter"),
    ("Warming up model for the compilation", "compiling"),
    ("Dynamo bytecode transform", "compiling"),
    ("KV cache size", "allocating the KV cache"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("Starting vLLM server", "starting the HTTP server"),
)
FIRST_PHASE = "importing vLLM"

PREFIX = re.compile(r"^\((?P<process>[\w-]+) pid=\d+\) (?:(?P<level>[A-Z]+) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*(?:Error|Interrupt|Exit|Exceeded)|Exception|AcceleratorError): "
)
USAGE_ERROR = re.compile(r"^\S+\.py: error: ")
DEATH = re.compile(r"died unexpectedly|Out of memory|Killed process")
# What the outer processes say of a death further in.
SECOND_HAND = re.compile(r"See (?:root cause|stack trace)|Engine core initialization failed|EngineDeadError|cancelled")
MAX_CAUSE_CHARS = 600


def read_log(path: Path) -> str:
    """The log's text, or nothing when it is not there yet."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def find_phase(log: str) -> str:
    """What the engine is doing, for a progress line."""
    current = FIRST_PHASE
    for mark, phase in PHASES:
        if mark in log:
            current = phase
    return current


def find_cause(log: str) -> str:
    """The line that says why the engine died: the last exception that does not point at another one.

    Falls back to the last line logged as an error, then to the last line, then to a statement that there is none.
    """
    lines = [PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    causes = [index for index, line in enumerate(lines) if _names_cause(line)]
    if causes:
        return _join_message(lines, causes[-1])
    levels = (PREFIX.match(line) for line in log.splitlines())
    errors = [line for line, match in zip(lines, levels, strict=True) if match and match["level"] == "ERROR" and line]
    spoken = errors or [line for line in lines if line]
    return spoken[-1][:MAX_CAUSE_CHARS] if spoken else "the log is empty"


def _names_cause(line: str) -> bool:
    if SECOND_HAND.search(line):
        return False
    return any(pattern.search(line) for pattern in (EXCEPTION, USAGE_ERROR, DEATH))


def _join_message(lines: list[str], index: int) -> str:
    """Pydantic puts what is wrong on the lines that follow "1 validation error for ModelConfig"."""
    message = lines[index]
    if "validation error" in message and index + 1 < len(lines):
        message = f"{message}: {lines[index + 1].strip()}"
    return message[:MAX_CAUSE_CHARS]
