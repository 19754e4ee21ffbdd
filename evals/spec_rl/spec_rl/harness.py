"""One chat completion per rollout, asked for from this process.

verifiers' own chat harness (`null`) starts a program per rollout whose packages uv fetches from the internet. One
answer needs neither. The request goes to verifiers' interception server, which puts the run's model and sampling into
it, sends it on to the endpoint and records it.
"""

from __future__ import annotations

import functools
import ssl
from typing import Any

import httpx
import verifiers.v1 as vf
from openai import APIConnectionError, AsyncOpenAI, OpenAIError
from verifiers.v1.errors import MODEL_TRANSPORT_ERROR_EXIT_CODE


class OneAnswerHarness(vf.Harness[vf.HarnessConfig]):
    """Asks once; the model gets no tools and no second turn."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """Ask, and note the token ids where the engine sent them.

        Raises:
            ValueError: token ids and log-probabilities that do not belong together.
        """
        system, prompt = self.resolve_text_prompt(data)
        messages: list[Any] = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        # No time limit of its own: env.agent.timeout.rollout is the run's.
        transport = httpx.AsyncClient(verify=_tls(), timeout=None)
        try:
            async with AsyncOpenAI(base_url=endpoint, api_key=secret, http_client=transport) as client:
                answer = await client.chat.completions.create(model=ctx.model, messages=messages)
        except APIConnectionError as error:
            return vf.ProgramResult(exit_code=MODEL_TRANSPORT_ERROR_EXIT_CODE, stdout="", stderr=str(error))
        except OpenAIError as error:
            return vf.ProgramResult(exit_code=1, stdout="", stderr=str(error))
        note_tokens(trace, answer.model_dump())
        return vf.ProgramResult(exit_code=0, stdout=answer.choices[0].message.content or "", stderr="")


def note_tokens(trace: vf.Trace, answer: dict[str, Any]) -> None:
    """Put the token ids and log-probabilities of a vLLM chat completion on the trace's nodes, where trainers look.

    verifiers keeps those of its client for training alone. All of the prompt's ids go to the question's node: where one
    message ends and the next begins, the engine does not say. Does nothing when the run's sampling did not ask for ids
    (README, "Token ids"), or verifiers has noted them already.

    Raises:
        ValueError: another number of log-probabilities than of tokens.
    """
    choice = answer["choices"][0]
    prompt_ids, ids = answer.get("prompt_token_ids"), choice.get("token_ids")
    *_, question, said = trace.branches[-1].nodes
    if not prompt_ids or not ids or said.token_ids:
        return
    steps = (choice.get("logprobs") or {}).get("content") or []
    if len(steps) not in (0, len(ids)):
        raise ValueError(f"logprobs: expected one for each of {len(ids)} tokens, got {len(steps)}")
    question.token_ids, question.mask = list(prompt_ids), [False] * len(prompt_ids)
    said.token_ids, said.mask = list(ids), [True] * len(ids)
    said.logprobs = [step["logprob"] for step in steps]


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once: it takes 25 ms, and every rollout opens a client of its own."""
    return httpx.create_ssl_context()
