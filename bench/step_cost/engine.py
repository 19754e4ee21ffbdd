"""An engine of plugins/probes/step_probe.py in a process of its own, as `laguna serve` would start it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from laguna_serve.serving.engine.log import find_cause, read_log
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.launch import EngineError, plan_launch

# Begins every line of the probe that is an answer.
MARK = "step-probe: "
PROBE = "laguna_serve.plugins.probes.step_probe"
# vLLM's own flags come after `python -m MODULE`.
ARGUMENTS = slice(3, None)


class Decoded(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt's steps after its first token.

    Attributes:
        steps, tokens: taken, and committed by them.
        ns: processor time of all of them.
        parts: label → its share of `ns`, where the parts were timed.
        token_ids: the whole answer.
    """

    steps: int
    tokens: int
    ns: int
    parts: dict[str, int]
    token_ids: list[int]


class StepEngine:
    """An engine that decodes one prompt when it is asked, and waits otherwise."""

    def __init__(self, process: subprocess.Popen[str], log_path: Path) -> None:
        self._process, self._log_path = process, log_path

    def decode(self, prompt: str, max_tokens: int, temperature: float, *, apart: bool) -> Decoded:
        """Decode; with `apart` the parts are timed. Raises EngineError when the engine is gone."""
        asked = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "apart": apart}
        with suppress(BrokenPipeError):  # it is gone, which `read` says
            _open_pipe(self._process.stdin).write(json.dumps(asked) + "\n")
            _open_pipe(self._process.stdin).flush()
        return msgspec.json.decode(self.read(), type=Decoded)

    def read(self) -> str:
        """Read the next answer, past what else is printed. Raises EngineError when the engine is gone."""
        for line in _open_pipe(self._process.stdout):
            if line.startswith(MARK):
                return line.removeprefix(MARK)
        status = self._process.wait()
        reason = f"signal {-status}" if status < 0 else find_cause(read_log(self._log_path))
        raise EngineError(f"step probe: expected an answer, got its end: {reason}; see {self._log_path}")


@contextmanager
def open_engine(config: EngineConfig, log_path: Path) -> Iterator[StepEngine]:
    """Start an engine, and end it. Raises EngineError when it does not start."""
    launch = plan_launch(config)
    environment = launch.environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", PROBE, MARK, json.dumps(launch.command[ARGUMENTS])]
    with log_path.open("w", encoding="utf-8") as log:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True)
        try:
            engine = StepEngine(process, log_path)
            engine.read()
            yield engine
        finally:
            with suppress(BrokenPipeError):
                _open_pipe(process.stdin).close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _open_pipe(process.stdout).close()


def _open_pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
