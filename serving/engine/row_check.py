"""Which operation of a model gives a row other values beside other rows than alone: asked of vLLM's own modules.

A process of its own (plugins/probes/row_probe.py) loads the model eagerly, and sends one sequence through it one row at
a time and then as speculation, batching and prefill do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.launch import EngineError, plan_launch

PROBE = "laguna_serve.plugins.probes.row_probe"
# vLLM's own flags come after `python -m MODULE`.
ARGUMENTS = slice(3, None)
TIMEOUT_S = 1800.0


class FirstDifference(msgspec.Struct, frozen=True, kw_only=True):
    """The first operation whose result for a row differs from that of the row alone, what went in being equal.

    Attributes:
        layer: its number; None outside of layers.
        module, kind: its name in the model, and its class.
        side: output: what the module computed; input: what the code before it did.
        operations: what the module calls, in torch's names.
        positions: of the rows that differ, in the sequence.
        inputs_alone, inputs: shapes that went in.
        largest: absolute difference.
        ulps: the largest difference in units of the last place of `dtype`.
    """

    layer: int | None
    module: str
    kind: str
    side: str
    operations: list[str]
    positions: list[int]
    inputs_alone: list[list[int]]
    inputs: list[list[int]]
    dtype: str
    largest: float
    ulps: float

    def describe(self) -> str:
        """Describe the outcome in a sentence without a full stop."""
        name = self.module if self.side == "output" else f"the code before {self.module}"
        calls = f", calls {', '.join(self.operations)}" if self.operations else ""
        alone, beside = (" ".join(map(str, shapes)) for shapes in (self.inputs_alone, self.inputs))
        size = f"by at most {self.largest:.3g}, {self.ulps:.3g} ulp of {self.dtype}"
        return f"{name} ({self.kind}{calls}; inputs {alone} alone, {beside} here) differs {size}"


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """A way in which the sequence was sent, against one row at a time.

    Attributes:
        compared: values of rows, of every module, up to the first that differs.
    """

    name: str
    label: str
    compared: int
    first: FirstDifference | None


class RowCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What `check_rows` found; `again`, the first way, is the control: it should not differ."""

    tokens: int
    ways: list[Way]


def check_rows(config: EngineConfig, sequence: Sequence[int], rows: int, copies: int, log_path: Path) -> RowCheck:
    """Send a sequence of token ids through the target one row at a time and otherwise, and compare every module.

    Args:
        config: the engine; its drafter is left out, and nothing is compiled.
        rows: at once, γ + 1.
        copies: of the sequence, beside each other.
        log_path: what vLLM writes goes there.
    Raises:
        EngineError: it cannot be started, or failed.
    """
    launch = plan_launch(replace(config, draft=None, gamma=None, gamma_schedule=None, enforce_eager=True))
    request = {"arguments": launch.command[ARGUMENTS], "sequence": list(sequence), "rows": rows, "copies": copies}
    environment = launch.environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log_path.open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                [sys.executable, "-m", PROBE],
                input=json.dumps(request),
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"row check: expected an end within {TIMEOUT_S:.0f} s, got none; see {log_path}"
            ) from None
    try:
        return msgspec.json.decode(done.stdout.rstrip().rpartition("\n")[2], type=RowCheck)
    except msgspec.MsgspecError:
        expected = f"row check: expected a report, got status {done.returncode}"
        raise EngineError(f"{expected}; see {log_path}") from None
