"""What waits for something before it can go on: in a task that ends with it."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

from laguna_serve.serving.gateway.wire import errors
from laguna_serve.serving.gateway.wire.errors import GatewayError
from laguna_serve.serving.gateway.wire.headers import Head

Waited = TypeVar("Waited")
logger = logging.getLogger(__name__)


class Waiter(ABC):
    """Waits for one thing at a time."""

    __slots__ = ("_task",)
    head: Head
    _task: asyncio.Task[None] | None

    @abstractmethod
    def fail(self, error: GatewayError) -> None:
        """Say that it cannot go on."""

    def wait_for(self, wait: Awaitable[Waited], go_on: Callable[[Waited], None]) -> None:
        """Call `go_on` with what `wait` gives, unless the client leaves first."""
        self._task = asyncio.get_running_loop().create_task(self._wait_for(wait, go_on))

    def stop_waiting(self) -> None:
        """Note that what it waited for is of no use any more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def attempt(self, act: Callable[[], None]) -> None:
        """Do something; whatever goes wrong is the answer, and nothing of the request stays."""
        try:
            act()
        except GatewayError as error:
            self.fail(error)
        except Exception:
            self._admit()

    async def _wait_for(self, wait: Awaitable[Waited], go_on: Callable[[Waited], None]) -> None:
        try:
            found = await wait
            self._task = None
            go_on(found)
        except GatewayError as error:
            self._task = None
            self.fail(error)
        except Exception:
            self._task = None
            self._admit()

    def _admit(self) -> None:
        """Admit a defect, whose traceback goes to the log."""
        logger.exception("request %s", self.head.request_id.decode())
        self.fail(errors.failed())
