"""`pytest --workers N`: the tests run in N processes, forked from the one that has collected them.

What test files import, and the collection itself, is paid for once; workers that are started, as pytest-xdist's are,
each do all of it again.  A file's tests run in one process, as they share what they start; files are taken up in the
order of collection.  A process that ends by itself fails the test that it was running, and ends the run.

Checked against pytest 9.2 (`runtestprotocol`, `SetupState.teardown_exact`, `CaptureManager`).
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

ENDING_S = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers", type=int, default=0, metavar="N", help="run the tests in N forked processes")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Leaves what is nothing to be shared out to pytest's own loop."""
    count, config = session.config.option.workers, session.config
    if not count or session.testsfailed or config.option.collectonly:
        return None
    files = [list(items) for _, items in itertools.groupby(session.items, key=lambda item: item.path)]
    # The folder of all temporary ones is made here, so that all share it.
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    # What is there now is nobody's garbage: the workers' own collections need not look through it.
    gc.collect()
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    numbers, workers = fork.SimpleQueue(), {}
    for _ in range(count):
        receiving, sending = fork.Pipe(duplex=False)
        process = fork.Process(target=run_files, args=(session, files, numbers.get, sending))
        process.start()
        sending.close()
        workers[receiving] = process
    for number in [*range(len(files)), *itertools.repeat(None, count)]:
        numbers.put(number)
    running: dict[Connection, pytest.Item] = {}
    try:
        while workers:
            for receiving in wait(list(workers)):
                assert isinstance(receiving, Connection)
                try:
                    message = receiving.recv()
                except EOFError:
                    process = workers.pop(receiving)
                    process.join()
                    if process.exitcode or receiving in running:
                        report_death(session, running.get(receiving), process.exitcode)
                else:
                    if isinstance(message, tuple):
                        number, place = message
                        running[receiving] = files[number][place]
                    else:
                        del running[receiving]
                        report_again(config, message)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
    finally:
        for process in workers.values():
            os.kill(process.pid, signal.SIGINT)
        for process in workers.values():
            process.join(ENDING_S)
            process.kill()
    return True


def report_again(config: pytest.Config, message: list[dict[str, Any]]) -> None:
    """Reports of a worker's, to all who listen in this process."""
    for data in message:
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        config.hook.pytest_runtest_logreport(report=report)


def report_death(session: pytest.Session, item: pytest.Item | None, status: int | None) -> None:
    """Of a process that ended before its files did: none of the rest may be taken for tested."""
    session.shouldfail = f"a worker ended with status {status}"
    if item is not None:
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", session.shouldfail, "call")
        session.config.hook.pytest_runtest_logreport(report=report)


def run_files(
    session: pytest.Session, files: list[list[pytest.Item]], take: Callable[[], int | None], reports: Connection
) -> None:
    """A worker's life: it sends the place of each test before it runs it, and its reports afterwards."""
    config = session.config
    # Until now its captured output is in the parent's files.
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    config.pluginmanager.register(Reporter(reports))
    try:
        while (number := take()) is not None:
            for place, (item, following) in enumerate(itertools.pairwise([*files[number], session])):
                reports.send((number, place))
                # After a file's last test, what belongs to the session stays.
                config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    except KeyboardInterrupt:
        pass
    finally:
        session._setupstate.teardown_exact(None)
        capture.stop_global_capturing()


class Reporter:
    """Sends a test's reports, where pytest's own protocol would write them to the terminal."""

    def __init__(self, reports: Connection) -> None:
        self._reports = reports

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item) -> bool:
        serialise = item.config.hook.pytest_report_to_serializable
        made = runtestprotocol(item, log=False, nextitem=nextitem)
        self._reports.send([serialise(config=item.config, report=report) for report in made])
        return True
