"""Runs a problem's tests on a function that lives in another process, and counts.

The model's code never runs here, so it can neither see the tests nor change what a comparison does. What counts as one
test: instrument.py. A test that raises has failed and the next one follows. An exception elsewhere ends the iteration
of the innermost `for`, outside of loops the whole of check: what was not reached has not passed.

Signs on the report's channel, one per test and sealed (report.py): "+" passed; "!" passed as published, but for want
of anything to check (observe.py); "-" failed; "?" cannot be judged: something cannot cross between the processes. And
"~": of no single test, but the run as a whole lacks something that the canonical solution's has.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from types import TracebackType
from typing import Any

from laguna_serve.evals.sandbox.inside.instrument import ITERATION, TEST, WATCH, rewrite
from laguna_serve.evals.sandbox.inside.names import find_missing
from laguna_serve.evals.sandbox.inside.observe import Observer
from laguna_serve.evals.sandbox.inside.probes import PROBE_S, PROBES, OutOfTime, ProbeCandidate
from laguna_serve.evals.sandbox.inside.remote_program import RemoteProgram
from laguna_serve.evals.sandbox.inside.report import Seal
from laguna_serve.evals.sandbox.inside.watcher import Watcher
from laguna_serve.evals.sandbox.inside.worker import describe
from laguna_serve.evals.sandbox.messages.forms import Space
from laguna_serve.evals.sandbox.messages.pipe import PeerExit, PeerGone, Unsendable
from laguna_serve.evals.sandbox.walls.config import GraderConfig

SWALLOWED = (Exception, Unsendable, PeerExit, SystemExit, KeyboardInterrupt, GeneratorExit)
PASSED, WEAK, FAILED, UNJUDGED, UNMET = b"+", b"!", b"-", b"?", b"~"
LINE_CHARS = 200
SEED, seed_random = 0, random.seed


class Tally:
    """What has passed and failed so far, reported to the host test by test: it may kill the grader at any time."""

    def __init__(self, fd: int, config: GraderConfig) -> None:
        self._fd, self._lines = fd, config["test"].splitlines()
        self._seal = Seal(bytes.fromhex(config["key"]))
        self._details: dict[bytes, str] = {}
        self._pending: list[str] = []
        self.counts = {PASSED: 0, WEAK: 0, FAILED: 0, UNJUDGED: 0, UNMET: 0}

    def note(self, text: str) -> None:
        """Note a weakness of the test that is under way, or of the next one."""
        self._pending.append(text)

    @property
    def has_pending(self) -> bool:
        """Whether there is a weakness that no test has taken."""
        return bool(self._pending)

    def add_pass(self) -> None:
        """Count one test that has passed."""
        self._add(WEAK if self._pending else PASSED, self._pending[0] if self._pending else "")

    def add_failure(self, error: BaseException) -> None:
        """Count one that has failed; of the first it is kept where in the tests, and why."""
        sign = UNJUDGED if isinstance(error, Unsendable) else FAILED
        text = f"cannot be judged: {error}" if sign == UNJUDGED else describe(error)
        self._add(sign, self._locate(error) + text)

    def _add(self, sign: bytes, detail: str) -> None:
        self._pending = []
        self.counts[sign] += 1
        if detail:
            self._details.setdefault(sign, detail)
        self._say(sign)

    def _locate(self, error: BaseException) -> str:
        trace, number = error.__traceback__, 0
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "test.py":
                number = trace.tb_lineno
            trace = trace.tb_next
        return f"test line {number}, {self._lines[number - 1].strip()[:LINE_CHARS]}: " if number else ""

    def close(self, ending: str, detail: str = "", **more: Any) -> None:
        """Say how it ended, and the first thing that went wrong.

        It ended as "ended", "broken" (the program does not load), "lacks" (it wants a package), "gone", or "fault" (the
        tests themselves do not load).
        """
        if self._pending:
            self._add(UNMET, self._pending[0])
        first = next((self._details[sign] for sign in (FAILED, UNJUDGED, WEAK, UNMET) if sign in self._details), "")
        self._say(json.dumps({"ending": ending, "detail": detail or first, **more}).encode())

    def _say(self, text: bytes) -> None:
        if self._fd >= 0:
            view = memoryview(self._seal.close(text))
            while view:
                view = view[os.write(self._fd, view) :]


class Guard:
    """A context that turns an exception within it into a failure. `counts`: leaving without one is a test passed."""

    def __init__(self, tally: Tally, counts: bool) -> None:
        self._tally, self._counts = tally, counts

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            if self._counts:
                self._tally.add_pass()
            return False
        if not isinstance(error, SWALLOWED):
            return False
        self._tally.add_failure(error)
        return True


class FaultError(Exception):
    """The problem's own code does not load."""


class Run:
    """One execution of a problem's tests, against a program or a probe."""

    def __init__(self, config: GraderConfig, report_fd: int) -> None:
        self._config = config
        self.tally = Tally(report_fd, config)
        self.observer = Observer(config["baseline"], config["test"], config["open_ended"], self.tally.note)
        self.space: Space = {}

    def load(self, read_original: Any) -> None:
        """Load the prompt's definitions and the tests, rewritten.

        Raises:
            FaultError: they do not load.
        """
        self.space = load_prompt(self._config["prompt"])
        self.space[TEST] = Guard(self.tally, counts=True)
        self.space[ITERATION] = Guard(self.tally, counts=False)
        self.space[WATCH] = Watcher(self.observer, read_original)
        try:
            tree = rewrite(self._config["test"], self._config["entry_point"])
            self.code = compile(tree, "test.py", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise FaultError(f"expected tests that compile, got {describe(error)}") from error

    def run(self, candidate: Any) -> None:
        """Run `check`.

        Raises:
            FaultError: the tests do not load.
        """
        self.space[self._config["entry_point"]] = candidate
        try:
            exec(self.code, self.space)
        except (Unsendable, PeerGone):
            raise
        except SWALLOWED as error:
            raise FaultError(f"expected tests that load, got {describe(error)}") from error
        seed_random(SEED)  # the canonical solution and the program get the same tests
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(SEED)
        with Guard(self.tally, counts=False):
            self.space["check"](candidate)
        self.observer.close()


def run_grader(config: GraderConfig, wire_fd: int, report_fd: int) -> None:
    """Run config["test"] against the worker at the other end of the wire, or against the probes."""
    sys.path += config["packages"]
    os.environ.setdefault("HOME", "/")
    if config["probes"]:
        return probe(config, report_fd)
    run = Run(config, report_fd)
    tally = run.tally
    try:
        program = RemoteProgram(wire_fd, config["message_bytes"], run.observer, config["test"])
        run.load(program.read_original)
        match program.receive():
            case ["ready", {"entry": list(node), "shared": list(names)}]:
                candidate = program.begin(node, {str(name): run.space.get(name) for name in names})
            case ["broken", str(text)]:
                return tally.close("broken", text)
            case ["lacks", [str(name), str(text)]]:
                return tally.close("lacks" if is_installed(name) else "broken", text)
            case message:
                raise PeerGone(f"expected a program, got {str(message)[:60]}")
        for name in find_missing(run.code, run.space):
            value = program.read_global(name)
            if value is not program.MISSING:
                run.space[name] = value
        run.run(candidate)
    except PeerGone as error:
        return tally.close("gone", str(error))
    except Unsendable as error:
        tally.add_failure(error)
    except FaultError as error:
        return tally.close("fault", str(error))
    return tally.close("ended", record=run.observer.make_record(tally.counts[PASSED] + tally.counts[WEAK]))


def is_installed(name: str) -> bool:
    """Whether it is a package that the user has, and the jail lacks."""
    import importlib.util

    try:
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def load_prompt(prompt: str) -> Space:
    """Make a namespace with the prompt's own functions: some problems' tests call helpers that the prompt defines."""
    space: Space = {"__name__": "solution"}
    for text in (prompt, prompt.rstrip() + "\n    pass\n"):
        try:
            code = compile(text, "prompt.py", "exec")
        except (SyntaxError, ValueError):
            continue
        try:
            exec(code, space)
        except Exception as error:
            raise FaultError(f"expected a prompt that loads, got {describe(error)}") from error
        break
    space["__name__"] = "test"
    return space


def probe(config: GraderConfig, report_fd: int) -> None:
    """Run the tests on every universal wrong answer, and report which of them pass."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    found: dict[str, list[bool]] = {}
    quiet = open(os.devnull, "w")  # noqa: SIM115
    said, sys.stdout, sys.stderr = sys.stdout, quiet, quiet
    for name, function in PROBES.items():
        run = Run(config, -1)
        signal.setitimer(signal.ITIMER_REAL, PROBE_S)
        try:
            run.load(lambda value: value)
            run.run(ProbeCandidate(function, run.observer))
        except BaseException:
            found[name] = [False, False]
            continue
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        counts, unmet = run.tally.counts, run.tally.has_pending
        wanted = max(1, config["baseline"]["passed"] if config["baseline"] else 1)
        published = counts[PASSED] + counts[WEAK] > 0 and not counts[FAILED] + counts[UNJUDGED]
        found[name] = [published, published and not unmet and not counts[WEAK] and counts[PASSED] >= wanted]
    sys.stdout = said
    Tally(report_fd, config).close("ended", probes=found)
