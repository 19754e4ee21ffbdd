"""Runs a problem's tests on a function that lives in another process, and counts.

The model's code never runs here, so it can neither see the tests nor change what a comparison does. `check` is
rewritten so that one failure does not hide the next. One *test* is one execution of

- an `assert` in check's own body, its loops and branches (`assert True` does not count when it is reached),
- a call, standing alone, of a function that asserts: one of the test's own that holds an assert or a raise or calls one
  that does, or any whose name begins with "assert" (HumanEval+'s `assertion(out, exp, atol)` is one test per call),
- a whole `try` or `with` statement, as they say what must be raised.

A test that raises has failed and the next one follows. An exception elsewhere ends the iteration of the innermost
`for`, outside of loops the whole of check: what was not reached has not passed.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from laguna_serve.evals.sandbox_player import describe
from laguna_serve.evals.sandbox_wire import Peer, PeerExit, PeerGone, Remote, Unsendable

TEST, ITERATION = "_guard_test", "_guard_iteration"
SWALLOWED = (Exception, Unsendable, PeerExit)
LINE_CHARS = 200


class Tally:
    """What has passed and failed so far, told to the host test by test: it may kill the judge at any time."""

    def __init__(self, fd: int, test: str) -> None:
        self._fd, self._lines = fd, test.splitlines()
        self._detail = ""

    def add_pass(self) -> None:
        """Count one test that has passed."""
        os.write(self._fd, b"+")

    def add_failure(self, error: BaseException) -> None:
        """Count one that has failed; of the first it is kept where in the tests, and why."""
        os.write(self._fd, b"-")
        if not self._detail:
            self._detail = self._locate(error) + describe(error)

    def _locate(self, error: BaseException) -> str:
        trace, number = error.__traceback__, 0
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "test.py":
                number = trace.tb_lineno
            trace = trace.tb_next
        return f"test line {number}, {self._lines[number - 1].strip()[:LINE_CHARS]}: " if number else ""

    def close(self, ending: str, detail: str = "") -> None:
        """Say how it ended: "ended", "broken" (the program does not load) or "gone"; and the first failure."""
        text = json.dumps({"ending": ending, "detail": detail or self._detail})
        os.write(self._fd, text.encode())


class Guard:
    """A context that turns an exception within it into a failure. `counts`: leaving without one is a test passed."""

    def __init__(self, tally: Tally, counts: bool) -> None:
        self._tally, self._counts = tally, counts

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            if self._counts:
                self._tally.add_pass()
            return False
        if not isinstance(error, SWALLOWED):
            return False
        self._tally.add_failure(error)
        return True


def judge(config: dict[str, Any], wire_fd: int, report_fd: int) -> None:
    """Run config["test"] against the player at the other end of the wire."""
    sys.path += config["packages"]
    tally = Tally(report_fd, config["test"])
    try:
        space = prepare(config, tally)
        peer = Peer(wire_fd, config["message_bytes"])
        match peer.receive():
            case ["ready", _]:
                pass
            case ["broken", str(text)]:
                return tally.close("broken", text)
            case message:
                raise PeerGone(f"expected a program, got {str(message)[:60]}")
        candidate = Remote(peer, 0)
        space[config["entry_point"]] = candidate
        exec(compile(rewrite(config["test"]), "test.py", "exec"), space)
        with Guard(tally, counts=False):
            space["check"](candidate)
    except PeerGone as error:
        return tally.close("gone", str(error))
    return tally.close("ended")


def prepare(config: dict[str, Any], tally: Tally) -> dict[str, Any]:
    """A namespace with the prompt's own functions: some problems' tests call helpers that the prompt defines."""
    space: dict[str, Any] = {"__name__": "test"}
    for text in (config["prompt"], config["prompt"].rstrip() + "\n    pass\n"):
        try:
            code = compile(text, "prompt.py", "exec")
        except SyntaxError:
            continue
        exec(code, space)
        break
    return space | {TEST: Guard(tally, counts=True), ITERATION: Guard(tally, counts=False)}


def rewrite(test: str) -> ast.Module:
    """The test with `check`'s body guarded statement by statement."""
    tree = ast.parse(test)
    asserting = find_asserting(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            node.body = [_guard(statement, asserting) for statement in node.body]
    return tree


def find_asserting(tree: ast.Module) -> set[str]:
    """Names of the test's functions that assert, by themselves or through others of them."""
    functions = {node.name: list(_walk(node)) for node in _walk(tree) if isinstance(node, ast.FunctionDef)}
    calls = {
        name: {_name_call(node) for node in nodes if isinstance(node, ast.Call)} for name, nodes in functions.items()
    }
    found = {
        name for name, nodes in functions.items() if any(isinstance(node, ast.Assert | ast.Raise) for node in nodes)
    }
    while more := {name for name in functions if calls[name] & found} - found:
        found |= more
    return found


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """As ast.walk, but not into lists and the like: HumanEval+'s tests hold lists of a hundred thousand numbers."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.List | ast.Tuple | ast.Dict | ast.Set):
            yield from _walk(child)


def _guard(node: ast.stmt, asserting: set[str]) -> ast.stmt:
    def inside(body: list[ast.stmt]) -> list[ast.stmt]:
        return [_guard(statement, asserting) for statement in body]

    match node:
        case ast.Assert(test=ast.Constant(value=value)) if value:
            return node
        case ast.Assert() | ast.Try() | ast.With():
            return _wrap(TEST, [node], node)
        case ast.Expr(value=ast.Call() as call):
            name = _name_call(call)
            return _wrap(TEST, [node], node) if name in asserting or name.startswith("assert") else node
        case ast.For():
            node.body = [_wrap(ITERATION, inside(node.body), node)]
            node.orelse = inside(node.orelse)
        case ast.If() | ast.While():
            node.body, node.orelse = inside(node.body), inside(node.orelse)
    return node


def _wrap(guard: str, body: list[ast.stmt], at: ast.stmt) -> ast.With:
    name = ast.copy_location(ast.Name(guard, ast.Load()), at)
    return ast.copy_location(ast.With(items=[ast.withitem(context_expr=name)], body=body), at)


def _name_call(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""
