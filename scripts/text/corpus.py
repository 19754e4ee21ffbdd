"""The toy family's text: Python's standard library, cut into training modules and held-out ones.

The cut is by module: one whose name hashes to 0 modulo `HELD_OUT_EVERY` is never seen in training, neither by the
tokenizer nor by teacher or drafter, and the benchmark prompts come from those alone. The library is the running
interpreter's, so another Python patch release gives a slightly different corpus.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "email", "encodings", "http", "importlib", "json", "logging"),
    *("multiprocessing", "tkinter", "unittest", "urllib", "wsgiref", "xml"),
)
HELD_OUT_EVERY = 10
# Of a function that is asked for.
MOST_CHARACTERS = 900
REQUEST = "Complete this function:\n{head}"
SYSTEM = "You are a careful Python programmer."


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: its path inside the library and its text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the corpus, as a request (its head: signature and docstring) and a reply (the whole of it)."""

    name: str
    head: str
    source: str


def read_modules() -> list[Module]:
    """Every module of the corpus, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [*library.glob("*.py"), *(p for package in PACKAGES for p in (library / package).rglob("*.py"))]
    names = sorted({p.relative_to(library).as_posix() for p in paths})
    modules = [Module(name, (library / name).read_text(encoding="utf-8", errors="ignore")) for name in names]
    return [m for m in modules if "test" not in m.name and len(m.text) > 500 and not _is_table(m.text)]


def _is_table(text: str) -> bool:
    """Whether most of a file is data (code pages, keyword tables): nothing to learn Python from."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(line.lstrip()[:1] in {"'", '"', "0", "("} for line in lines) > len(lines) / 2


def functions(module: Module) -> Iterator[Function]:
    """Return the functions of a module that have a body worth asking for."""
    lines = module.text.splitlines()
    for node in ast.walk(ast.parse(module.text)):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        documented = ast.get_docstring(node) is not None
        if len(node.body) < 1 + documented:
            continue
        first = node.body[1 if documented else 0].lineno - 1
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : first]))
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if head.strip() and head != source and len(source) <= MOST_CHARACTERS:
            yield Function(f"{module.name}:{node.lineno}", head, source)


def conversation(function: Function, system: bool = False) -> list[dict[str, str]]:
    """Return the chat messages that ask for a function and answer with it."""
    messages = [
        {"role": "user", "content": REQUEST.format(head=function.head)},
        {"role": "assistant", "content": function.source},
    ]
    return [{"role": "system", "content": SYSTEM}, *messages] if system else messages


def cuts(modules: list[Module], count: int, seed: int, lines: tuple[int, int] = (6, 20)) -> list[dict[str, str]]:
    """Prompts `{"id": "module:first-last", "prompt": text}`: whole lines from the start of a definition, none twice."""
    rng = random.Random(seed)
    starts = [
        (module, number)
        for module in modules
        for number, line in enumerate(module.text.splitlines())
        if line.lstrip().startswith(("def ", "class ", "async def "))
    ]
    rng.shuffle(starts)
    prompts: dict[str, dict[str, str]] = {}
    for module, first in starts:
        if len(prompts) == count:
            break
        last = first + rng.randint(*lines)
        text = "".join(module.text.splitlines(keepends=True)[first:last])
        if 120 <= len(text) <= 500 and text.endswith("\n"):
            prompts.setdefault(text, {"id": f"{module.name}:{first + 1}-{last}", "prompt": text})
    return list(prompts.values())
