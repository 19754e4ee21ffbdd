"""Asks vLLM's own parser whether it takes these command lines, before any engine starts.

It runs in a process of its own: to import it takes seconds, to start an engine for nothing a minute.

Checked against vLLM 0.32 (entrypoints/launchers/cli_args.py). A vLLM whose parser is elsewhere is not asked, and says
so itself when its engine starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.planning.plan import EnginePlan

TIMEOUT_S = 300.0
PROGRAM = "vllm"
# In front of a model and its flags, where no engine is planned.
VLLM = (sys.executable, "-m", PROGRAM)
SCRIPT = f"""
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser(prog={PROGRAM!r}))
for arguments in json.load(sys.stdin):
    validate_parsed_serve_args(parser.parse_args(arguments))
"""
# What argparse prints before it exits with this status.
MARK = f"{PROGRAM}: error: "
USAGE_STATUS = 2


def check_flags(commands: Sequence[Sequence[str]]) -> None:
    """Raise CheckpointError, quoting vLLM, for the first command line (python -m MODULE …) that it refuses."""
    if not commands:
        return
    arguments = json.dumps([list(command[3:]) for command in commands])
    try:
        asked = subprocess.run(
            [sys.executable, "-c", SCRIPT], input=arguments, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return
    said = [line for line in asked.stderr.splitlines() if line.startswith(MARK)]
    if asked.returncode == USAGE_STATUS and said:
        raise CheckpointError(
            f"vLLM's flags: expected those that it knows, got {said[-1].removeprefix(MARK)}; fix them"
        )


def refuse_unknown_flags(plan: EnginePlan) -> EnginePlan:
    """Return the plan, refused where vLLM does not know a flag that was handed to it unread."""
    if not plan.config.extra_args or plan.refusals:
        return plan
    try:
        check_flags([plan.command])
    except CheckpointError as error:
        return replace(plan, command=(), refusals=(str(error),))
    return plan
