"""The fenced code blocks of a Markdown text, by markdown-it-py (CommonMark).

Only what decides where a fence is stays enabled: fences, lists and block quotes. Without inline rules, links, HTML and
tables nothing in the parser is more than linear in the text (its nesting is bounded by MAX_NESTING), and a fence may be
indented as deeply as a model likes.

CommonMark ends a block of code at the next fence, also where that stands in a docstring of the code: models write such
docstrings. So a block of Python is read once more with a rule of its own, to which a fence within a string in triple
quotes is text.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock

PYTHON_NAMES = {"", "py", "py3", "python", "python3"}
MAX_NESTING = 20
OPENING = re.compile(r"(`{3,}(?=[^`]*$)|~{3,})(.*)")
ATTACHED = re.compile(r"([^`\s][ \t]*)(`{3,}[ \t]*)$", re.MULTILINE)
# What decides where strings begin and end in a line of Python, and in a line of a string in triple quotes.
TOKEN = re.compile(r"""'{3}|"{3}|'(?:\\.|[^'\\])*'?|"(?:\\.|[^"\\])*"?|#""")
IN_STRING = {quote: re.compile(rf"\\.|{quote}") for quote in ("'''", '"""')}

Block = tuple[str, str]


def find_fences(text: str) -> list[Block]:
    """Every fenced block as (language, code), the fence's own indentation taken off; the last one may be unclosed."""
    return _find(text, ["fence", "list", "blockquote"])


def find_indented(text: str) -> list[str]:
    """Find the blocks that are code by their indentation alone, which is taken off."""
    blocks = MarkdownIt("zero", {"maxNesting": MAX_NESTING}).enable(["code"]).parse(text)
    return [textwrap.dedent(block.content) for block in blocks if block.type == "code_block"]


def list_readings(text: str) -> Iterator[list[Block]]:
    """List the blocks of a text in the ways in which it may be meant, the likeliest first.

    With fences in the strings of Python as text; CommonMark's; the first with every fence at its word, as models
    forget to indent the code within a list; fences within a longer fence; and those that end behind the last line of
    the code, not below it.
    """
    strings = any(quote in text for quote in IN_STRING)
    if strings:
        yield _find(text, ["fence", "list", "blockquote"], strings=True)
    fences = find_fences(text)
    yield fences
    yield _find(text, ["fence"], strings)
    if inner := [block for _, code in fences if "```" in code for block in find_fences(code)]:
        yield inner
    if ATTACHED.search(text):
        yield find_fences(ATTACHED.sub(r"\1\n\2", text))


def _find(text: str, rules: list[str], strings: bool = False) -> list[Block]:
    parser = MarkdownIt("zero", {"maxNesting": MAX_NESTING}).enable(rules)
    parser.core.ruler.disable(["inline", "text_join"])
    if strings:
        parser.block.ruler.at("fence", read_python_fence, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    return [(_find_language(token.info), token.content) for token in parser.parse(text) if token.type == "fence"]


def _find_language(info: str) -> str:
    words = info.split(maxsplit=1)
    return words[0].lower() if words else ""


def read_python_fence(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """markdown-it's block rule for a fence that begins in line `start`.

    In Python a fence within a string in triple quotes does not end it.
    """
    opening = OPENING.match(state.src, state.bMarks[start] + state.tShift[start], state.eMarks[start])
    if opening is None:
        return False
    if silent:
        return True
    run, info = opening[1], opening[2].strip()
    is_python = _find_language(info) in PYTHON_NAMES
    number, quote, closed = start + 1, "", False
    while number < end and not closed:
        line = state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]
        if line and state.sCount[number] < state.blkIndent:
            break  # the list item or quotation that holds the block has ended
        closed = not quote and len(line.rstrip()) >= len(run) and not line.strip().strip(run[0])
        if is_python and not closed:
            quote = find_open_string(line, quote)
        number += 1
    state.line = number
    token = state.push("fence", "code", 0)
    token.info, token.markup, token.map = info, run, [start, number]
    token.content = state.getLines(start + 1, number - closed, state.sCount[start], True)
    return True


def find_open_string(line: str, quote: str) -> str:
    """Find the triple quotes that are open behind a line of Python, where `quote` were before it; "" for none."""
    at = 0
    while True:
        found = (IN_STRING[quote] if quote else TOKEN).search(line, at)
        if found is None or found[0] == "#":
            return quote
        at = found.end()
        if quote:
            quote = "" if found[0] == quote else quote
        elif found[0] in IN_STRING:
            quote = found[0]
