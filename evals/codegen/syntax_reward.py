"""A reward that a small code model can raise: how much of what it wrote is Python, and not the same again and again.

For language models that solve no task yet, and for trying an RL loop out: it needs no tests and no sandbox, as nothing
is run. Lines are judged one by one, so that a slip early in a text does not hide what follows: that is dense enough
for a model of a few million parameters to learn from, and says little about a capable one.
"""

from __future__ import annotations

import ast
import warnings

# What must stand before a line, or after it, for the line to be a statement.
BEFORE = {"elif": "if x:\n pass\n", "else": "if x:\n pass\n", "except": "try:\n pass\n", "finally": "try:\n pass\n"}
AFTER = {"try": "\nfinally:\n pass"}
BODY = "\n pass"


def reward_syntax(prompt: str, completion: str) -> float:
    """Return the share of a completion's lines that are Python by themselves, 0 … 1.

    A line that opens a block counts, and so does an `else`; one in the midst of a bracket or a long string does not.
    Blank lines, comments, texts that stand alone and repeated lines are lines written, but earn nothing. The first
    line goes on where the prompt stops; the last one is judged only when it has been ended.
    """
    lines = completion.split("\n")[:-1]
    if not lines:
        return 0.0
    lines[0] = prompt.rpartition("\n")[2] + lines[0]
    return len({line.strip() for line in lines if is_code(line.strip())}) / len(lines)


def is_code(line: str) -> bool:
    """Whether a line, without its indentation, is a statement or the head of one."""
    word = line.partition(":")[0].partition(" ")[0]
    text = BEFORE.get(word, "") + line + (BODY if line.endswith(":") else "") + AFTER.get(word, "") + "\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is odd about it, such as an unknown escape, is no error
        try:
            body = ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return bool(body) and not (isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant))
