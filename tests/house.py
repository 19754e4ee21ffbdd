"""The shape of the house in figures: of this checkout, or of a commit of it.

    python tests/house.py               a table
    python tests/house.py 30521b9 HEAD  the same of commits, beside each other

A *walk* is what a reader opens who follows one thing through the code: the files in which a function can be reached
from where it enters. It is found in the code's own names and calls: a method counts where its class can be reached and
something calls it by name, whatever the object is, so that a walk is rather too long than too short.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "evals", "kernels", "plugins", "scripts", "serving")
UNTYPED = re.compile(r"(dict|Mapping)\[str, Any\]")
# What names arbitrary JSON, or another program's fields.
ALIASES = re.compile(r"\b(JsonObject|ConfigJson|Named|Options|Space)\b")
# Of a command: what is there whatever it does.
HELP = ("EXAMPLES", "EPILOG", "DESCRIPTION", "FORMS", "__all__")
FRAME = re.compile(
    r"_?(main|publish|(list|describe)_settings|check_args|(claim|print|render)\w*|\w*parser|parse_args|add_\w+_flags)"
)
# Where the walks enter: today's place, or an earlier one.
WALKS = {
    "a gateway request": (
        ("serving/gateway/clients/protocol.py", "GatewayProtocol"),
        ("serving/gateway/protocol.py", "GatewayProtocol"),
    ),
    "a prompt of an A/B": (
        ("bench/harness/driver.py", "Driver.run_round"),
        ("bench/harness/runner.py", "Driver.run_round"),
        ("bench/run.py", "Driver.run_round"),
    ),
    "a compaction": (("scripts/checkpoints/compact.py", "compact"), ("scripts/compact.py", "main")),
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A file of the product."""

    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def is_command(self) -> bool:
        """It is started by its path, with `--help`."""
        return '__name__ == "__main__"' in self.text and any(name in self.text for name in HELP[:2])

    @cached_property
    def signatures(self) -> dict[str, str]:
        """The types of parameters and result by function, as path:line name."""
        functions = [node for node in ast.walk(self.tree) if isinstance(node, Function)]
        return {f"{self.path}:{each.lineno} {each.name}": " ".join(_list_types(each)) for each in functions}


def read_sources(root: Path = ROOT) -> list[Source]:
    """Every file of the product, without those of a distribution of its own (evals/spec_rl)."""
    others = {path.parent for folder in FOLDERS for path in (root / folder).rglob("pyproject.toml")}
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    own = [path for path in paths if not others & set(path.parents)]
    texts = [path.read_text(encoding="utf-8") for path in own]
    return [
        Source(path.relative_to(root).as_posix(), text, ast.parse(text)) for path, text in zip(own, texts, strict=True)
    ]


def count_files(sources: list[Source]) -> dict[str, int]:
    """Files per folder, packages' own aside."""
    found: dict[str, int] = defaultdict(int)
    for source in sources:
        folder, _, name = source.path.rpartition("/")
        found[folder] += name != "__init__.py"
    return dict(found)


def list_signatures(sources: list[Source], pattern: re.Pattern[str]) -> list[str]:
    """The functions, as path:line name, of which a parameter or the result is of such a type."""
    return [name for source in sources for name, types in source.signatures.items() if pattern.search(types)]


def _list_types(function: Function) -> list[str]:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    types = [argument.annotation for argument in arguments] + [function.returns]
    return [ast.unparse(annotation) for annotation in types if annotation is not None]


def measure_frame(source: Source) -> int:
    """Lines of a command that every command has: imports, help and the functions that read flags and write files."""
    lines: set[int] = set()
    for node in source.tree.body:
        names = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
        if (
            isinstance(node, ast.Import | ast.ImportFrom)
            or (isinstance(node, Function) and FRAME.fullmatch(node.name))
            or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
            or any(name in HELP for name in names)
        ):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def find_imports(sources: list[Source]) -> dict[str, set[str]]:
    """Which files each file imports, at its top or in a function."""
    houses = {_name_module(source.path): source.path for source in sources}
    found: dict[str, set[str]] = {}
    for source in sources:
        names = {
            (f"{node.module}.{alias.name}", node.module)
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        # A module of a package, or a name in one.
        homes = {houses.get(name) or houses.get(module) for name, module in names}
        found[source.path] = {home for home in homes if home is not None} - {source.path}
    return found


def find_circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Files that import each other in a loop."""
    reached = {path: _reach(path, imports) for path in imports}
    circles = {tuple(sorted(other for other in reached[path] if path in reached[other])) for path in imports}
    return [list(circle) for circle in sorted(circles) if len(circle) > 1]


def _reach(path: str, imports: Mapping[str, set[str]]) -> set[str]:
    found, waiting = {path}, [path]
    while waiting:
        fresh = imports[waiting.pop()] - found
        found |= fresh
        waiting += fresh
    return found


def _name_module(path: str) -> str:
    return "laguna_serve." + path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")


class Walker:
    """Follows names and calls from one definition to all that can be reached from it."""

    def __init__(self, sources: list[Source]) -> None:
        self._scopes = {source.path: _read_scope(source) for source in sources}
        self._homes = {_name_module(source.path): source.path for source in sources}

    def walk(self, path: str, name: str) -> set[str]:
        """The files in which something can be reached from a function, a method, or any method of a class."""
        self._called: set[str] = set()
        self._classes: dict[tuple[str, str], ast.ClassDef] = {}
        self._seen: set[tuple[str, str]] = set()
        self._files: set[str] = set()
        owner, _, method = name.partition(".")
        self._take(path, owner)
        if (entered := self._classes.get((path, owner))) is not None:
            methods = {item.name for item in entered.body if isinstance(item, Function)}
            self._called |= {method} if method else methods
        before = -1
        while before != len(self._seen):
            before = len(self._seen)
            for (file, owner), node in list(self._classes.items()):
                for item in node.body:
                    if isinstance(item, Function) and (item.name in self._called or item.name.startswith("__")):
                        self._read(file, f"{owner}.{item.name}", item)
        return self._files

    def _take(self, path: str, name: str) -> None:
        node = self._scopes.get(path, {}).get(name)
        if isinstance(node, ast.ClassDef):
            if (path, name) not in self._classes:
                self._classes[path, name] = node
                for base in node.bases:
                    self._follow(path, base)
        elif isinstance(node, Function):
            self._read(path, name, node)
        elif isinstance(node, tuple):  # imported: the module's file, the name there
            module, own = node
            if own and f"{module}.{own}" in self._homes:
                return
            if (home := self._homes.get(module)) is not None and own:
                self._take(home, own)

    def _read(self, path: str, name: str, node: Function) -> None:
        if (path, name) in self._seen:
            return
        self._seen.add((path, name))
        self._files.add(path)
        self._follow(path, node)

    def _follow(self, path: str, tree: ast.AST) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                self._called.add(node.attr)
                if isinstance(node.value, ast.Name) and isinstance(self._scopes[path].get(node.value.id), tuple):
                    module, own = self._scopes[path][node.value.id]  # type: ignore[misc]
                    if (home := self._homes.get(f"{module}.{own}" if own else module)) is not None:
                        self._take(home, node.attr)
            elif isinstance(node, ast.Name):
                self._take(path, node.id)
            elif isinstance(node, ast.ImportFrom) and node.module in self._homes:
                for alias in node.names:
                    self._take(self._homes[node.module], alias.name)


def _read_scope(source: Source) -> dict[str, ast.AST | tuple[str, str]]:
    scope: dict[str, ast.AST | tuple[str, str]] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            scope |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    scope |= {node.name: node for node in source.tree.body if isinstance(node, Function | ast.ClassDef)}
    return scope


def measure(root: Path = ROOT) -> dict[str, str]:
    """Every figure by its name."""
    sources = read_sources(root)
    files, imports = count_files(sources), find_imports(sources)
    commands = [source for source in sources if source.is_command]
    lines, frame = sum(source.lines for source in commands), sum(map(measure_frame, commands))
    largest = max(files, key=lambda folder: files[folder])
    readme = (root / "README.md").read_text(encoding="utf-8")
    tests = [path for path in (root / "tests").rglob("*.py") if "toy" not in path.parts]
    folders = {
        f"lines of {folder}/": f"{sum(s.lines for s in sources if s.path.startswith(f'{folder}/')):,}"
        for folder in FOLDERS
    }
    found = {
        "files, lines of the product": f"{len(sources)}, {sum(source.lines for source in sources):,}",
        **folders,
        "lines of a file: median, largest": f"{statistics.median(s.lines for s in sources):.0f}, "
        f"{max(source.lines for source in sources)}",
        "files of more than 300 lines": str(sum(source.lines > 300 for source in sources)),
        "most files in a folder": f"{files[largest]} ({largest})",
        "circles of imports": str(len(find_circles(imports))),
        "signatures with dict[str, Any]": str(len(list_signatures(sources, UNTYPED))),
        "signatures with an alias of it": str(len(list_signatures(sources, ALIASES))),
        "signatures with argparse.Namespace": str(len(list_signatures(sources, re.compile(r"argparse\.Namespace")))),
        "commands: number, lines, skeleton": f"{len(commands)}, {lines:,}, {frame:,} ({frame / lines:.0%})",
        "README, lines": str(len(readme.splitlines())),
        "lines of tests": f"{sum(len(path.read_text(encoding='utf-8').splitlines()) for path in tests):,}",
    }
    walker = Walker(sources)
    for name, entries in WALKS.items():
        reached = next(reached for entry in entries if (reached := walker.walk(*entry)))
        rooms = {path.rpartition("/")[0] for path in reached}
        found[f"files, folders that {name} visits"] = f"{len(reached)}, {len(rooms)}"
    return found


def measure_commit(commit: str) -> dict[str, str]:
    """The same of a commit."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", "--", commit], capture_output=True)
    if packed.returncode:
        said = packed.stderr.decode().splitlines()[-1]
        raise SystemExit(f"house.py: error: {commit}: expected a commit of this repository, got: {said}")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
        return measure(Path(folder))


def main(commits: list[str]) -> None:
    """Print a table in Markdown."""
    columns = {commit: measure_commit(commit) for commit in commits} or {"this checkout": measure()}
    print("| | " + " | ".join(columns) + " |")
    print("|--" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(column.get(name, "") for column in columns.values()) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
