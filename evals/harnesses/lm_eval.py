"""Runs lm-evaluation-harness as the user would: as a command, from an environment of its own.

It pins other releases than the engine's environment, so nothing of it is imported here. What it writes goes to a log;
what it leaves is read by results.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from laguna_serve.evals.harnesses.data import write_tasks
from laguna_serve.evals.harnesses.settings import Suite, SuiteError
from laguna_serve.serving.kit.progress import SPARSE_S, Progress
from laguna_serve.serving.kit.results import JsonObject

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-evals"
POLL_S = 0.2
STOP_GRACE_S = 10.0
# Of one answer, from the endpoint's queue to its last token.
TIMEOUT_S = 3600
# Of an answer with thoughts, where nobody chose a number; never more than half of the context.
MAX_THINKING_TOKENS = 32768
# Between what a run says and what the one said that was broken off before it.
AGAIN = "== the same again =="
# What the harness says when a question and one of its answers are longer than the context: it cuts the beginning off.
CUT = "Left truncating context"
# What the hub's libraries say where it cannot be reached.
UNREACHED = re.compile(r"Couldn't reach|LocalEntryNotFound|OfflineMode|offline mode|Max retries exceeded")
OFFLINE = "without a network --data DIR has the questions; --list says which files"


@dataclass(frozen=True, slots=True)
class Harness:
    """The environment's Python, and the folder of lm-eval's task definitions in it."""

    python: Path
    tasks: Path


@dataclass(frozen=True, slots=True)
class Target:
    """The endpoint and how to ask it.

    Attributes:
        base_url: without /v1.
        max_length: tokens that the model takes; the harness's own default of 2048 would silently cut longer prompts.
        tokenizer: folder or hub id, for log-likelihoods.
        limit: the first N questions of every task, or None.
        template: fields for the chat template, as {"enable_thinking": True}.
        max_tokens: of an answer, as it was chosen; None where nobody did.
    """

    base_url: str
    model: str
    max_length: int
    tokenizer: str | None
    chat: bool
    concurrency: int
    limit: int | None
    template: JsonObject = field(default_factory=dict)
    max_tokens: int | None = None

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of an answer: as chosen, or, with thoughts, what the context is likely to have room for.

        None for the task's own number.
        """
        if self.max_tokens is None and self.template.get("enable_thinking") is True:
            return max(1, min(MAX_THINKING_TOKENS, self.max_length // 2))
        return self.max_tokens


def find_harness() -> Harness:
    """Find what scripts/client_env.sh installed.

    Raises:
        SuiteError: it was not made, or not to its end.
    """
    found = sorted(ENVIRONMENT.glob("lib/python3.*/site-packages/lm_eval/tasks"))
    if not found or not (ENVIRONMENT / ".stamp").is_file():
        remedy = "run bash scripts/client_env.sh evals"
        raise SuiteError(f"{ENVIRONMENT}: expected lm-eval and evalplus in it, got none; {remedy}")
    return Harness(ENVIRONMENT / "bin" / "python", found[0])


def run_lm_eval(suite: Suite, target: Target, data: Path | None, folder: Path, progress: Progress) -> int:
    """One suite by lm-evaluation-harness, into `folder`; returns how many prompts it cut to the context.

    Answers are cached there as they come, so that a run that was cut off goes on.

    Raises:
        SuiteError: the harness failed or left no result; the last line of its log is quoted.
    """
    harness = find_harness()
    command = [str(harness.python), "-m", "lm_eval", "run", *list_arguments(suite, target, folder)]
    environment = dict(os.environ)
    if data is not None:
        write_tasks(suite, data, harness.tasks, folder / "tasks")
        command += ["--include_path", str(folder / "tasks")]
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    log = folder / "lm_eval.log"
    run_logged(suite.name, command, environment, log, progress)
    if not list(folder.rglob("results_*.json")):
        raise SuiteError(f"{suite.name}: expected lm-eval to leave results, got none; see {log}")
    return count_cut(log, target.concurrency)


def list_arguments(suite: Suite, target: Target, folder: Path) -> list[str]:
    """List the arguments of `lm_eval run`."""
    path = "chat/completions" if target.chat else "completions"
    arguments: dict[str, object] = {
        "model": target.model,
        "base_url": f"{target.base_url}/v1/{path}",
        "num_concurrent": target.concurrency,
        "max_length": target.max_length,
        "timeout": TIMEOUT_S,
    }
    if suite.run == "loglikelihood":
        arguments |= {"tokenizer": target.tokenizer, "tokenizer_backend": "huggingface"}
    else:
        # As text: of token ids the harness would silently cut what does not fit; of a text the endpoint complains.
        arguments["tokenizer_backend"] = None
    if target.template.get("enable_thinking"):
        # Where the server does not take thoughts out of an answer: what stands behind them is the answer.
        arguments["think_end_token"] = "</think>"
    command = ["--model", "local-chat-completions" if target.chat else "local-completions"]
    command += ["--model_args", json.dumps(arguments), "--tasks", suite.task]
    command += ["--num_fewshot", str(suite.shots), "--seed", f"0,1234,1234,{suite.seed}"]
    command += ["--output_path", str(folder), "--log_samples", "--use_cache", str(folder / "answers")]
    generation: dict[str, object] = {}
    if target.chat:
        command += ["--apply_chat_template"]
        generation |= {"chat_template_kwargs": target.template} if target.template else {}
    elif suite.run == "generate":
        # The harness's own models put no token before a prompt; vLLM does unless it is asked not to.
        generation["add_special_tokens"] = False
    if target.answer_tokens is not None and suite.run == "generate":
        generation["max_gen_toks"] = target.answer_tokens
    if generation:
        command += ["--gen_kwargs", json.dumps(generation)]
    if target.limit is not None:
        command += ["--limit", str(target.limit)]
    return command


def run_logged(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, progress: Progress
) -> None:
    """Run a command to its end, all it says into `log` and its newest line now and then on stderr.

    What an earlier run said stays there.

    Raises:
        SuiteError: it failed.
    """
    progress.say(f"{name}: running; log in {log}")
    with log.open("ab") as file:
        if file.tell():
            file.write(f"\n{AGAIN}\n".encode())
            file.flush()
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment)
        )
        try:
            said = time.monotonic()
            while child.poll() is None:
                time.sleep(POLL_S)
                if time.monotonic() - said >= SPARSE_S:
                    said = time.monotonic()
                    progress.say(f"  {name}: {read_last_line(log)}")
        finally:
            stop(child)
    if child.returncode != 0:
        last = read_last_line(log)
        remedy = f"; {OFFLINE}" if UNREACHED.search(last) else ""
        raise SuiteError(
            f"{name}: expected it to succeed, got exit status {child.returncode}: {last}; see {log}{remedy}"
        )


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a child that still runs, by force if it must be."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def read_last_line(log: Path) -> str:
    """Read the newest line of a log that is for people; progress bars end theirs with a carriage return."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").replace("\r", "\n").split("\n")]
    return next((line[:200] for line in reversed(lines) if line and not line.startswith("{")), "nothing said yet")


def count_cut(log: Path, concurrency: int) -> int:
    """Count the prompts that did not fit the context, those included that an earlier run had answered.

    Where the harness asks several at once, it says so of all that it is to ask before the first one, else of each in
    its turn.
    """
    runs = log.read_text("utf-8", "replace").split(AGAIN)
    counts = [sum(CUT in line for line in run.splitlines()) for run in runs]
    return max(counts) if concurrency > 1 else sum(counts)
