"""The cause of a death and the phase of a start, from logs as vLLM writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.serving.engine_log import find_cause, find_phase, read_log

PLUGIN_FAILURE = """\
(EngineCore pid=4602) ERROR 11-20 23:28:03 [__init__.py:72] Failed to load plugin laguna_serve
(EngineCore pid=4602) ERROR 11-20 23:28:03 [__init__.py:72] ModuleNotFoundError: No module named 'laguna_serve.x'
"""
SECOND_HAND = """\
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
VALIDATION = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (99999) is greater than the derived max_model_len
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            PLUGIN_FAILURE
            + "(Worker pid=7) ERROR 11-20 23:28:20 [x.py:953] RuntimeError: sizes differ.\n"
            + SECOND_HAND,
            "RuntimeError: sizes differ.",
        ),
        (PLUGIN_FAILURE + SECOND_HAND, "ModuleNotFoundError: No module named 'laguna_serve.x'"),
        (
            VALIDATION,
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: "
            "Value error, User-specified max_model_len (99999) is greater than the derived max_model_len",
        ),
        (
            "api_server.py: error: unrecognized arguments: --nonsense\n",
            "api_server.py: error: unrecognized arguments: --nonsense",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory.\n", "torch.OutOfMemoryError: CUDA out of memory."),
        ("(EngineCore pid=1) ERROR 11-20 23:28:20 [x.py:1] it broke\nlast words\n", "it broke"),
        ("only\nwords\n\n", "words"),
        ("", "the log is empty"),
    ],
    ids=["worker", "plugin", "pydantic", "usage", "gpu-memory", "error-level", "last-line", "empty"],
)
def test_cause_is_the_first_hand_exception(log: str, cause: str) -> None:
    assert find_cause(log) == cause


def test_cause_is_cut_to_a_readable_length() -> None:
    assert len(find_cause("ValueError: " + "x" * 5000)) == 600


@pytest.mark.parametrize(
    ("log", "phase"),
    [
        ("", "importing vLLM"),
        ("[api_utils.py:286] non-default args: {}", "reading the model's configuration"),
        ("Initializing a V1 LLM engine (v0.32.0)\nStarting to load model m...\n", "loading weights"),
        ("Loading weights took 1 s\nWarming up model for the compilation...\n", "compiling"),
    ],
    ids=["nothing", "arguments", "weights", "compilation"],
)
def test_phase_is_the_last_one_begun(log: str, phase: str) -> None:
    assert find_phase(log) == phase


def test_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "none") == ""
