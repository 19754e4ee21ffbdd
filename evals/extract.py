"""From a model's answer to a whole program.

Chat answers are Markdown: the code is in one or several fences, or bare, with or without prose around it, repeats the
prompt or gives the function's body alone. Raw completions go on where the prompt ends, and are cut where HumanEval's
harness cuts them (Chen et al. 2021, arXiv:2107.03374, §3.1). Nothing is repaired: code that does not parse is graded as
it is, and fails.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from typing import Literal

from laguna_serve.evals.problems import Problem

Form = Literal["chat", "completion"]
# Where a raw completion ends: the next thing at the left margin is no longer the function.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
PYTHON_NAMES = {"", "py", "py3", "python", "python3"}
FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<name>[^\s`{]*)[^`\n]*$")
DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)


def extract_program(answer: str, problem: Problem, form: Form) -> str:
    """The whole program to grade."""
    if form == "completion":
        return problem.prompt + cut_at_stops(answer)
    # A reasoning model behind a server without a reasoning parser.
    text = answer.rpartition("</think>")[2].replace("\r\n", "\n")
    code = _choose_fences(text, problem.entry_point)
    if code is None:
        code = _find_bare_code(text, problem)
    return _complete(code, problem)


def cut_at_stops(answer: str) -> str:
    """A raw completion up to the first stop sequence."""
    return answer[: min((at for stop in STOPS if (at := answer.find(stop)) >= 0), default=len(answer))]


def find_fences(text: str) -> list[tuple[str, str]]:
    """Every fenced block as (language, code), the fence's own indentation taken off; the last one may be unclosed."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        fence = FENCE.match(line)
        if opened is None:
            opened, lines = fence, []
        elif fence and not fence["name"] and fence["mark"].startswith(opened["mark"]):
            blocks.append((opened["name"].lower(), "\n".join(lines) + "\n"))
            opened = None
        else:
            lines.append(line.removeprefix(opened["indent"]))
    if opened is not None:
        blocks.append((opened["name"].lower(), "\n".join(lines) + "\n"))
    return blocks


def _choose_fences(text: str, entry_point: str) -> str | None:
    """The last Python block that defines the function, after the earlier blocks that only define things.

    A usage example behind the solution is left out, a helper in a fence of its own is kept. With no such block, the
    last one: it may be the function's body. None without fences.
    """
    blocks = [code for name, code in find_fences(text) if name in PYTHON_NAMES and code.strip()]
    if not blocks:
        return None
    defining = [index for index, code in enumerate(blocks) if _defines(code, entry_point)]
    if not defining:
        return blocks[-1]
    earlier = [code for code in blocks[: defining[-1]] if _only_defines(code)]
    return "\n".join([*earlier, blocks[defining[-1]]])


def _find_bare_code(text: str, problem: Problem) -> str:
    """Code without a fence: the whole text, or the longest run of whole lines that parses from the first line of code
    on. Text that is not code anywhere comes back as it is: it may be the function's body."""
    if _parse(text) is not None:
        return text
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if re.match(r"(def|async def|class|import|from|@)\b", line)), None)
    starts = [start] if start is not None else []
    starts += [i for i, line in enumerate(lines) if re.match(rf"(async )?def {problem.entry_point}\b", line)]
    for first in starts:
        for last in range(len(lines), first, -1):
            code = "\n".join(lines[first:last]) + "\n"
            if _defines(code, problem.entry_point):
                return code
    return text


def _complete(code: str, problem: Problem) -> str:
    """Add what the code leaves to the prompt: its imports and helpers, or all of it when the code is a body alone."""
    if _has_definition(code, problem.entry_point):
        futures = "".join(line.rstrip("\n") + "\n" for line in FUTURE.findall(code))
        return futures + _find_header(problem) + FUTURE.sub("", code)
    prompt = problem.prompt if problem.prompt.endswith("\n") else problem.prompt + "\n"
    code = code.strip("\n") + "\n"
    # At the margin it is no body; or the first line alone has lost its indentation.
    bodies = [code] if code[0].isspace() else [textwrap.indent(code, "    "), "    " + code]
    return next((prompt + body for body in bodies if _compiles(prompt + body)), code)


def _find_header(problem: Problem) -> str:
    """The prompt's text before the function: imports and helpers that an answer may take for granted."""
    for text in (problem.prompt, problem.prompt.rstrip() + "\n    pass\n"):
        tree = _parse(text)
        for node in tree.body if tree else []:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == problem.entry_point:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                return "".join(problem.prompt.splitlines(keepends=True)[: first - 1])
    return ""


def _defines(code: str, name: str) -> bool:
    """Does it parse, and is there a function of this name (or an assignment to it) at its left margin?"""
    tree = _parse(code)
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return True
    return False


def _has_definition(code: str, name: str) -> bool:
    """As `_defines`, but of code that may not parse too: an answer cut off in the middle."""
    return _defines(code, name) or re.search(rf"^(async )?def {name}\b", code, re.MULTILINE) is not None


def _only_defines(code: str) -> bool:
    tree = _parse(code)
    return tree is not None and all(isinstance(node, DEFINITIONS) for node in tree.body)


def _compiles(code: str) -> bool:
    """Unlike parsing, this finds a `return` outside of the function."""
    tree = _parse(code)
    try:
        return tree is not None and compile(tree, "answer", "exec") is not None
    except (SyntaxError, ValueError, RecursionError):
        return False


def _parse(code: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model's invalid escape is no concern of ours
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
