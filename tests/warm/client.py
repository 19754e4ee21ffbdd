"""Asks the warm processes of this test run: one of each environment, which starts at the first question."""

from __future__ import annotations

import functools
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

SERVER = Path(__file__).with_name("server.py")
ROOT = SERVER.parents[2]
# What the process of an environment imports before it forks, by the environment's folder.
MODULES = {
    ".venv": (
        "vllm.entrypoints.llm",
        "vllm.entrypoints.openai.api_server",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.executor.uniproc_executor",
        "vllm.v1.core.sched.scheduler",
        "vllm.v1.attention.backends.cpu_attn",
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
        "vllm.model_executor.models.laguna",
        "vllm.model_executor.models.qwen3_dflash",
        "transformers.models.laguna.configuration_laguna",
        "supervisor",
    ),
    ".venv-train": ("transformers.models.smollm3.modeling_smollm3", "trl.trainer.sft_trainer"),
}
# Until a process has imported all that, on a busy machine.
READY_S = 240.0


class WarmProcess:
    """A forked process, as `subprocess.Popen` has it."""

    def __init__(self, server: Warm, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        with self._server.lock:
            if self.returncode is None:
                self.returncode = self._server.ask({"poll": self.pid})["status"]
                if self.returncode is not None:
                    os.close(self._pidfd)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            select.select([self._pidfd], [], [], left)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def launch(venv: str) -> subprocess.Popen[bytes]:
    """Start the process of an environment, which ends with this one; it imports before it answers."""
    # Offline before anything is imported: huggingface_hub reads it once.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "NO_COLOR": "1"}
    environment.pop("PYTHONPATH", None)
    python = sys.executable if venv == ".venv" else str(ROOT / venv / "bin" / "python")
    command = [python, str(SERVER), *MODULES[venv]]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def share() -> str:
    """Start the one that has imported vLLM for processes of this one's; where it will listen."""
    return f"\0laguna-warm-{launch('.venv').pid}"


class Warm:
    """The process that has imported an environment's modules: it ends with the one that has started it.

    Engines are started and ended in threads, too: a question and its answer belong together.

    Attributes:
        address: where the one listens that has vLLM, if another process has started it.
    """

    address: str | None = None

    def __init__(self, venv: str = ".venv") -> None:
        self.lock = threading.RLock()
        self._ids = itertools.count()
        self._questions: IO[bytes]
        self._answers: IO[bytes]
        if self.address is not None and venv == ".venv":
            with connect(self.address) as connection:
                self._questions, self._answers = connection.makefile("wb"), connection.makefile("rb")
            return
        process = launch(venv)
        assert process.stdin is not None
        assert process.stdout is not None
        self._questions, self._answers = process.stdin, process.stdout
        self._process = process
        self._read()  # it is ready

    def start(
        self,
        target: str,
        *arguments: str,
        environment: dict[str, str] | None = None,
        source: Path | str = os.devnull,
        output: Path | str = os.devnull,
        error: Path | str = os.devnull,
        engines: bool = False,
    ) -> WarmProcess:
        """Run a file, code, a module or a "module:function" in a process of its own, and its `engines` warm, too."""
        work = {
            "target": target,
            "arguments": arguments,
            "environment": dict(os.environ) if environment is None else environment,
            "folder": os.getcwd(),
            "input": str(source),
            "output": str(output),
            "error": str(error),
            "engines": engines,
        }
        return WarmProcess(self, self.ask({"start": work})["pid"])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer. Those of questions whose askers were interrupted, by Ctrl-C say, are passed over."""
        with self.lock:
            number = next(self._ids)
            self._questions.write(json.dumps({"id": number, **request}).encode() + b"\n")
            self._questions.flush()
            while (answer := self._read())["id"] != number:
                if "pid" in answer:  # of a process that nobody knows of
                    os.kill(answer["pid"], signal.SIGKILL)
            return answer

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        assert line, "the process that imports vLLM has ended; its stderr says why"
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_warm(
    target: str | Path,
    *arguments: str,
    environment: dict[str, str] | None = None,
    timeout: float = 400,
    text: str = "",
    engines: bool = False,
    venv: str = ".venv",
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` gives for a program of Python's: a file, a module, or its code itself; `text` is its stdin.

    It is ended with this call. `engines`: those that it starts are warm, too; `venv`: whose Python runs it.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, output, error = (Path(folder, name) for name in ("input", "output", "error"))
        source.write_text(text)
        process = warm(venv).start(
            str(target),
            *arguments,
            environment=environment,
            source=source,
            output=output,
            error=error,
            engines=engines,
        )
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        texts = [path.read_text() if path.exists() else "" for path in (output, error)]
        return subprocess.CompletedProcess([str(target), *arguments], status, *texts)


def start_warm(target: str | Path, *arguments: str, venv: str = ".venv", **named: Any) -> WarmProcess:
    """What `subprocess.Popen` gives for a program of Python's; `named` as of Warm.start. Its caller ends it."""
    return warm(venv).start(str(target), *arguments, **named)


def warm(venv: str = ".venv") -> Warm:
    """The one of this process."""
    return _make(venv)


@functools.cache  # by what is given: without a name and with the usual one is the same
def _make(venv: str) -> Warm:
    return Warm(venv)


def connect(address: str) -> socket.socket:
    """A connection to where a process will listen."""
    deadline = time.monotonic() + READY_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except ConnectionRefusedError:
            connection.close()
            assert time.monotonic() < deadline, "the process that imports vLLM does not listen; its stderr says why"
            time.sleep(0.05)
        else:
            return connection
