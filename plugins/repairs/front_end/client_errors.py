"""What goes wrong while a request is read, and before anything of it reaches the engine, is the request's mistake: 400.

vLLM's own checks walk the client's JSON before its types are known (`structured_outputs: []` has no `.get`), render it
with the client's chat template, and turn its schema into a grammar; whatever is raised there that is no error of vLLM's
own kind ends as a 500. Here it is a 400 when the traceback goes through the code that reads requests. Everything else
stays what it is.

A grammar that the engine cannot compile, or that no token of the model's can go on with (`{"$ref": "#/$defs/a"}` of an
`a` that is itself), ends its request alone, and with "Internal server error". Without a transfer of caches between
engines nothing else ends a request so, and it is a 400, too.

Checked against vLLM 0.32.0. It can go when
`tests/plugins/test_request_limits.py::test_stock_blames_itself_for_what_it_cannot_read` fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.exceptions import VLLMError, VLLMValidationError

from laguna_serve.plugins.repairs.front_end.leaving import NO_THREADS, make_refusal

NAME = "create_error_response"
# Modules that read requests, and functions that do in modules that write answers, too.
READERS = (
    "fastapi.dependencies.",
    "pydantic.",
    "jinja2.",
    "vllm.inputs",
    "vllm.renderers.",
    "vllm.entrypoints.chat_utils",
    "vllm.sampling_params",
    "vllm.v1.engine.input_processor",
    "vllm.v1.structured_output.",
)
FUNCTIONS = frozenset(
    {"to_sampling_params", "to_beam_search_params", "render_chat_request", "render_completion_request"}
)
MOST_CHARS = 300

stock_create = error_response.create_error_response
stock_raise = GenerateBaseServing._raise_if_error


def is_clients(error: BaseException) -> bool:
    """Whether an exception that is none of vLLM's own comes from reading a request."""
    if isinstance(error, VLLMError):
        return False
    return any(module.startswith(READERS) or function in FUNCTIONS for module, function in _list_frames(error))


def _list_frames(error: BaseException) -> Iterator[tuple[str, str]]:
    place = error.__traceback__
    while place is not None:
        frame = place.tb_frame
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        place = place.tb_next


def create_error_response(message: Any, *args: Any, **kwargs: Any) -> Any:
    """`error_response.create_error_response`; what goes wrong in AsyncLLM comes wrapped in an error of the engine's."""
    if isinstance(message, Exception):
        cause = message.__cause__ if isinstance(message, VLLMError) and message.__cause__ is not None else message
        if isinstance(cause, RuntimeError) and NO_THREADS in str(cause):
            message = make_refusal()
        elif is_clients(cause):
            said = f"{type(cause).__name__}: {cause}".encode(errors="replace").decode()[:MOST_CHARS]
            message = VLLMValidationError(f"The request could not be read: {said}")
    return stock_create(message, *args, **kwargs)


def raise_if_error(self: GenerateBaseServing, finish_reason: str | None, request_id: str) -> None:
    """vLLM's `GenerateBaseServing._raise_if_error`, which blames the grammar where one can be to blame."""
    config = self.engine_client.vllm_config
    if finish_reason == "error" and config.kv_transfer_config is None and config.ec_transfer_config is None:
        raise VLLMValidationError(
            "structured outputs: expected a grammar that the model's tokens can follow, got one that cannot be compiled"
            " or leads to where no token goes on"
        )
    stock_raise(self, finish_reason, request_id)


def apply() -> None:
    """Replace vLLM's method, and its function in its module and in those that have imported it."""
    GenerateBaseServing._raise_if_error = raise_if_error
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and getattr(module, NAME, None) is stock_create:
            setattr(module, NAME, create_error_response)
