"""From answers of many shapes to the program."""

from __future__ import annotations

import ast

import pytest
from humaneval_like import ADD, DECODE, PLUS

from laguna_serve.evals.extraction.extract import ExtractionError, find_fences, read_program
from laguna_serve.evals.extraction.fences import find_open_string
from laguna_serve.evals.extraction.parser import list_read
from laguna_serve.evals.problems import Problem

WHOLE = "def add(a, b):\n    if a:\n        return a + b\n    return b\n"
CALLS = "def add(a, b):\n    return plus(a, b)\n"
BODY = "    total = a + b\n    return total\n"
CHAT = {
    "python fence": f"Sure!\n\n```python\n{WHOLE}```\nHope it helps.",
    "py fence": f"```py\n{WHOLE}```",
    "Python in capitals": f"```Python\n{WHOLE}```",
    "tildes": f"~~~python\n{WHOLE}~~~",
    "no language": f"```\n{WHOLE}```",
    "longer fence with backticks inside": f'````python\n{WHOLE}X = """\n```\n"""\n````',
    "windows line ends": f"```python\n{WHOLE}```".replace("\n", "\r\n"),
    "fence within a longer fence": f"````\nSo:\n```python\n{WHOLE}```\n````",
    "fence that ends behind the code": f"```python\n{WHOLE.rstrip()}```\nDone.",
    "fence that ends behind the code, another below": f"```python\n{WHOLE.rstrip()} ```\n```python\nadd(1, 2)\n```",
    "fence within a list": "1. So:\n   ```python\n"
    + "".join(f"   {line}\n" for line in WHOLE.splitlines())
    + "   ```\n",
    "unclosed fence": f"```python\n{WHOLE}",
    "usage after it": f"```python\n{WHOLE}```\nUse it:\n```python\nadd(1, 'x')\n```\n```bash\npip install it\n```",
    "helper in a fence before": f"```python\ndef helper():\n    return 1\n```\nthen\n```python\n{WHOLE}```",
    "helper in a fence behind": f"```python\n{CALLS}```\nwith\n```python\ndef plus(a, b):\n    return a + b\n```\nSo:\n"
    "```python\nprint(add(1, 2))\n```",
    "another helper in a fence behind": f"```python\ndef plus(a, b):\n    return a + b\n\n{CALLS}```\nIt could be\n"
    "```python\ndef plus(a, b):\n    return 0\n```",
    "tests in a fence behind": f"```python\n{WHOLE}```\n```python\nimport nowhere\ndef test_it():\n    add(1, 2)\n```",
    "call in a fence before": f"You want\n```python\nraise SystemExit(add(1, 2))\n```\nso\n```python\n{WHOLE}```",
    "usage before it": f"It is called so:\n```python\nresult = add(2, 3)\n```\nHere it is:\n```python\n{WHOLE}```",
    "usage before it, with a helper": "```python\nfive = 5\n```\n```python\nclass Five:\n    value = add(2, 3)\n```\n"
    f"```python\ndef helper(n=five):\n    return add(n, 0)\n```\n```python\n{WHOLE}\nassert helper() == 5\n```",
    "usage between two tries": "```python\ndef plus(a, b):\n    return a + b\nadd = plus\nadd.twice = 2\n```\n"
    f"```python\ntwo = add(1, 1)\n```\n```python\n{CALLS}```",
    "second try after the first": f"```python\ndef add(a, b):\n    return 0\n```\nNo:\n```python\n{WHOLE}```",
    "no fence": WHOLE,
    "no fence, prose around": f"The function is\n\n{WHOLE}\nThis adds two numbers.",
    "no fence, prose that looks like code": f"from what you say:\n\n{WHOLE}\nDone!",
    "prompt repeated": ADD.prompt + BODY,
    "prompt repeated in a fence": f"```python\n{ADD.prompt}{BODY}```",
    "body alone": BODY,
    "body alone in a fence": f"```python\n{BODY}```",
    "body alone at the margin": "total = a + b\nreturn total\n",
    "body alone, first line stripped": BODY.strip(),
    "body alone with a function of its own by that name": "    def add(x):\n        return x + b\n    return add(a)\n",
    "thoughts before": f"<think>```python\ndef add(a, b):\n    return None\n```</think>\n```python\n{WHOLE}```",
    "indented as Markdown's code": "So:\n\n" + "".join(f"    {line}\n" for line in WHOLE.splitlines()) + "\nDone.",
    "indented as Markdown's code, alone": "".join(f"    {line}\n" for line in WHOLE.splitlines()),
    "indented within its fence": "```python\n" + "".join(f"    {line}\n" for line in WHOLE.splitlines()) + "```\n",
    "future import": f"```python\nfrom __future__ import annotations\n\n{WHOLE}```",
    "assignment": "```python\nimport operator\nadd = operator.add\n```",
}


def call(program: str, name: str, *args: object) -> object:
    space: dict[str, object] = {}
    exec(compile(program, "program", "exec"), space)
    function = space[name]
    assert callable(function)
    return function(*args)


@pytest.mark.parametrize("answer", CHAT.values(), ids=CHAT)
def test_chat_answer_gives_the_function(answer: str) -> None:
    assert call(read_program(answer, ADD, "chat")[0], "add", 2, 3) == 5


# What stands in a docstring of the answer's code.
INSIDE = {
    "fence": "    ```\n    add(1, 2)\n    ```",
    "python fence that defines it": "    ```python\n    def add(a, b): return 0\n    ```",
    "fence at the margin": "```\nadd(1, 2)\n```",
    "python fence at the margin that defines it": "```python\ndef add(a, b):\n    return 0\n```",
    "tildes": "~~~\nadd(1, 2)\n~~~",
    "session": "    ```pycon\n    >>> add(1, 2)\n    3\n    ```",
    "several": "    ```\n    a\n    ```\n    ```\n    b\n    ```\n```\nc\n```",
    "a line that begins with one": "    ``` is how a fence begins",
    "one that is not closed": "    ```\n    add(1, 2)",
    "quotes and apostrophes": "    it's \"so\" ''\n    ```\n    x\n    ```",
    "escaped quotes": '    \\"""\n```\nx\n```',
}
AROUND = {
    "python": "```python\n{}```\n",
    "py": "Sure:\n\n```py\n{}```\nDone, use ```add```.",
    "no name": "```\n{}```\n",
    "tildes": "~~~python\n{}~~~\n",
    "longer": "````python\n{}````\n",
    "unclosed": "So:\n```python\n{}",
    "usage behind it": "```python\n{}```\nUse\n```python\nprint(add(1, 2))\n```\nand\n```bash\nls\n```",
    "helper before it": "```python\nONE = 1\n```\n\n```python\n{}```\n",
    "bare": "{}",
    "bare in prose": "The function is\n\n{}\nThis adds two numbers.",
    "in a quotation": "> ```python\n{}> ```\n",
    "in a list": "1. So:\n   ```python\n{}   ```\n2. Done",
}
MARGINS = {"in a quotation": "> ", "in a list": "   "}


@pytest.mark.parametrize("quote", ['"""', "'''"])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("inside", INSIDE)
def test_fence_in_a_docstring_does_not_end_the_code(inside: str, around: str, quote: str) -> None:
    text = INSIDE[inside].replace('"""', quote)
    code = f"def add(a, b):\n    {quote}Add.\n\n{text}\n    {quote}\n    return a + b\n"
    margin = MARGINS.get(around, "")
    answer = AROUND[around].format("".join(f"{margin}{line}\n" for line in code.splitlines()))
    assert call(read_program(answer, ADD, "chat")[0], "add", 2, 3) == 5


@pytest.mark.parametrize(
    "first",
    [
        'def add(a, b):\n    """Never closed.\n    return 0\n',
        "def add(a, b):\n    return (\n",
        "# it's\nX = '''\n",
        "It's ''' odd\n",
    ],
)
def test_block_with_an_open_string_does_not_swallow_the_next(first: str) -> None:
    answer = f"```python\n{first}```\nBetter:\n```python\n{WHOLE}```\n"
    assert call(read_program(answer, ADD, "chat")[0], "add", 2, 3) == 5


@pytest.mark.parametrize(
    ("line", "before", "behind"),
    [
        ("x = 1", "", ""),
        ('x = """', "", '"""'),
        ("x = '''a", "", "'''"),
        ('x = """a"""', "", ""),
        ('x = "a" """', "", '"""'),
        ("x = 'it' # '''", "", ""),
        ('x = \'"""\'', "", ""),
        ("x = 'it\\'s \"\"\"'", "", ""),
        ('# """', "", ""),
        ('a """', '"""', ""),
        ("a '''", '"""', '"""'),
        ('\\""" a', '"""', '"""'),
        ('""" + """', '"""', '"""'),
        ('x = f"{a}" + r"""', "", '"""'),
        ('"unfinished', "", ""),
    ],
)
def test_open_strings_are_followed(line: str, before: str, behind: str) -> None:
    assert find_open_string(line, before) == behind


def test_imports_and_helpers_of_the_prompt_are_there() -> None:
    code = "from __future__ import annotations\n\ndef total(numbers: List[float]):\n    return sum(numbers)\n"
    answer = f"```python\n{code}```"
    program = read_program(answer, PLUS, "chat")[0]
    assert call(program, "total", [1, 2]) == 3
    assert "from typing import List" in program
    assert (
        call(read_program("```\ndef decode(t):\n    return encode(t)\n```", DECODE, "chat")[0], "decode", "ab") == "ba"
    )


def test_prompt_without_docstring_gives_its_header() -> None:
    problem = Problem("x", "import math\n\n@staticmethod\ndef root(x):", "root", "", None)
    assert read_program("def root(x):\n    return math.sqrt(x)\n", problem, "chat")[0].startswith(
        "import math\n\ndef root"
    )


def test_broken_code_stays_broken() -> None:
    cut_off = "```python\ndef add(a, b):\n    return (a +"
    assert "def add(a, b):\n    return (a +" in read_program(cut_off, ADD, "chat")[0]
    assert read_program("I cannot.", ADD, "chat")[0] == "I cannot.\n"


def test_thoughts_without_an_end_are_no_answer() -> None:
    """What is drafted in them was not said."""
    drafted = f"<think>\nMaybe\n```python\n{WHOLE}```\nNo, wait"
    with pytest.raises(ExtractionError, match="thoughts without an end"):
        read_program(drafted, ADD, "chat")
    assert call(read_program(f"{drafted}</think>{WHOLE}", ADD, "chat")[0], "add", 2, 3) == 5
    assert call(read_program(f"{WHOLE}# not <think>\n", ADD, "chat")[0], "add", 2, 3) == 5


def test_completion_goes_on_from_the_prompt_and_is_cut() -> None:
    answer = "    # sum\n    return a + b\n\n\ndef other():\n    pass\n"
    program = read_program(answer, ADD, "completion")[0]
    assert program == ADD.prompt + "    # sum\n    return a + b\n\n"
    for stop in ("\nclass A:", "\n# end", "\nif __name__", "\nprint(1)"):
        assert read_program(f"    return 1{stop}", ADD, "completion")[0] == ADD.prompt + "    return 1"


def test_fences_are_told_apart() -> None:
    text = "```a b\n1\n```\n`x`\n~~~\n```\n2\n```\n~~~\n"
    assert find_fences(text) == [("a", "1\n"), ("", "```\n2\n```\n")]


def test_lambda_reads_its_defaults_at_once() -> None:
    assert list_read(ast.parse("f = lambda a=b, *, c=d: e").body) == {"b", "d"}
