"""The fenced code blocks of a Markdown text, by markdown-it-py (CommonMark).

Only what decides where a fence is stays enabled: fences, lists and block quotes. Without inline rules, links, HTML and
tables nothing in the parser is more than linear in the text (its nesting is bounded by MAX_NESTING), and a fence may be
indented as deeply as a model likes.
"""

from __future__ import annotations

from collections.abc import Iterator

from markdown_it import MarkdownIt

PYTHON_NAMES = {"", "py", "py3", "python", "python3"}
MAX_NESTING = 20
# How many closing fences are tried as the end of a block whose docstring holds fences of its own.
MAX_REJOINED = 8

Block = tuple[str, str]


def find_fences(text: str) -> list[Block]:
    """Every fenced block as (language, code), the fence's own indentation taken off; the last one may be unclosed."""
    return _find(text, ["fence", "list", "blockquote"])


def list_readings(text: str) -> Iterator[list[Block]]:
    """The blocks of a text in the ways in which it may be meant, the most literal first: CommonMark's; with every fence
    at its word, as models forget to indent the code within a list; with fences inside of a block's docstring."""
    yield find_fences(text)
    yield _find(text, ["fence"])
    yield _rejoin(text)


def _find(text: str, rules: list[str]) -> list[Block]:
    parser = MarkdownIt("zero", {"maxNesting": MAX_NESTING}).enable(rules)
    parser.core.ruler.disable(["inline", "text_join"])
    blocks = []
    for token in parser.parse(text):
        if token.type == "fence":
            words = token.info.split(maxsplit=1)
            blocks.append((words[0].lower() if words else "", token.content))
    return blocks


def _rejoin(text: str) -> list[Block]:
    """From the last fence with Python's name to each of the plain fences behind it, the farthest first."""
    lines = text.split("\n")
    marks = [(index, line.strip()) for index, line in enumerate(lines) if line.lstrip().startswith("```")]
    opened = [at for at, (_, mark) in enumerate(marks) if mark.strip("`").strip().lower() in PYTHON_NAMES - {""}]
    if not opened:
        return []
    first = marks[opened[-1]][0]
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    closing = [index for index, mark in marks[opened[-1] + 1 :] if not mark.strip("`")][:MAX_REJOINED]
    code = [line.removeprefix(indent) for line in lines[first + 1 :]]
    return [("python", "\n".join(code[: index - first - 1]) + "\n") for index in reversed(closing)]
