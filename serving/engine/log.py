"""What an engine's log says: what it is doing now, and why it died.

vLLM's processes write to one file. Lines of the children begin with ``(EngineCore pid=7) ERROR 11-20 23:28:20
[file.py:953]``; the API server's last traceback only says that the root cause is above.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

# Searched in this order; the last phase that has begun is the current one.
PHASES = (
    ("Starting a masked diffusion engine", "importing torch"),
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine's processes"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "preparing the model"),
    ("Loading drafter model", "loading the drafter"),
    ("Warming up model for the compilation", "compiling"),
    ("Dynamo bytecode transform", "compiling"),
    ("KV cache size", "allocating the KV cache"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("Trying whether proposals pay", "trying whether the proposals pay"),
    ("Starting vLLM server", "starting the HTTP server"),
    ("Starting the HTTP server", "starting the HTTP server"),
)

# What an engine of ours says for who starts it.
NOTE = re.compile(r"^INFO laguna_serve\.plugins\.\S+: (?P<note>Proposals .*)$", re.MULTILINE)
PREFIX = re.compile(r"^\((?P<process>[\w-]+) pid=\d+\) (?:(?P<level>[A-Z]+) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
NAME = r"(?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*(?:Error|Interrupt|Exit|Exceeded|Exception)|Exception|MemoryError)"
EXCEPTION = re.compile(rf"^{NAME}: ")
# One that says nothing; the line of code above it does.
BARE = re.compile(rf"^{NAME}:?$")
USAGE_ERROR = re.compile(r"^\S+\.py: error: ")
DEATH = re.compile(r"died unexpectedly|Out of memory|Killed process|^terminate called|^\s+what\(\): ")
# A crash in native code: faulthandler's heading, and that of the handler which comes with torch.
CRASH = re.compile(r"^(?:Fatal Python error: (?P<fatal>.*)|!+ (?P<other>Segfault) encountered !+)$")
FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<function>\S+)$')
# The driver has given up the card; what CUDA says afterwards is a consequence.
GPU_LOST = re.compile(r"\bXid\b.*\d|fallen off the bus|GPU (?:is|has been) lost|GPU_IS_LOST", re.IGNORECASE)
# What the outer processes say of a death further in, and what follows an end that was asked for.
SECOND_HAND = re.compile(
    r"See (?:root cause|stack trace)|Engine core initialization failed|EngineDeadError|CancelledError|cancelled"
    r"|^KeyboardInterrupt|^SystemExit|died with exit code|AsyncLLM output_handler failed"
)
# Printed by the interpreter on its way out.
NOISE = re.compile(
    r"^nanobind: | - (?:leaked|\.\.\. skipped)|^See https://nanobind|resource_tracker|^\s+warnings\.warn\("
)
# Of a traceback: frames, code, marks under it.
LOCATION = re.compile(r"^\s|^Traceback ")
# What pydantic adds to a message.
WORDY = re.compile(r"\s*\[type=\w+, input_value=.*")
# Their messages are for those who know the code.
LACONIC = re.compile(rf"^(?:(?:Index|Key|Type|Attribute|Assertion)Error: |{NAME}:?$)")
# Of a message that goes on, and of a traceback's last frame.
MAX_LINES, FRAME_LINES = 4, 8
MAX_CAUSE_CHARS = 600
# Enough for the tracebacks of all processes, of a log that may have grown for months.
MAX_BYTES = 1 << 20


def read_log(path: Path, since: int = 0) -> str:
    """Read the log's text from an offset in bytes on, at most its last MAX_BYTES; nothing when it cannot be read.

    A log that is shorter than the offset was begun again, and is read whole.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = since if since <= size else 0
            file.seek(max(begin, size - MAX_BYTES))
            return file.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""


def measure_log(path: Path) -> int:
    """Bytes of the log; 0 when it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def find_notes(text: str) -> list[str]:
    """Find what the engine has said for who starts it, a line each."""
    return [match["note"] for match in NOTE.finditer(text)]


def find_phase(log: str, imports: str = "vLLM") -> str:
    """Find what the engine is doing, for a progress line; before its log says anything, it imports what it runs on."""
    current = f"importing {imports}"
    for mark, phase in PHASES:
        if mark in log:
            current = phase
    return current


def find_cause(log: str) -> str:
    """Find the line that says why the engine died.

    As `find_exception`, else the last line logged as an error, else the last line, else a statement that there is none.
    """
    if (cause := find_exception(log)) is not None:
        return cause
    levels = (PREFIX.match(line) for line in log.splitlines())
    errors = [
        line
        for line, match in zip(_list_lines(log), levels, strict=True)
        if match and match["level"] == "ERROR" and line and not SECOND_HAND.search(line) and not LOCATION.match(line)
    ]
    return errors[-1][:MAX_CAUSE_CHARS] if errors else find_last_line(log)


def find_exception(log: str) -> str | None:
    """Find a lost GPU, else the last crash in native code, else the last exception that points at no other."""
    lines = _list_lines(log)
    lost = next((line for line in lines if GPU_LOST.search(line)), None)
    if lost is not None:
        return lost.strip()[:MAX_CAUSE_CHARS]
    crashes = [index for index, line in enumerate(lines) if CRASH.match(line)]
    if crashes:
        return _describe_crash(lines, crashes)
    causes = [index for index, line in enumerate(lines) if _names_cause(lines, index)]
    return _join_message(lines, causes[-1]) if causes else None


def find_last_line(log: str) -> str:
    """Find the last line that says something, or that there is none."""
    spoken = [line for line in _list_lines(log) if line.strip() and not NOISE.search(line)]
    return spoken[-1].strip()[:MAX_CAUSE_CHARS] if spoken else "the log is empty"


def _list_lines(log: str) -> list[str]:
    return [PREFIX.sub("", line).rstrip() for line in log.splitlines()]


def _names_cause(lines: list[str], index: int) -> bool:
    line = lines[index]
    if SECOND_HAND.search(line):
        return False
    if BARE.match(line):
        return _find_place(lines, index) is not None
    return any(pattern.search(line) for pattern in (EXCEPTION, USAGE_ERROR, DEATH))


def _describe_crash(lines: list[str], crashes: list[int]) -> str:
    """Describe the crash: its name, and the innermost Python function where faulthandler names one."""
    index = next((i for i in reversed(crashes) if lines[i].startswith("Fatal")), crashes[-1])
    match = CRASH.match(lines[index])
    assert match is not None
    name = match["fatal"] or "Segmentation fault"
    for i in range(index + 1, len(lines)):
        if lines[i].endswith("(most recent call first):"):
            frame = FRAME.match(lines[i + 1]) if i + 1 < len(lines) else None
            if frame is not None:
                return f"{name} in {frame['function']} ({frame['file']}:{frame['line']})"
            break
    return f"{name} in native code"


def _join_message(lines: list[str], index: int) -> str:
    """Join what an exception says, on one line.

    pydantic puts it on the lines that follow "1 validation error for ModelConfig", others go on after a colon; one that
    says little by itself gets its place in the code.
    """
    message = lines[index].strip()
    following = [WORDY.sub("", line.strip()) for line in lines[index + 1 : index + 1 + MAX_LINES]]
    if "validation error" in message:
        said = following[:1] if following and following[0].startswith("Value error") else following[:2]
        message = ": ".join([message, *said])
    elif message.endswith(":") and not BARE.match(message):
        message = " ".join([message, *following])
    place = _find_place(lines, index) if LACONIC.match(message) else None
    if place is not None:
        message = f"{message.rstrip(':')} ({place})"
    return message[:MAX_CAUSE_CHARS]


def _find_place(lines: list[str], index: int) -> str | None:
    """Find the innermost frame of the traceback that ends with this line, and its code."""
    for above in range(index - 1, max(-1, index - FRAME_LINES), -1):
        if (frame := FRAME.match(lines[above])) is not None:
            code = lines[above + 1].strip() if above + 1 < index else ""
            return f"{Path(frame['file']).name}:{frame['line']}, {frame['function']}" + (f": {code}" if code else "")
    return None
