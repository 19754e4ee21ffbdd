"""Why an engine ended, in one line.

From its exit status, its last words, and the kernel's count of processes that it killed for memory.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

from laguna_serve.serving.engine.log import find_cause, find_exception, find_last_line

# The kernel's own counters, where they can be read: of this control group (version 2, then 1), of the whole machine.
GROUP = "/sys/fs/cgroup"
V2, V1, MACHINE = "memory.events", "memory.oom_control", "/proc/vmstat"
MEMORY = "the kernel killed it, as memory ran out (OOM)"
UNEXPECTED = "unexpectedly"
# What vLLM's server says before it ends in good order, where its core is gone without a word.
CORE_GONE = "EngineDeadError"
KILLED = "killed without a word in its log: by somebody, or by the kernel for memory"


def describe_death(status: int | None, words: str, *, memory_kills: int = 0) -> str:
    """How it ended and why, as in "got signal 9 (SIGKILL): …".

    Args:
        status: of the supervisor: the engine's exit status, 128 + a signal's number, or minus the signal that ended the
            supervisor itself; None while vLLM still stands without its core.
        words: what the engine wrote last.
        memory_kills: processes that the kernel has killed for memory since the engine was started.
    """
    number = find_signal(status)
    return f"{_tell_status(status, number)}: {_find_reason(status, number, words, memory_kills)}"


def find_signal(status: int | None) -> int | None:
    """Find the signal that a status stands for."""
    if status is None or 0 <= status <= 128:
        return None
    return status - 128 if status > 0 else -status


def count_memory_kills() -> int:
    """How many processes the kernel has killed for memory so far; 0 where it does not report that."""
    return next(_read_counters(), 0)


def _tell_status(status: int | None, number: int | None) -> str:
    if number is not None:
        names = {known.value: known.name for known in signal.Signals}
        return f"signal {number} ({names[number]})" if number in names else f"signal {number}"
    return "its core ended" if status is None else f"exit status {status}"


def _find_reason(status: int | None, number: int | None, words: str, memory_kills: int) -> str:
    cause = find_exception(words)
    if memory_kills > 0 and (cause is None or number == signal.SIGKILL or UNEXPECTED in cause):
        return MEMORY
    if cause is not None:
        return cause
    if number == signal.SIGKILL or UNEXPECTED in words or CORE_GONE in words or status is None:
        return KILLED
    if number is not None:
        return find_last_line(words)
    return f"it ended by itself; its last line: {find_last_line(words)}" if status == 0 else find_cause(words)


def _read_counters() -> Iterator[int]:
    for path in (*_list_group_files(), Path(MACHINE)):
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.strip().isdecimal():
                yield int(value)


def _list_group_files() -> Iterator[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield Path(f"{GROUP}{path.rstrip('/')}/{V2}")
        elif "memory" in controllers.split(","):
            yield Path(f"{GROUP}/memory{path.rstrip('/')}/{V1}")
