"""An engine that is about to stop, and lets what it has end (`--shutdown-timeout`), says so.

vLLM's server goes on taking requests meanwhile: a text cannot be tokenized any more, which is a 500, ids get an empty
answer with status 200, and `/health` says that all is well. Here they get a 503 with which clients ask elsewhere, and
so does `/health`, so that gateways and balancers stop sending them.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_request_limits.py::test_stock_goes_on_while_it_stops` fails.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

MESSAGE = "The engine is shutting down. Please try again later or on a different instance."
# What Python says of a pool of threads that has been shut down, as the tokenizer's is first.
NO_THREADS = "cannot schedule new futures after shutdown"

stock_shutdown, stock_check = AsyncLLM.shutdown, AsyncLLM.check_health
stock_admission = AsyncLLM.check_admission


def make_refusal() -> GracefulHTTPError:
    """Make what a request gets."""
    return GracefulHTTPError(MESSAGE, HTTPStatus.SERVICE_UNAVAILABLE)


def shutdown(self: AsyncLLM, *args: Any, **kwargs: Any) -> None:
    """Note that the end has begun; vLLM's `AsyncLLM.shutdown`."""
    self.leaving = True
    stock_shutdown(self, *args, **kwargs)


def check_admission(self: AsyncLLM, *args: Any, **kwargs: Any) -> None:
    """Refuse what comes after that; vLLM's `AsyncLLM.check_admission`."""
    if getattr(self, "leaving", False):
        raise make_refusal()
    stock_admission(self, *args, **kwargs)


async def check_health(self: AsyncLLM) -> None:
    """Not be well after that; vLLM's `AsyncLLM.check_health`."""
    if getattr(self, "leaving", False):
        raise EngineDeadError
    await stock_check(self)


def apply() -> None:
    """Put these in the place of the methods of vLLM's `AsyncLLM`."""
    AsyncLLM.shutdown, AsyncLLM.check_admission, AsyncLLM.check_health = shutdown, check_admission, check_health
