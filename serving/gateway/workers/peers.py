"""How a process of a gateway asks the others what they know.

Each listens at a socket that it has inherited, with a name in Linux' abstract namespace, so that no file is left when
all are killed. A question is a line, its answer all that comes until the end. Nobody else's processes are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

ANSWER_S = 2.0
BACKLOG = 16
CREDENTIALS = struct.Struct("iII")  # process, user, group
logger = logging.getLogger(__name__)

Answers = Mapping[str, Callable[[], Awaitable[bytes]]]


class Peers:
    """The sockets of all workers."""

    def __init__(self, workers: int) -> None:
        run = secrets.token_hex(8)
        self._addresses = [f"\0laguna-gateway-{run}-{worker}" for worker in range(workers)]
        self._listeners = []
        for address in self._addresses:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(address)
            listener.listen(BACKLOG)
            self._listeners.append(listener)
        self.worker = 0

    def close(self) -> None:
        """Let the sockets go, in this process."""
        for listener in self._listeners:
            listener.close()

    @contextlib.asynccontextmanager
    async def serve(self, answers: Answers) -> AsyncIterator[None]:
        """Answer the others' questions, each by its name, while the block runs."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                given = writer.get_extra_info("socket").getsockopt(
                    socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size
                )
                _, user, _ = CREDENTIALS.unpack(given)
                question = (await reader.readline()).decode("ascii", "replace").strip()
                if user == os.geteuid() and question in answers:
                    writer.write(await answers[question]())
                    await writer.drain()
            except OSError:
                pass  # who asked has left
            except Exception:
                logger.exception("a question of another worker")
            finally:
                writer.close()

        server = await asyncio.start_unix_server(answer, sock=self._listeners[self.worker].dup())
        try:
            yield
        finally:
            server.close()

    async def ask(self, question: str) -> dict[int, bytes]:
        """Ask all others; one that does not answer in time, or is being started again, is left out."""
        others = [worker for worker in range(len(self._addresses)) if worker != self.worker]
        answers = await asyncio.gather(*(_ask(self._addresses[worker], question) for worker in others))
        return {worker: answer for worker, answer in zip(others, answers, strict=True) if answer}


async def _ask(address: str, question: str) -> bytes:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect(address)  # at once, or not at all; uvloop 0.23 takes no such address
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(sock=connection)
            try:
                writer.write(question.encode("ascii") + b"\n")
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        connection.close()
        return b""
