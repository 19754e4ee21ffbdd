"""Starts the processes of a gateway, starts those again that die, and passes signals on to all.

They are forked: what they share is inherited, sockets too, so that connections which come while a process is started
again wait for it. This process serves nothing and has no thread.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.gateway.telemetry.event_log import name_process
from laguna_serve.serving.gateway.workers.team import Team

WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
PR_SET_PDEATHSIG = 1
# How often it is looked for a worker that is ready, or is to be started again.
POLL_S = 0.1
# What the start of one may take.
START_S = 60.0
# One that dies before it has run for so long is started again after a pause, which grows from death to death.
STEADY_S, FIRST_PAUSE_S, MOST_PAUSE_S = 10.0, 0.5, 5.0
FAILED = 3
REPORT_BYTES = 1 << 16
logger = logging.getLogger(__name__)

# Serves as a worker and calls back when it is ready; whether it ever was.
Work = Callable[[int, Callable[[], None]], bool]


class _Report(msgspec.Struct):
    """What a worker says once: that it is ready, or why it could not start."""

    worker: int
    fault: str | None = None


@dataclass(slots=True)
class _Worker:
    """One of the processes; `pid` is 0 while there is none.

    `deaths` in a row, soon after a start. One that is `behind` has an older configuration than this process.
    """

    number: int
    pid: int = 0
    started_s: float = 0.0
    ready: bool = False
    behind: bool = False
    deaths: int = 0
    start_at_s: float = 0.0


class Workers:
    """All of them.

    `reread`: what SIGHUP asks before it is passed on, and does not pass on if that fails; without it SIGHUP is a
    SIGTERM. `stops`: what they are sent where a signal asks this process to stop. Then they have so many seconds
    (`patience_s`) before they are killed.
    """

    def __init__(
        self,
        team: Team,
        work: Work,
        announce: Callable[[], None],
        reread: Callable[[], None] | None,
        stops: Mapping[signal.Signals, signal.Signals],
        patience_s: float,
    ) -> None:
        self._team, self._work, self._announce, self._reread = team, work, announce, reread
        self._stops, self._patience_s = stops, patience_s
        self._blocked = WATCHED | set(stops.values())
        self._workers = [_Worker(number) for number in range(team.size)]
        self._stop_by_s: float | None = None
        self._announced = False
        self._reports, self._report_to = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reports, False)

    def run(self) -> None:
        """Serve until a signal. Raises EngineError: a worker could not start in the first place."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it may be inherited as ignored, and nothing to wait for then
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        gc.collect()
        gc.freeze()  # so that the collector does not write to pages that all could share
        try:
            while self._stop_by_s is None or any(worker.pid for worker in self._workers):
                self._start_missing()
                if (arrived := signal.sigtimedwait(WATCHED, POLL_S)) is not None:
                    self._pass_on(signal.Signals(arrived.si_signo))
                self._note_ends()
                self._read_reports()
                self._end_stuck()
        finally:
            self._end()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            gc.unfreeze()

    def _start_missing(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if not worker.pid and self._stop_by_s is None and now >= worker.start_at_s:
                worker.started_s, worker.ready, worker.behind = now, False, False
                try:
                    worker.pid = self._fork(worker.number)
                except OSError as error:
                    if not self._announced:
                        raise EngineError(
                            f"gateway: expected to start {self._team.size} processes, got {error}"
                        ) from None
                    logger.error("worker %d could not be started: %s; it is tried again", worker.number, error)
                    worker.start_at_s = now + MOST_PAUSE_S

    def _fork(self, number: int) -> int:
        parent = os.getpid()
        if (pid := os.fork()) != 0:
            return pid
        status = FAILED
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, self._stops[signal.SIGTERM])
            if os.getppid() == parent:
                status = self._serve(number)
        except BaseException:
            logger.exception("worker %d", number)
        finally:
            sys.stderr.flush()
            os._exit(status)  # nothing of this stack is this process's to clear up

    def _serve(self, number: int) -> int:
        """Serve, in a worker's process; its exit status."""
        self._team.join(number)
        name_process(f"gateway worker {number}")

        def ready() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._blocked)  # what has come by now comes now
            self._tell(_Report(number))

        try:
            return 0 if self._work(number, ready) else FAILED
        except EngineError as error:
            self._tell(_Report(number, str(error)))
            return FAILED

    def _tell(self, report: _Report) -> None:
        os.write(self._report_to, msgspec.json.encode(report) + b"\n")

    def _read_reports(self) -> None:
        try:
            lines = os.read(self._reports, REPORT_BYTES).splitlines()
        except BlockingIOError:
            return
        for report in (msgspec.json.decode(line, type=_Report) for line in lines):
            if report.fault is None:
                self._note_ready(self._workers[report.worker])
            elif not self._announced:
                raise EngineError(report.fault)
            else:
                logger.error("worker %d: %s", report.worker, report.fault)
        if not self._announced and all(worker.ready for worker in self._workers):
            self._announced = True
            self._announce()

    def _note_ready(self, worker: _Worker) -> None:
        """Note that it serves, and have it read what has changed since it was forked."""
        worker.ready = True
        if worker.behind and worker.pid:
            os.kill(worker.pid, signal.SIGHUP)
        worker.behind = False

    def _pass_on(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP and self._reread is None:
            number = signal.SIGTERM
        if number is signal.SIGHUP:
            self._pass_on_hangup()
        elif number in self._stops:
            self._stop_by_s = self._stop_by_s or time.monotonic() + self._patience_s
            self._send(self._stops[number])
            self._send(signal.SIGKILL, ready=False)  # these have nothing in flight, and hear nothing else yet

    def _pass_on_hangup(self) -> None:
        """Have the configuration read by all, if it can be: those that are started later have it from this process."""
        assert self._reread is not None
        try:
            self._reread()
        except Exception as error:  # as the server does it
            logger.error("%s; going on as before", error)
        else:
            self._send(signal.SIGHUP, ready=True)
            for worker in self._workers:
                worker.behind = not worker.ready

    def _end_stuck(self) -> None:
        """Kill what has had its time, to stop or to start."""
        now = time.monotonic()
        if self._stop_by_s is not None and now > self._stop_by_s:
            self._send(signal.SIGKILL)
        for worker in self._workers:
            if worker.pid and not worker.ready and now > worker.started_s + START_S:
                os.kill(worker.pid, signal.SIGKILL)

    def _send(self, number: signal.Signals, *, ready: bool | None = None) -> None:
        for worker in self._workers:
            if worker.pid and ready in (None, worker.ready):
                os.kill(worker.pid, number)  # not reaped yet, so that it is nobody else's

    def _note_ends(self) -> None:
        for worker in self._workers:
            if worker.pid and (ended := os.waitpid(worker.pid, os.WNOHANG))[0]:
                self._note_end(worker, os.waitstatus_to_exitcode(ended[1]))

    def _note_end(self, worker: _Worker, status: int) -> None:
        worker.pid = 0
        self._team.board.forget(worker.number)
        if self._stop_by_s is not None:
            return
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        if not self._announced:
            self._read_reports()  # it may have said why
            raise EngineError(f"gateway: worker {worker.number} ended {how} before it was ready; see above")
        now = time.monotonic()
        worker.deaths = worker.deaths + 1 if now - worker.started_s < STEADY_S else 0
        pause_s = min(MOST_PAUSE_S, FIRST_PAUSE_S * worker.deaths) if worker.deaths else 0.0
        worker.start_at_s = now + pause_s
        logger.error("worker %d ended %s, with what it had in flight; it is started again", worker.number, how)

    def _end(self) -> None:
        """Leave no process, whatever happened."""
        self._send(signal.SIGKILL)
        for worker in self._workers:
            if worker.pid:
                os.waitpid(worker.pid, 0)
        os.close(self._reports)
        os.close(self._report_to)
