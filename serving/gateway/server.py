"""uvicorn's server for the gateway and its admin port: signals, reloads, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from laguna_serve.serving.gateway.admin.services import find_services
from laguna_serve.serving.gateway.config import Config, ConfigError
from laguna_serve.serving.gateway.config.fixed import list_fixed_changes
from laguna_serve.serving.gateway.config.listening import Server
from laguna_serve.serving.gateway.relay.relay import Relay
from laguna_serve.serving.gateway.wire.failures import LOCAL_SHORTAGE
from laguna_serve.serving.kit.results import JsonObject

# How often a server looks whether it should end where nobody has woken it.
TICK_S = 1.0
# How often it is looked whether an update of weights has ended, before the end.
STEERING_POLL_S = 0.05
# What a call into its thread may take: it never waits there.
CALL_S = 30.0
# What a parent of several processes sends to them where it got the other.
OWN_STOPS = {signal.SIGTERM: signal.SIGUSR1, signal.SIGINT: signal.SIGUSR2}
logger = logging.getLogger(__name__)


class _EventServer(uvicorn.Server):
    """uvicorn's server, which ends at once when it is asked to.

    uvicorn itself looks ten times a second whether it should, which streams beside it would feel.
    """

    def __init__(self, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self._stopped = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; from here on `schedule` reaches this thread."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def main_loop(self) -> None:
        """Until `should_exit`, which is seen at once after `wake`. What uvicorn does every second it does here, too."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stopped.wait()

    def wake(self) -> None:
        """From any thread, or a signal handler: look at `should_exit`, which is set."""
        self.schedule(self._stopped.set)

    def schedule(self, act: Callable[[], None]) -> None:
        """From any thread, or a signal handler: do something soon, in the server's own thread, if that still runs."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(act)


class _AdminServer(_EventServer):
    """Stops when the gateway does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the gateway's."""
        yield


class GatewayServer(_EventServer):
    """The gateway's server, with the admin application beside it on a port of its own, if it is given sockets for it.

    Its first signal turns new requests away at once and lets those in flight finish. A second one ends everything. With
    `server.lame_duck_s` there is one more in front, if it is SIGTERM: the gateway answers as before, and is not ready.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: uvicorn.Config,
        admin: uvicorn.Config,
        admin_sockets: list[socket.socket],
        ready: Callable[[], None],
        reload: Callable[[], Config] | None = None,
        configured: Config | None = None,
    ) -> None:
        super().__init__(settings)
        self._app = app
        self._admin, self._admin_sockets = _AdminServer(admin), admin_sockets
        self._admin_task: asyncio.Task[None] | None = None
        self._ready, self._reload, self._configured = ready, reload, configured
        # SIGHUPs that no configuration has been taken for yet; the task that reads it.
        self._asked, self._outdated = 0, False
        self._reading: asyncio.Task[None] | None = None
        self.parent = os.getppid()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so. SIGHUP reads the configuration again; without a file of it, it is a SIGTERM."""
        await super().startup(sockets)
        if not self.started:
            return
        asyncio.get_running_loop().set_exception_handler(self._note_loop_error)
        if self._admin_sockets:
            self._admin_task = asyncio.create_task(self._admin.serve(self._admin_sockets))
            while not (self._admin.started or self._admin_task.done()):
                await asyncio.sleep(0.01)
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            if self._reload is not None:
                loop.add_signal_handler(signal.SIGHUP, self.reload)
            elif signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
                loop.add_signal_handler(signal.SIGHUP, self.handle_exit, signal.SIGTERM, None)
        # What there is by now stays: the collector need not look at it again while streams wait.
        gc.collect()
        gc.freeze()
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is in flight; the admin page shows it to the end."""
        await self._finish_steering()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the application to the loop's end, which cancels it with a traceback
            await self.lifespan.shutdown()
        self.relay.close()
        self._admin.should_exit = self._admin.force_exit = True
        self._admin.wake()
        if self._admin_task is not None:
            await self._admin_task

    async def _finish_steering(self) -> None:
        """Let the admin port finish what it was asked for: in the middle of an update engines would stay paused.

        What that takes is taken from the time of the requests in flight, which go on meanwhile.
        """
        now = asyncio.get_running_loop().time
        begun_s, most_s = now(), self.config.timeout_graceful_shutdown or 0
        while self._admin.server_state.tasks and not self.force_exit and now() < begun_s + most_s:
            await asyncio.sleep(STEERING_POLL_S)
        self.config.timeout_graceful_shutdown = max(0, round(begun_s + most_s - now()))

    @property
    def relay(self) -> Relay:
        """Of the application, once that has started."""
        return find_services(self._app).relay

    def reload(self) -> None:
        """Take the configuration as it is now, soon, or, where anything is wrong with it, nothing of it.

        It is read in a thread: of thousands of keys that takes a second, in which streams go on.
        """
        self._asked += 1
        if self._reading is None:
            self._reading = asyncio.create_task(self._reload_beside())

    def outdate(self) -> None:
        """Note that what is being read is not true any more, so that it is read again before it is taken."""
        self._outdated = True

    async def _reload_beside(self) -> None:
        while self._asked:  # also for one that came while the file was being read
            self._asked = 0
            with self._going_on():
                self._take(await self._read())
        self._reading = None

    async def _read(self) -> Config:
        assert self._reload is not None
        while True:
            self._outdated = False
            config = await asyncio.to_thread(self._reload)
            if not self._outdated:
                return config

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Go on as before where a configuration cannot be taken."""
        try:
            yield
        except ConfigError as error:
            logger.error("%s; going on as before", error)
            self.relay.journal.note_reload(taken=False)
        except Exception:
            logger.exception("the configuration could not be taken; going on as before")
            self.relay.journal.note_reload(taken=False)

    def _take(self, config: Config) -> None:
        self._renew_certificate(config.server)
        self.relay.configure(config)
        self.relay.journal.note_reload(taken=True)
        fixed = list_fixed_changes(self._configured, config) if self._configured is not None else []
        restart = f"; not changed before a restart: {', '.join(fixed)}" if fixed else ""
        logger.info("configuration read again%s", restart)

    def _renew_certificate(self, server: Server) -> None:
        """From the same files, for connections to come: certificates are replaced while their servers run."""
        context, configured = self.config.ssl, self._configured
        if context is None or configured is None:
            return
        files = (configured.server.ssl_certfile, configured.server.ssl_keyfile)
        if files[0] is not None and files == (server.ssl_certfile, server.ssl_keyfile):
            context.load_cert_chain(files[0], files[1])

    def _note_loop_error(self, loop: asyncio.AbstractEventLoop, context: JsonObject) -> None:
        """Note what the loop cannot give to anybody: accepting connections without descriptors, again and again."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in LOCAL_SHORTAGE:
            self.relay.journal.note_shortage(error.strerror or type(error).__name__)
        else:
            loop.default_exception_handler(context)

    def call(self, act: Callable[[Relay], None]) -> None:
        """Do something to the relay in the gateway's own thread, from another one, and wait until it is done.

        Raises what `act` raises.
        """

        async def run() -> None:
            act(self.relay)

        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(run(), self._loop).result(CALL_S)

    def _note_stop(self) -> None:
        logger.info("stopping: no new requests, %d in flight", len(self.relay.exchanges))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in good order at the first signal; a second one cuts it short."""
        patient = sig == signal.SIGTERM and self._configured is not None and self._configured.server.lame_duck_s > 0
        if patient and self.started and not (self.relay.leaving or self.should_exit):
            self.relay.leaving = True
            self.schedule(self._leave)
            return
        if self.should_exit:
            self.force_exit = True
        self._end()

    def _leave(self) -> None:
        """Go on for a while; what comes meanwhile is answered."""
        assert self._configured is not None
        wait_s = self._configured.server.lame_duck_s
        logger.info("leaving: not ready any more, no new requests in %g s", wait_s)
        asyncio.get_running_loop().call_later(wait_s, self._end)

    def _end(self) -> None:
        """Turn new requests away and let those in flight finish."""
        self.should_exit = True
        if self.started and not self.relay.draining:
            self.relay.draining = True
            self.schedule(self._note_stop)  # a signal may have come in the middle of a line
        self.wake()


class WorkerServer(GatewayServer):
    """That of one of several processes: its parent stops it by signals that nobody else sends.

    systemd, as a terminal, sends its own to all processes, where two would mean to stop at once.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the parent's signals in the place of those that they stand for, which are ignored."""
        for number, own in OWN_STOPS.items():
            signal.signal(number, signal.SIG_IGN)
            signal.signal(own, functools.partial(self._handle_own, number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the loop has a handler for it
        yield

    def _handle_own(self, number: signal.Signals, _: int, frame: FrameType | None) -> None:
        # A parent that is gone, for which the kernel sends this, was killed: nobody waits for balancers any more.
        orphaned = os.getppid() != self.parent
        self.handle_exit(signal.SIGINT if orphaned else number, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse connections from now on: closing is not enough, as parent and others have the sockets, too."""
        for listener in sockets or ():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        await super().shutdown(sockets)
