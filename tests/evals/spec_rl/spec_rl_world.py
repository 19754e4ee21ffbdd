"""What tests of the environment `spec_rl` share: problems, answers to them, an endpoint that gives these, a user."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from mock_engine import MockEngine, Settings

from laguna_serve.evals.problems import Problem
from laguna_serve.serving.engine import Engine

ROOT = Path(__file__).resolve().parents[3]
BIN = ROOT / ".venv-rl" / "bin"
needs_verifiers = pytest.mark.skipif(not (BIN / "vf-eval").exists(), reason="needs scripts/client_env.sh spec_rl")

FENCE = "Here it is:\n\n```python\n{}\n```\n"
# What is said to f0 … f7, and the share of its four tests that it must bring.
ANSWERS: list[tuple[str, float]] = [
    *((FENCE.format(f"def f{i}(x):\n    return x + {i}"), 1.0) for i in range(4)),
    (FENCE.format("def f4(x):\n    return x + 4 if x < 2 else None"), 0.5),
    (FENCE.format("import os\n\ndef f5(x):\n    os._exit(0)"), 0.0),
    (
        FENCE.format("class Any:\n    def __eq__(self, other):\n        return True\n\ndef f6(x):\n    return Any()"),
        0.0,
    ),
    ("I am sorry, but I cannot do that.", 0.0),
]
PROMPT_IDS, ANSWER_IDS, LOGPROB = [5, 6, 7], [8, 9], -0.25
MEAN = sum(share for _, share in ANSWERS) / len(ANSWERS)


def make_problem(number: int) -> Problem:
    tests = "".join(f"    assert candidate({x}) == {x + number}\n" for x in range(4))
    prompt = f'def f{number}(x):\n    """x plus {number}"""\n'
    return Problem(f"T/{number}", prompt, f"f{number}", f"def check(candidate):\n{tests}", f"    return x + {number}\n")


def write_problems(path: Path, count: int) -> Path:
    fields = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
    rows = [{name: getattr(make_problem(i), name) for name in fields} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(body: Mapping[str, Any]) -> str | int:
    """The prepared answer; a refusal where there is none."""
    found = re.search(r"def f(\d)\(", body["messages"][-1]["content"])
    assert found
    return ANSWERS[number][0] if (number := int(found[1])) < len(ANSWERS) else 400


class MockVllm(MockEngine):
    """With the token ids and log-probabilities that vLLM adds when asked to; `sessions` are the ids in the headers."""

    def __init__(self) -> None:
        super().__init__(Settings(says=lambda _, body: answer(body), requires=()))
        self.sessions: list[str] = []

    async def take(self, request: web.Request) -> web.StreamResponse:
        response = await super().take(request)
        assert isinstance(response, web.Response)
        body = self.bodies[-1]
        self.sessions.append(request.headers["X-Session-ID"])
        if response.status != 200:
            return response
        said = json.loads(response.text or "")
        choice = said["choices"][0]
        if body.get("return_token_ids"):
            said["prompt_token_ids"], choice["token_ids"] = PROMPT_IDS, ANSWER_IDS
        if body.get("logprobs"):
            steps = [{"token": "x", "logprob": LOGPROB, "bytes": None, "top_logprobs": []} for _ in ANSWER_IDS]
            choice["logprobs"] = {"content": steps}
        return web.json_response({**said, "object": "chat.completion"})


@contextmanager
def world() -> Iterator[str]:
    """A proxy's address at which nobody may knock."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        yield "http://{}:{}".format(*door.getsockname())
        door.setblocking(False)
        with pytest.raises(BlockingIOError):
            door.accept()[0].close()


def make_env(home: Path, proxy: str = "http://127.0.0.1:9") -> dict[str, str]:
    """A user with an account at verifiers' makers: whatever leaves this machine goes to `proxy`."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith(("_PROXY", "_API_KEY"))}
    out = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
    more = {"NO_PROXY": "127.0.0.1", "PRIME_API_KEY": "secret", "HOME": str(home), "COLUMNS": "200"}
    return {**kept, **out, **more}


@contextmanager
def gateway(engine: Engine) -> Iterator[str]:
    """`laguna gateway` in front of an engine; its address."""
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--upstream", engine.base_url]
    command += ["--model", engine.model_name, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split()[2]
        finally:
            server.kill()
