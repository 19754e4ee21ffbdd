"""Runs the checks of the Python clients, in their environment (.venv-clients), for scripts/clients.sh.

Prints one JSON object per check: {"client", "version", "check", "ok", "detail"}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anthropic
import openai
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI

from laguna_serve.scripts.clients.expectations import (
    CHECKS,
    FEW,
    FORCED,
    KEY,
    LOST,
    MODEL,
    SCHEMA,
    URL,
)
from laguna_serve.scripts.clients.frameworks import instructor_checks, langchain_checks, litellm_checks, llm_checks
from laguna_serve.scripts.clients.official import (
    list_anthropic_checks,
    list_chat_checks,
    list_responses_checks,
    open_openai,
)


def main() -> int:
    """Run every check; exit status 0, as the report is for the caller to judge."""
    chain: dict[str, Any] = {"model": MODEL, "api_key": KEY, "temperature": 0, "max_tokens": FEW, "max_retries": 0}
    open_chain = [ChatOpenAI(base_url=f"{base}/v1", **chain) for base in (URL, LOST)]
    anthropic_chain = [ChatAnthropic(base_url=base, **chain) for base in (URL, LOST)]
    by_schema = {"extra_body": {"output_config": {"format": SCHEMA}}}
    with tempfile.TemporaryDirectory() as folder:
        clients = {
            ("openai (chat)", "openai"): list_chat_checks(),
            ("openai (responses)", "openai"): list_responses_checks(),
            ("anthropic", "anthropic"): list_anthropic_checks(),
            ("langchain-openai", "langchain-openai"): langchain_checks(
                open_chain, {"extra_body": FORCED}, openai.NotFoundError
            ),
            ("langchain-anthropic", "langchain-anthropic"): langchain_checks(
                anthropic_chain, by_schema, anthropic.NotFoundError
            ),
            ("litellm (openai/)", "litellm"): litellm_checks("openai"),
            ("litellm (hosted_vllm/)", "litellm"): litellm_checks("hosted_vllm"),
            ("instructor", "instructor"): instructor_checks(open_openai(URL)),
            ("llm", "llm"): llm_checks(Path(folder)),
        }
        for (client, package), checks in clients.items():
            for name, check in checks.items():
                if CHECKS is not None and name not in CHECKS:
                    continue
                try:
                    ok, detail = True, check()
                except Exception as error:
                    ok, detail = False, f"{type(error).__name__}: {error}"
                line = {"client": f"{client}, Python", "version": version(package), "check": name, "ok": ok}
                print(json.dumps({**line, "detail": detail[:300]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
