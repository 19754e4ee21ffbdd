"""What the Python of an answer defines and reads, by CPython's parser; nothing is run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable


class Parser:
    """CPython's parser with a budget: once it is spent, nothing parses any more. `work`: characters handed over."""

    def __init__(self, budget: int) -> None:
        self.work, self._budget = 0, budget

    def parse(self, code: str) -> ast.Module | SyntaxError | None:
        """Parse code: its tree, what CPython says is wrong, or None where it says nothing of use."""
        self.work += len(code)
        if self.work > self._budget:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's invalid escape is no concern of ours
            try:
                return ast.parse(code)
            except SyntaxError as error:
                return error
            except (ValueError, RecursionError, MemoryError):
                return None

    def find_definitions(self, code: str) -> list[ast.stmt]:
        """Find the statements at the left margin; none of code that does not parse."""
        tree = self.parse(code)
        return tree.body if isinstance(tree, ast.Module) else []

    def defines(self, code: str, name: str) -> bool:
        """Whether it parses, with a function or class of this name (or an assignment to it) at its left margin."""
        return any(name in list_names(node) for node in self.find_definitions(code))

    def compiles(self, code: str) -> bool:
        """Unlike parsing, this finds a `return` outside of the function."""
        tree = self.parse(code)
        try:
            return isinstance(tree, ast.Module) and compile(tree, "answer", "exec") is not None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False

    def is_whole(self, code: str, name: str) -> bool:
        """Whether it is a program that defines this name, and not a body with a function by that name in it."""
        return self.defines(code, name) and self.compiles(code)


def list_names(node: ast.stmt) -> set[str]:
    """List the names that a statement defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
            return {name}
    return set()


def list_read(body: Iterable[ast.stmt]) -> set[str]:
    """List the names that statements read while they run; what their functions read, they read when they are called."""
    names, left = set[str](), list[ast.AST](body)
    while left:  # not by recursion, which a text can exhaust
        node = left.pop()
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                names.add(name)
            case ast.FunctionDef(args=arguments) | ast.AsyncFunctionDef(args=arguments):
                left += [*node.decorator_list, *_list_defaults(arguments)]
            case ast.Lambda(args=arguments):
                left += _list_defaults(arguments)
            case _:
                left.extend(ast.iter_child_nodes(node))
    return names


def _list_defaults(arguments: ast.arguments) -> list[ast.expr]:
    return [*arguments.defaults, *(default for default in arguments.kw_defaults if default is not None)]
