"""Problems in the exact forms of HumanEval and HumanEval+, written for these tests."""

from __future__ import annotations

from laguna_serve.evals.problems import Problem

ADD = Problem(
    "T/add",
    'def add(a: int, b: int) -> int:\n    """ Add two numbers.\n    >>> add(1, 2)\n    3\n    """\n',
    "add",
    "METADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3, 'first'\n"
    "    for i in range(4):\n        assert candidate(i, i) == 2 * i\n    assert candidate(-5, 5) == 0\n"
    "    assert True\n",
    "    return a + b\n",
)
# The prompt's helper is called by the tests, as in HumanEval/38 and /50.
DECODE = Problem(
    "T/decode",
    'def encode(text: str):\n    """ Reverse. """\n    return text[::-1]\n\n\n'
    'def decode(text: str):\n    """ Undo encode. """\n',
    "decode",
    "def check(candidate):\n    from random import randint, choice\n    import string\n\n    for _ in range(20):\n"
    "        text = ''.join(choice(string.ascii_lowercase) for i in range(randint(1, 9)))\n"
    "        assert candidate(encode(text)) == text\n",
    "    return encode(text)\n",
)
PLUS_TEST = """

import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match

def check(candidate):
    inputs = [[[3.0, 1.0]], [[0.1, 0.2]], [[]], [[5.0]]]
    results = [4.0, 0.3, 0.0, 5.0]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""
PLUS = Problem(
    "T/plus",
    'from typing import List\n\n\ndef total(numbers: List[float]) -> float:\n    """ Sum. """\n',
    "total",
    PLUS_TEST,
    "    return float(sum(numbers))\n",
)


def make_problem(body: str, entry_point: str = "f", canonical: str | None = None, prompt: str = "") -> Problem:
    """A problem from the body of its check."""
    lines = "".join(f"    {line}\n" for line in body.strip("\n").split("\n"))
    return Problem("T/made", prompt, entry_point, "def check(candidate):\n" + lines, canonical)
