"""vLLM's API server, as `python -m vllm.entrypoints.openai.api_server` runs it, without a search for garbage at start.

While its 5,000 modules are imported, and five times more until the engine answers, Python looks through the million
objects that imports make, and finds next to none that can go. Here imports are not searched, and what they made is
left out of all later searches (`gc.freeze`), also of those of a core that is forked from this process.

    python -m laguna_serve.plugins.processes.api_server --model MODEL …    as vLLM's own module
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import runpy
import sys

VLLM_SERVER = "vllm.entrypoints.openai.api_server"
# Imported by the server when it makes its engine.
ENGINE = "vllm.v1.engine.async_llm"


def load() -> None:
    """Import vLLM's server and what it imports later."""
    gc.disable()
    importlib.import_module(VLLM_SERVER)
    with contextlib.suppress(ModuleNotFoundError):  # where it is elsewhere, it is imported later
        importlib.import_module(ENGINE)
    gc.freeze()
    gc.enable()


def execute() -> None:
    """Execute it, loaded, as the program that was asked for."""
    del sys.modules[VLLM_SERVER]  # it is executed as __main__, by that name
    runpy.run_module(VLLM_SERVER, run_name="__main__", alter_sys=True)


def run() -> None:
    """Import vLLM's server, then execute it."""
    load()
    execute()


if __name__ == "__main__":
    run()
