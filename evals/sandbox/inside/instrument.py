"""Rewrites a problem's tests, so that they are counted one by one and cannot hold for want of anything to check.

`check` is rewritten so that one failure does not hide the next. One *test* is one execution of

- an `assert` in check's own body, its loops and branches (`assert True` does not count when it is reached),
- an `if` that raises,
- a call, standing alone, of a function that asserts: one of the test's own that holds an assert or a raise or calls one
  that does, or any whose name begins with "assert" (HumanEval+'s `assertion(out, exp, atol)` is one test per call),
- a whole `try` or `with` statement, as they say what must be raised.

A check without any of these is one test as a whole. Calls in which emptiness satisfies a test (`all`, `zip`, numpy's
`allclose` and its kind) go through a `Watcher`, which notes it; so do loops of tests over an answer, and what an oracle
reads of the arguments after the program had them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

TEST, ITERATION, WATCH = "_guard_test", "_guard_iteration", "_watch"
COMPARING = frozenset(
    (
        *("allclose", "isclose", "assert_allclose", "assert_almost_equal", "assert_approx_equal", "assert_equal"),
        *("assert_array_equal", "assert_array_almost_equal", "assert_array_less", "assert_array_max_ulp"),
    )
)


@dataclass(slots=True)
class Names:
    """Names of a function of the test, by what they hold: the program's answers, or arguments that it was given."""

    answers: set[str] = field(default_factory=set)
    arguments: set[str] = field(default_factory=set)


def rewrite(test: str, entry_point: str) -> ast.Module:
    """Rewrite the test, with `check`'s body guarded statement by statement.

    Raises:
        SyntaxError: it is no Python.
    """
    tree = ast.parse(test)
    asserting = find_asserting(tree)
    for node in list(_walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.name == "check" or node.name in asserting
        ):
            _Watching(node, {"candidate", entry_point}).rewrite()
    _StopNames().visit(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            body = [_guard(statement, asserting) for statement in node.body]
            guarded = any(_is_guard(part) for statement in body for part in _walk(statement))
            node.body = body if guarded else [_wrap(TEST, body, node)]
    ast.fix_missing_locations(tree)
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
    """Walk as ast.walk, but not into lists and the like: HumanEval+'s tests have some of a hundred thousand numbers."""
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
        case ast.Assert() | ast.Try() | ast.TryStar() | ast.With() | ast.AsyncWith():
            return _wrap(TEST, [node], node)
        case ast.If(body=[*_, ast.Raise()], orelse=[]):
            return _wrap(TEST, [node], node)
        case ast.Expr(value=ast.Call() | ast.Await(value=ast.Call())):
            call = node.value.value if isinstance(node.value, ast.Await) else node.value
            name = _name_call(call) if isinstance(call, ast.Call) else ""
            return _wrap(TEST, [node], node) if name in asserting or name.startswith("assert") else node
        case ast.For():
            body = inside(node.body)
            if any(_is_guard(part) for statement in body for part in _walk(statement)):
                node.iter = _watch("loop", [node.iter], node.iter)
            node.body = [_wrap(ITERATION, body, node)]
            node.orelse = inside(node.orelse)
        case ast.If() | ast.While():
            node.body, node.orelse = inside(node.body), inside(node.orelse)
    return node


def _is_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.With) and any(
        isinstance(item.context_expr, ast.Name) and item.context_expr.id == TEST for item in node.items
    )


def _wrap(guard: str, body: list[ast.stmt], at: ast.AST) -> ast.With:
    name = ast.copy_location(ast.Name(guard, ast.Load()), at)
    return ast.copy_location(ast.With(items=[ast.withitem(context_expr=name)], body=body), at)


def _watch(method: str, args: list[ast.expr], at: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.Call:
    function = ast.copy_location(ast.Attribute(ast.Name(WATCH, ast.Load()), method, ast.Load()), at)
    line = ast.Constant(at.lineno)
    return ast.copy_location(ast.Call(function, [line, *args], keywords or []), at)


def _name_call(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


class _StopNames(ast.NodeTransformer):
    """`StopIteration` in the tests also means the one that a function of the program raised (messages/proxies.py)."""

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id != "StopIteration" or not isinstance(node.ctx, ast.Load):
            return node
        attribute = ast.Attribute(ast.Name(WATCH, ast.Load()), "stop_iteration", ast.Load())
        return ast.copy_location(attribute, node)

    def visit_List(self, node: ast.List) -> ast.List:
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.Dict:
        return node


class _Watching(ast.NodeTransformer):
    """One function of the tests: its vacuous calls, and its oracles' arguments."""

    def __init__(self, function: ast.FunctionDef | ast.AsyncFunctionDef, programs: set[str]) -> None:
        self._function, self._programs = function, set(programs)
        self._names = Names()
        self._compared: set[str] = set()

    def rewrite(self) -> None:
        """Rewrite the function's body in place."""
        self._learn()
        self._function.body = [self.visit(statement) for statement in self._function.body]

    def _learn(self) -> None:
        names, nodes = self._names, list(_walk(self._function))
        for _ in range(3):  # what is assigned from what is assigned from the program
            for node in nodes:
                if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    if isinstance(node.value, ast.Name) and node.value.id in self._programs:
                        self._programs |= {name for target in targets for name in _list_names(target)}
                    elif self._is_answer(node.value):
                        names.answers |= {name for target in targets for name in _list_names(target)}
                elif isinstance(node, ast.For) and self._is_answer(node.iter):
                    names.answers |= _list_names(node.target)
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self._programs:
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                names.arguments |= {name for value in values for name in _list_names(value)}
        names.arguments -= names.answers | self._programs
        for node in nodes:
            if isinstance(node, ast.Compare):
                operands = [node.left, *node.comparators]
                if any(map(self._is_answer, operands)):
                    self._compared |= {name for operand in operands for name in _list_names(operand)}

    def _is_answer(self, node: ast.AST) -> bool:
        """Whether an expression holds a call of the program, or a name of what it gave."""
        known = self._names.answers | self._programs
        return any(isinstance(part, ast.Name) and part.id in known for part in _walk(node))

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        operands = [node.left, *node.comparators]
        if any(map(self._is_answer, operands)) and not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            node.left, *node.comparators = [self._read_originals(operand) for operand in operands]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        targets = {name for target in node.targets for name in _list_names(target)}
        if targets & self._compared and isinstance(node.value, ast.Call) and not self._is_answer(node.value):
            node.value = self._read_originals(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = _name_call(node)
        if name.startswith("assert") and any(map(self._is_answer, node.args)):
            node.args = [self._read_originals(arg) for arg in node.args]
        plain = not any(isinstance(arg, ast.Starred) for arg in node.args)
        if name in COMPARING and plain and len(node.args) >= 2:
            return _watch("compare", [node.func, *node.args], node, node.keywords)
        if name == "all" and isinstance(node.func, ast.Attribute):  # `x.all()`; `np.all(x)` too
            return _watch("all_of", [node.func.value, *node.args], node, node.keywords)
        if name == "all" and isinstance(node.func, ast.Name) and plain and len(node.args) == 1:
            return _watch("all", node.args, node)
        if name == "zip" and isinstance(node.func, ast.Name) and plain:
            return _watch("zip", node.args, node, node.keywords)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node if node is not self._function else self.generic_visit(node)

    def visit_List(self, node: ast.List) -> ast.AST:
        return node if len(node.elts) > 64 else self.generic_visit(node)

    def _read_originals(self, node: ast.expr) -> ast.expr:
        """Make an oracle's expression read the arguments as they were before the program had them."""
        if self._is_answer(node):
            return node
        return _Originals(self._names.arguments).visit(node)  # type: ignore[no-any-return]


class _Originals(ast.NodeTransformer):
    def __init__(self, names: set[str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self._names and isinstance(node.ctx, ast.Load):
            return _watch("original", [node], node)
        return node


def _list_names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
