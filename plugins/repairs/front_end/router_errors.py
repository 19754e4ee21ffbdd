"""A path that is not there, and a method that a path does not take, are refused in the form of every other refusal.

vLLM's handler is registered for FastAPI's HTTPException; what the router itself raises is Starlette's, the class above
it, and comes as `{"detail": "Not Found"}`, in which OpenAI's clients find no message.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_request_limits.py::test_stock_lets_the_router_answer` fails.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.exception_handling import register


def apply() -> None:
    """Register vLLM's handler for Starlette's class, and so for both, in servers that are made from now on."""
    register.HTTPException = HTTPException
