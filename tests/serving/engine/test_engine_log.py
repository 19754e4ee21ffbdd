"""The cause of a death and the phase of a start, from logs as vLLM writes them.

engine_logs/ has the ends of logs of vLLM 0.32 on a CPU: starts that failed, and engines whose processes were killed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.serving.engine.death import describe_death
from laguna_serve.serving.engine.log import find_cause, find_phase, measure_log, read_log

LOGS = Path(__file__).parent / "engine_logs"
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


REAL = {
    "flag": "exit status 2: api_server.py: error: unrecognized arguments: --nonsense",
    "kv-too-small": "exit status 1: ValueError: To serve at least one request with the model's max seq len (2048), (",
    "max-len": "ModelConfig: Value error, User-specified max_model_len (9999999) is greater than the derived max_model",
    "memory": "exit status 1: ValueError: Available memory on node 0 (7.78/10.59 GiB) on kv cache allocation is less",
    "overrides-architecture": "ModelConfig: Value error, Model architectures ['NopeForCausalLM'] are not supported",
    "overrides-json": "errors for ModelConfig: hf_overrides.dict[str,any]: Input should be a valid dictionary",
    "overrides-layers": "exit status 1: IndexError: list index out of range (laguna.py:484, __init__: layer_types is",
    "quant-unknown": "ModelConfig: Value error, Unknown quantization method: nonsense. Must be one of ['awq'",
    "reasoning-parser": "exit status 1: KeyError: \"Reasoning parser 'nonsense' not found. Available parsers: ",
    "tokenizer-missing": "Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library",
    "tool-parser": "exit status 1: KeyError: 'invalid tool call parser: nonsense (chose from { apertus,",
    "kill-api": "signal 9 (SIGKILL): killed without a word in its log: by somebody, or by the kernel for memory",
    "kill-core": "exit status 0: killed without a word in its log: by somebody, or by the kernel for memory",
    "segv-core": "exit status 0: Segmentation fault in native code",
    "term-api": "exit status 0: it ended by itself; its last line: INFO:     Application shutdown complete.",
}
STATUS = {"flag": 2, "kill-api": 128 + 9, "kill-core": 0, "segv-core": 0, "term-api": 0}


@pytest.mark.parametrize("name", REAL)
def test_cause_in_a_real_log(name: str) -> None:
    told = describe_death(STATUS.get(name, 1), read_log(LOGS / f"{name}.log"))
    assert REAL[name] in told
    assert "\n" not in told


def test_every_log_has_its_cause() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == set(REAL)


@pytest.mark.parametrize(
    ("status", "words", "kills", "told"),
    [
        (137, "an answer\n", 1, "signal 9 (SIGKILL): the kernel killed it, as memory ran out (OOM)"),
        (0, "core_client.py: engine core exited unexpectedly\n", 1, "exit status 0: the kernel killed it, as memory"),
        (1, "Worker proc W died unexpectedly (exit code: -9)\n", 1, "exit status 1: the kernel killed it, as memory"),
        (1, "ValueError: wrong\n", 1, "exit status 1: ValueError: wrong"),
        (134, "terminate called after throwing\n  what():  bad_alloc\n", 0, "signal 6 (SIGABRT): what():  bad_alloc"),
        (137, "RuntimeError: real\n", 0, "signal 9 (SIGKILL): RuntimeError: real"),
        (-9, "", 0, "signal 9 (SIGKILL): killed without a word"),
        (None, "", 0, "its core ended: killed without a word"),
        (128 + 99, "bye\n", 0, "signal 99: bye"),
        (0, "", 0, "exit status 0: it ended by itself; its last line: the log is empty"),
        (
            0,
            "ERROR AsyncLLM output_handler failed.\nvllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered"
            " an issue. See stack trace (above) for the root cause.\nINFO:     Application shutdown complete.\n",
            0,
            "exit status 0: killed without a word in its log",
        ),
        (
            1,
            "NVRM: Xid (PCI:0000:01:00): 79, pid=7, GPU has fallen off the bus.\ntorch.AcceleratorError: CUDA error\n",
            0,
            "exit status 1: NVRM: Xid (PCI:0000:01:00): 79, pid=7, GPU has fallen off the bus.",
        ),
        (1, "RuntimeError: NVML_ERROR_GPU_IS_LOST\nRuntimeError: CUDA error: unknown\n", 0, "NVML_ERROR_GPU_IS_LOST"),
    ],
)
def test_how_an_engine_ended(status: int | None, words: str, kills: int, told: str) -> None:
    assert told in describe_death(status, words, memory_kills=kills)


CRASH = """\
Fatal Python error: Segmentation fault

Thread 0x00007f (most recent call first):
  File "/x/attention.py", line 7 in forward
  File "/x/model.py", line 9 in run
"""


def test_a_crash_in_native_code_names_the_python_function() -> None:
    assert find_cause(CRASH) == "Segmentation fault in forward (/x/attention.py:7)"


def test_a_bare_exception_gets_its_place() -> None:
    log = 'Traceback (most recent call last):\n  File "/x/y.py", line 3, in f\n    assert a == b\nAssertionError\n'
    assert find_cause(log) == "AssertionError (y.py:3, f: assert a == b)"


def test_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("ValueError: of a request\n" + "x" * (2 << 20) + "\nlast\n")
    size = path.stat().st_size
    assert read_log(path).endswith("x\nlast\n")
    assert len(read_log(path)) == 1 << 20
    assert read_log(path, size - 5) == "last\n"
    assert read_log(path, size + 1) == read_log(path), "it was begun again"
    assert measure_log(path) == size
    assert measure_log(tmp_path) > 0
    assert read_log(tmp_path) == ""


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


def test_first_phase_names_what_is_imported() -> None:
    assert find_phase("", "torch") == "importing torch"


def test_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "none") == ""
