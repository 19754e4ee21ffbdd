"""Coding agents, each given one task without a person, at home in an empty folder and without their own networks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from laguna_serve.scripts.clients.recorder import Recorder
from laguna_serve.scripts.clients.report import ClientCheck

TASK = "Say hello."
KEY = "sk-dummy"
LIMIT_S = 240.0
# Nothing but the recorder is to be reached; a proxy where nothing listens makes sure of it.
OFFLINE = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9"),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, slots=True)
class Agent:
    """A command, its environment and the files that it reads, by path under its home."""

    name: str
    package: str
    command: tuple[str, ...]
    environment: dict[str, str]
    files: dict[str, str]
    route: str


def list_agents(url: str, model: str) -> list[Agent]:
    """Claude Code, Codex and opencode, pointed at a server."""
    claude = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": KEY,
        **dict.fromkeys(("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL"), model),
        **dict.fromkeys(("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_TELEMETRY", "DISABLE_AUTOUPDATER"), "1"),
        "DISABLE_ERROR_REPORTING": "1",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "2048",
    }
    codex = f"""model = "{model}"
model_provider = "laguna"
check_for_update_on_startup = false
[model_providers.laguna]
name = "laguna"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "LAGUNA_KEY"
[analytics]
enabled = false
"""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "laguna",
        "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
        "models": {model: {"name": model, "limit": {"context": 60000, "output": 256}}},
    }
    opencode = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"laguna/{model}",
        "small_model": f"laguna/{model}",
        "provider": {"laguna": provider},
        "autoupdate": False,
        "share": "disabled",
    }
    quiet = dict.fromkeys(
        ("OPENCODE_DISABLE_AUTOUPDATE", "OPENCODE_DISABLE_MODELS_FETCH", "OPENCODE_DISABLE_LSP_DOWNLOAD"), "1"
    )
    return [
        Agent(
            "Claude Code",
            "@anthropic-ai/claude-code",
            ("claude", "--print", TASK, "--output-format", "json", "--max-turns", "1"),
            claude,
            {},
            "/v1/messages",
        ),
        Agent(
            "Codex",
            "@openai/codex",
            ("codex", "exec", "--skip-git-repo-check", "--sandbox", "read-only", TASK),
            {"LAGUNA_KEY": KEY},
            {".codex/config.toml": codex},
            "/v1/responses",
        ),
        Agent(
            "opencode",
            "opencode-ai",
            ("opencode", "run", TASK),
            quiet,
            {"work/opencode.json": json.dumps(opencode)},
            "/v1/chat/completions",
        ),
    ]


def run_agent(agent: Agent, version: str, binaries: Path, home: Path, recorder: Recorder) -> list[ClientCheck]:
    """Give it one task; returns whether its first request was answered, and whether it ended well."""
    work = home / "work"
    work.mkdir(parents=True)
    for name, text in agent.files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    kept = {name: os.environ[name] for name in ("LANG", "TERM", "SSL_CERT_FILE") if name in os.environ}
    environment = {
        **kept,
        **OFFLINE,
        **agent.environment,
        "HOME": str(home),
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }
    before = len(recorder.requests)
    ended, said = _run([str(binaries / agent.command[0]), *agent.command[1:]], environment, work)
    asked = [request for request in recorder.requests[before:] if request.path.startswith(agent.route)]
    others = sorted({f"{request.method} {request.path} {request.status}" for request in recorder.requests[before:]})
    refusals = [f"{request.status} {request.error}" for request in asked if request.status >= 400]
    passed = bool(asked) and not refusals
    first = f"{len(asked)} × {agent.route}, all answered" if passed else "; ".join(refusals) or "it asked nothing"
    request = f"{first}; seen: {', '.join(others)}"[:600]
    done = f"{ended}: {said[-200:]}"
    return [
        ClientCheck(client=agent.name, version=version, check="first request", ok=passed, detail=request),
        ClientCheck(client=agent.name, version=version, check="task", ok=ended == "exit status 0", detail=done),
    ]


def _run(command: Sequence[str], environment: dict[str, str], folder: Path) -> tuple[str, str]:
    """How it ended, and what it said last."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or error.stderr or b""
        return f"still busy after {LIMIT_S:.0f} s", said.decode(errors="replace") if isinstance(said, bytes) else said
    return f"exit status {done.returncode}", (done.stdout.strip() or done.stderr.strip())
