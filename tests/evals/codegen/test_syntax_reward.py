"""The share of a completion's lines that are Python by themselves, worked out by hand."""

from __future__ import annotations

import pytest

from laguna_serve.evals.codegen.syntax_reward import is_code, reward_syntax

HEAD = "def f(x):\n"


@pytest.mark.parametrize(
    "line",
    [
        *("return x", "if x:", "for a, b in c:", "class A(B):", "def f(self, *, a=1) -> int:", "async def f():"),
        *("else:", "elif x > 1:", "except (A, B) as error:", "except:", "finally:", "try:", "with a as b:", "pass"),
        *("x = 1  # why", "f(a)[0].b += 1", "yield", "raise E('x') from None", "@decorator"[1:], "return '\\d'"),
    ],
)
def test_statement_or_head_of_one_is_code(line: str) -> None:
    assert is_code(line)


@pytest.mark.parametrize(
    "line",
    [
        *("", "# a comment", '"""text"""', "'text'", "1", "...", "return )", "x = (", "class A = 1", "if x", "else"),
        *("else: :", "def f(", "return \x00", "a b", "x = " + "(" * 5000, "elif:", "]", "@decorator"),
    ],
)
def test_anything_else_is_not(line: str) -> None:
    assert not is_code(line)


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        (HEAD, "    return x\n", 1.0),
        (HEAD, "    y = x\n  return y\n", 1.0),
        (HEAD, "    y = x\n    return y\n    if", 1.0),
        (HEAD, "    y = x\n    return )\n", 0.5),
        (HEAD, "    y = x\n  y = x\n    y = x\n    y = x\n", 0.25),
        (HEAD, "    # a\n\n    return x\n    # b\n", 0.25),
        (HEAD, "    return x", 0.0),
        (HEAD, "", 0.0),
        ("def f(x):\n    return x +", " 1\n", 1.0),
        ("def f(x):\n    return x +", "\n    y = 2\n", 0.5),
    ],
)
def test_reward(prompt: str, completion: str, reward: float) -> None:
    assert reward_syntax(prompt, completion) == reward


def test_text_that_breaks_the_parser_does_not_break_the_reward() -> None:
    assert reward_syntax(HEAD, "    x = " + "-" * 100_000 + "1\n") in (0.0, 1.0)
