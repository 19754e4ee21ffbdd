"""How a model is asked a problem: the prompts and stop words of the harnesses whose figures are compared with.

    project    this project's own: HumanEval's prompt as it is, cut where HumanEval's harness cuts (Chen et al. 2021,
               §3.1), or in a chat with one sentence around it; of MBPP all tests and the function's first line
    bigcode    bigcode-evaluation-harness (main, 2025-07): HumanEval's prompt stripped, of MBPP the task and the first
               test in a docstring; raw completions alone, up to the first of its stop words
    evalplus   evalplus 0.3.1 (base prompts of codegen, openai backend's chat): its sentence before a fenced prompt, or
               the raw prompt with its stop words. Its own clean-up of answers (tree-sitter) is not this project's
    cot        CRUXEval-O with one worked example and steps
    direct     CRUXEval-O without steps

The name stands in every result: figures of two protocols do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from laguna_serve.evals.problems.problem import Form, Problem, ProblemsError

BIGCODE_HUMANEVAL = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
BIGCODE_MBPP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
EVALPLUS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
EVALPLUS_HUMANEVAL = (*EVALPLUS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
EVALPLUS_MBPP = (*EVALPLUS, '\n"""', "\nassert")
EVALPLUS_MESSAGE = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```python\n{}\n```"
)
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one Markdown code block.\n\n```python\n{}\n```"
)
ProtocolName = Literal["project", "bigcode", "evalplus", "cot", "direct"]
# CPU seconds of a program: evalplus's problems call it up to a thousand times.
CPU_S, SLOW_CPU_S = 8, 30
SLOW = ("evalplus", "mbpp-plus")
# What a file's form allows, the first by default.
ALLOWED = {
    "humaneval": ("project", "bigcode", "evalplus"),
    "evalplus": ("evalplus", "bigcode", "project"),
    "mbpp": ("project", "bigcode"),
    "mbpp-plus": ("evalplus", "bigcode", "project"),
    "cruxeval": ("cot", "direct"),
}


@dataclass(frozen=True, slots=True)
class Protocol:
    """`forms`: how it may be asked; `max_tokens`: of an answer, the harness's own default."""

    forms: tuple[str, ...]
    max_tokens: int


PROTOCOLS: dict[str, Protocol] = {
    "project": Protocol(("completion", "chat"), 1024),
    # Its 512 tokens are of prompt and answer together.
    "bigcode": Protocol(("completion",), 512),
    "evalplus": Protocol(("completion", "chat"), 768),
    "cot": Protocol(("completion", "chat"), 1024),
    "direct": Protocol(("completion", "chat"), 256),
}


def choose_protocol(form: str, protocol: str) -> str:
    """Choose the protocol that is meant for a file of this form.

    Raises:
        ProblemsError: the form does not allow it.
    """
    allowed = ALLOWED[form]
    if protocol and protocol not in allowed:
        expected = f"expected one of {', '.join(allowed)} for a file in the form {form}"
        raise ProblemsError(f"--protocol: {expected}, got {protocol}; choose one of them")
    return protocol or allowed[0]


def check_asking(protocol: str, form: str) -> None:
    """Check that this protocol can be asked as a chat, or as a completion.

    Raises:
        ProblemsError: it cannot.
    """
    forms = PROTOCOLS[protocol].forms
    if form not in forms:
        raise ProblemsError(f"--form: expected {' or '.join(forms)} for the protocol {protocol}, got {form}; choose it")


def ask_by(protocol: str, problem: Problem) -> Problem:
    """Ask a problem as a protocol does: what is sent, and where a completion of it ends."""
    prompt = problem.prompt
    mbpp = problem.task_id.startswith("Mbpp/")
    if protocol == "bigcode":
        # HumanEval's task strips its prompt; MBPP's begins the answer on a line of its own.
        return replace(problem, asked=prompt if mbpp else prompt.strip(), stops=_choose(protocol, mbpp))
    if protocol == "evalplus":
        message = EVALPLUS_MESSAGE.format(prompt.strip())
        return replace(problem, asked=prompt.strip() + "\n", message=message, stops=_choose(protocol, mbpp))
    return problem


def make_prompt(problem: Problem, form: Form) -> str:
    """Make what is sent: the prompt itself, or a message with it; or what the problem's protocol has in place of it."""
    if form == "completion":
        return problem.asked or problem.prompt
    return problem.message or INSTRUCTION.format(problem.prompt.strip())


def _choose(protocol: str, mbpp: bool) -> tuple[str, ...]:
    if protocol == "bigcode":
        return BIGCODE_MBPP if mbpp else BIGCODE_HUMANEVAL
    return EVALPLUS_MBPP if mbpp else EVALPLUS_HUMANEVAL
