"""From a model's answer to a whole program.

Chat answers are Markdown: the code is in one or several fences, or bare, with or without prose around it, repeats the
prompt or gives the function's body alone. Raw completions go on where the prompt ends, and are cut where HumanEval's
harness cuts them (Chen et al. 2021, arXiv:2107.03374, §3.1), or at the first of the stop words of the problem's
protocol, as bigcode-evaluation-harness and evalplus do. Where a value is asked for (CRUXEval), the program returns what
the answer's assertion claims. Nothing is repaired: code that does not parse is graded as it is, and fails.

An answer is hostile input. Fences are found by a CommonMark parser (fences.py), Python is parsed a bounded number
of times, and the characters handed to CPython's parser are at most WORK_PER_CHAR times the answer's. CPython's parser
itself can be crashed by a text: whoever grades strangers' answers calls this in a process of its own
(worker.py).
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence

from laguna_serve.evals.extraction.fences import OPENING, PYTHON_NAMES, find_fences, find_indented, list_readings
from laguna_serve.evals.extraction.parser import Parser, list_names, list_read
from laguna_serve.evals.problems.cruxeval_rows import find_value, is_literal
from laguna_serve.evals.problems.problem import Form, Problem

# Where a raw completion ends: the next thing at the left margin is no longer the function.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# A longer answer is no answer to a problem of one function.
MAX_ANSWER_CHARS = 1 << 16
WORK_PER_CHAR, WORK_FLOOR = 48, 1 << 16
# How often code is looked for in an answer without fences: from how many lines on, and cut how many times each.
MAX_STARTS, MAX_CUTS = 6, 12
MAX_EARLIER_FENCES = 16
DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)
HELPERS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
THOUGHTS, THOUGHT = "<think>", "</think>"
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
CALLED = re.compile(r"\b([^\W\d]\w*)\(")
CODE_LINE = re.compile(r"(def|async def|class|import|from|@)\b")


class ExtractionError(ValueError):
    """An answer that is not looked into; the message says why."""


def read_program(answer: str, problem: Problem, form: Form) -> tuple[str, bool]:
    """Read the whole program to grade, and whether it parses and defines the function.

    Of a value, whether it is written out as the task asks.

    Raises:
        ExtractionError: the answer is too long, ends within its thoughts, or there is no value in it.
    """
    # A reasoning model behind a server without a reasoning parser.
    text = answer if form == "completion" else answer.rpartition(THOUGHT)[2]
    if form == "chat" and THOUGHT not in answer and answer.lstrip().startswith(THOUGHTS):
        raise ExtractionError(f"answer: expected one behind the thoughts, got thoughts without an end ({THOUGHT})")
    if len(text) > MAX_ANSWER_CHARS:
        raise ExtractionError(f"answer: expected at most {MAX_ANSWER_CHARS} characters, got {len(text)}")
    if problem.kind == "value":
        value = find_value(text)
        if value is None:
            raise ExtractionError("answer: expected an assertion or a value, got neither")
        return f"def {problem.entry_point}():\n    return {value}\n", is_literal(value)
    parser = Parser(make_budget(text, problem))
    if form == "completion":
        program = (problem.asked or problem.prompt) + cut_at_stops(text, problem.stops or STOPS)
    else:
        text = text.replace("\r\n", "\n")
        program = _complete(_find_code(text, problem, parser), problem, parser)
    return program, Parser(len(program)).defines(program, problem.entry_point)


def make_budget(text: str, problem: Problem) -> int:
    """How many characters may be handed to CPython's parser for one answer."""
    return WORK_PER_CHAR * (len(text) + len(problem.prompt)) + WORK_FLOOR


def cut_at_stops(answer: str, stops: Sequence[str] = STOPS) -> str:
    """Cut a raw completion at the first stop sequence, wherever it stands: also within a string."""
    return answer[: min((at for stop in stops if (at := answer.find(stop)) >= 0), default=len(answer))]


def _find_code(text: str, problem: Problem, parser: Parser) -> str:
    """Find the code of an answer: bare around fences of its docstring, else of its fences, else bare."""
    code = _find_code_around_fences(text, problem, parser)
    if code is None:
        code, defines = _choose_fences(text, problem.entry_point, parser)
        if code is None or not (defines or _mentions(code, problem.entry_point)):
            bare = _find_bare_code(text, problem, parser)
            code = bare if code is None or parser.defines(bare, problem.entry_point) else code
    return code


def _find_code_around_fences(text: str, problem: Problem, parser: Parser) -> str | None:
    """Bare code that begins before the first fence and has it inside, in a string; None where there is none."""
    lines = text.split("\n")
    fence = next((index for index, line in enumerate(lines) if OPENING.match(line.lstrip())), None)
    if fence is None:
        return None
    for first in _list_starts(lines[:fence], problem.entry_point)[:1]:
        for code in _cut_to_parse(lines[first:], parser):
            if code.count("\n") > fence - first and parser.defines(code, problem.entry_point):
                return code
    return None


def _choose_fences(text: str, entry_point: str, parser: Parser) -> tuple[str | None, bool]:
    """Choose the last Python block that defines the function, after earlier ones that only define things, and True.

    A usage example before or behind the solution is left out, a helper in a fence of its own is kept, also behind it.
    With no such block, the last one (it may be the function's body) and False. None without fences.
    """
    last: str | None = None
    for reading in list_readings(text):
        blocks = [code for name, code in reading if name in PYTHON_NAMES and code.strip()]
        # The function's name is looked for first: hundreds of blocks are not parsed for nothing.
        named = [index for index, code in enumerate(blocks) if _mentions(code, entry_point)]
        for index in reversed(named[-MAX_EARLIER_FENCES:]):
            if parser.defines(blocks[index], entry_point):
                before = blocks[max(0, index - MAX_EARLIER_FENCES) : index]
                earlier = _list_earlier(before, entry_point, parser)
                behind = blocks[index + 1 : index + 1 + MAX_EARLIER_FENCES]
                helpers = _find_helpers(behind, blocks[index], parser)
                return "\n".join([*earlier, *helpers, blocks[index]]), True
        if last is None and blocks:
            last = blocks[named[-1] if named else -1]
    return last, False


def _find_bare_code(text: str, problem: Problem, parser: Parser) -> str:
    """Code without a fence: the whole text, or the longest run of lines that parses from the first line of code on.

    The lines are whole. Text that is not code anywhere comes back as it is: it may be the function's body.
    """
    if isinstance(parser.parse(text), ast.Module):
        return text
    lines = text.split("\n")
    for first in _list_starts(lines, problem.entry_point):
        for code in _cut_to_parse(lines[first:], parser):
            if parser.defines(code, problem.entry_point):
                return code
    indented = (code for code in reversed(find_indented(text)) if parser.is_whole(code, problem.entry_point))
    return next(indented, text)


def _list_starts(lines: list[str], entry_point: str) -> list[int]:
    """Where the code may begin: at the first line that looks like code, or at the function itself."""
    definition = re.compile(rf"(async )?def {entry_point}\b")
    first = next((index for index, line in enumerate(lines) if CODE_LINE.match(line)), None)
    functions = [index for index, line in enumerate(lines) if definition.match(line)]
    half = (MAX_STARTS - 1) // 2
    return [*([] if first is None else [first]), *dict.fromkeys([*functions[:half], *functions[-half:]])]


def _cut_to_parse(lines: list[str], parser: Parser) -> Iterator[str]:
    """Keep the lines up to where they stop being Python.

    They are cut before the statement in which CPython finds an error, until there is none.
    """
    end = len(lines)
    for _ in range(MAX_CUTS):
        code = "\n".join(lines[:end]) + "\n"
        found = parser.parse(code)
        if isinstance(found, ast.Module):
            yield code
        if not isinstance(found, SyntaxError):
            return
        end = min(end, found.lineno or 0)
        while end > 0 and (not lines[end - 1] or lines[end - 1][0].isspace()):
            end -= 1
        end -= 1  # the statement that begins at this line goes
        if end <= 0:
            return


def _complete(code: str, problem: Problem, parser: Parser) -> str:
    """Add what the code leaves to the prompt: its imports and helpers, or all of it when the code is a body alone."""
    flat = textwrap.dedent(code)
    if flat != code and parser.is_whole(flat, problem.entry_point):
        code = flat  # all of it was indented, as within a list
    if parser.defines(code, problem.entry_point) or _mentions(code, problem.entry_point):
        futures = "".join(line.rstrip("\n") + "\n" for line in FUTURE.findall(code))
        return futures + _find_header(problem) + FUTURE.sub("", code)
    prompt = problem.prompt if problem.prompt.endswith("\n") else problem.prompt + "\n"
    code = code.strip("\n") + "\n"
    # At the margin it is no body; or the first line alone has lost its indentation.
    bodies = [code] if code[0].isspace() else [textwrap.indent(code, "    "), "    " + code]
    return next((prompt + body for body in bodies if parser.compiles(prompt + body)), code)


def _find_header(problem: Problem) -> str:
    """Find the prompt's text before the function: imports and helpers that an answer may take for granted."""
    for text in (problem.prompt, problem.prompt.rstrip() + "\n    pass\n"):
        for node in Parser(len(text)).find_definitions(text):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == problem.entry_point:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                return "".join(problem.prompt.splitlines(keepends=True)[: first - 1])
    return ""


def _mentions(code: str, name: str) -> bool:
    """Whether a function or class of this name is begun, or something assigned to it, at the left margin.

    The code need not parse: an answer may be cut off in the middle.
    """
    return re.search(rf"^(?:(?:async )?def|class) {name}\b|^{name}[ \t]*[:=]", code, re.MULTILINE) is not None


def _list_earlier(blocks: list[str], entry_point: str, parser: Parser) -> list[str]:
    """List the blocks that only define things, and do so before the function is there: what calls it is an example."""
    earlier, there = [], False
    for code in blocks:
        body = parser.find_definitions(code)
        if body and all(isinstance(node, DEFINITIONS) for node in body):
            there = there or any(entry_point in list_names(node) for node in body)
            if there or entry_point not in list_read(body):
                earlier.append(code)
    return earlier


def _find_helpers(blocks: list[str], solution: str, parser: Parser) -> list[str]:
    """Find the blocks of nothing but functions and classes, one of which the solution calls and does not have."""
    missing = set(CALLED.findall(solution)).difference(*map(list_names, parser.find_definitions(solution)))
    bodies = ((code, parser.find_definitions(code)) for code in (blocks if missing else ()))
    return [
        code
        for code, body in bodies
        if all(isinstance(node, HELPERS) for node in body) and any(missing & list_names(node) for node in body)
    ]


__all__ = [
    "MAX_ANSWER_CHARS",
    "STOPS",
    "ExtractionError",
    "Form",
    "cut_at_stops",
    "find_fences",
    "make_budget",
    "read_program",
]
