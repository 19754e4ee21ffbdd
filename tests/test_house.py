"""The figures that the house is held to (house.py), and that they are of what they say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import house
import pytest

pytestmark = pytest.mark.slow
MOST_UNTYPED = 40
# Signatures with an alias of dict[str, Any]: where JSON is passed on whose fields the code does not name one by one.
ALIASES = re.compile(r"\b(JsonObject|ConfigJson)\b")
MOST_ALIASES = 225
MOST_LINES = 310
MOST_SKELETON = 0.30
MOST_README = 150


@pytest.fixture(scope="module")
def sources() -> list[house.Source]:
    return house.read_sources()


@pytest.fixture(scope="module")
def walker(sources: list[house.Source]) -> house.Walker:
    return house.Walker(sources)


def make_source(text: str, path: str = "bench/x.py") -> house.Source:
    return house.Source(path, text, ast.parse(text))


def test_what_is_no_commit_is_one_line() -> None:
    with pytest.raises(SystemExit, match="nosuch: expected a commit of this repository, got: fatal: not a valid"):
        house.main(["nosuch", "HEAD"])


def test_signatures_are_typed(sources: list[house.Source]) -> None:
    untyped = house.list_signatures(sources, house.UNTYPED)
    assert len(untyped) <= MOST_UNTYPED, untyped


def test_aliases_do_not_become_more(sources: list[house.Source]) -> None:
    """The bound only falls: a signature that needs one more is better a struct."""
    assert len(house.list_signatures(sources, ALIASES)) <= MOST_ALIASES


def test_results_are_typed(sources: list[house.Source]) -> None:
    """Whoever takes or makes a result has no dict[str, Any] beside it."""
    untyped = house.list_signatures(sources, house.UNTYPED)
    assert not {*untyped} & {*house.list_signatures(sources, re.compile(r"\w+Result\b"))}
    assert not [name for name in untyped if Path(name.partition(":")[0]).stem == "result"]


def test_fields_of_results_are_typed(sources: list[house.Source]) -> None:
    """Of every struct that goes into a result file: those of other programs' files begin with an underscore."""
    untyped = [
        f"{source.path} {node.name}.{ast.unparse(field.target)}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        if any(ast.unparse(base).rpartition(".")[2] == "Struct" for base in node.bases)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and re.search(r"\b(Any|\w+Json|JsonObject)\b", ast.unparse(field.annotation))
    ]
    assert not untyped


def test_bounds_of_flags_are_checked(sources: list[house.Source]) -> None:
    """A configuration with a flag's `at_least` calls check_bounds, or inherits from one that does."""
    classes = {
        node.name: node for source in sources for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)
    }

    def checks(name: str) -> bool:
        node = classes.get(name)
        return node is not None and (
            "check_bounds(self)" in ast.unparse(node) or any(checks(ast.unparse(base)) for base in node.bases)
        )

    bounded = [name for name, node in classes.items() if "Flag(" in (text := ast.unparse(node)) and "at_least=" in text]
    assert len(bounded) > 20
    assert not [name for name in bounded if not checks(name)]


def test_argparse_ends_in_the_kit(sources: list[house.Source]) -> None:
    found = house.list_signatures(sources, re.compile(r"argparse\.Namespace"))
    assert {name.partition(":")[0] for name in found} == {"serving/kit/flags/command_line.py"}


def test_files_import_each_other_in_no_circle(sources: list[house.Source]) -> None:
    assert not house.find_circles(house.find_imports(sources))


def test_comments_and_docstrings_are_set_alike(sources: list[house.Source]) -> None:
    """One blank after a full stop, and single backticks."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [
        (source.path, text)
        for source in sources
        for text in (
            *(ast.get_docstring(node) or "" for node in ast.walk(source.tree) if isinstance(node, documented)),
            *re.findall(r"^\s*#.*", source.text, re.MULTILINE),
        )
    ]
    assert not [(path, text) for path, text in texts if re.search(r"[.!?]  (?=\S)|(?<!`)``(?!`)[^`\n]+``(?!`)", text)]


def test_files_are_short(sources: list[house.Source]) -> None:
    assert not [source.path for source in sources if source.lines > MOST_LINES], "give a part of it a file"


def test_commands_are_more_than_their_frame(sources: list[house.Source]) -> None:
    commands = [source for source in sources if source.is_command]
    frame = sum(map(house.measure_frame, commands)) / sum(source.lines for source in commands)
    assert frame <= MOST_SKELETON, "what commands share belongs into serving/kit/command.py"


def test_readme_is_short() -> None:
    assert len((house.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README


def test_untyped_parameters_are_counted() -> None:
    text = "def f(a: int, **b: dict[str, Any]) -> None: ...\ndef g(a: Mapping[str, int]) -> None: ...\n"
    assert house.list_signatures([make_source(text)], house.UNTYPED) == ["bench/x.py:1 f"]


def test_frame_is_imports_help_and_reading_of_flags() -> None:
    text = 'import os\nEXAMPLES = """\none\n"""\nVALUE = 1\ndef main() -> int:\n    return 0\ndef work() -> None: ...\n'
    assert house.measure_frame(make_source(text)) == 1 + 3 + 2


def test_circles_are_found() -> None:
    there = make_source("from laguna_serve.bench.y import b\n")
    back = make_source("def b() -> None:\n    from laguna_serve.bench.x import a\n", "bench/y.py")
    assert house.find_circles(house.find_imports([there, back])) == [["bench/x.py", "bench/y.py"]]


def test_walks_follow_calls_by_name() -> None:
    start = make_source("from laguna_serve.bench.y import Tool\ndef go(tool: Tool) -> None:\n    tool.use()\n")
    tool = "from laguna_serve.bench import z, w\nclass Tool:\n    def use(self): z.act()\n    def rest(self): w.act()\n"
    others = [make_source(tool, "bench/y.py")]
    others += [make_source("def act(): ...\n", f"bench/{name}.py") for name in "zw"]
    assert house.Walker([start, *others]).walk("bench/x.py", "go") == {"bench/x.py", "bench/y.py", "bench/z.py"}


@pytest.mark.parametrize(
    ("walk", "visited"),
    [
        ("a gateway request", {"serving/gateway/relay/exchange.py", "serving/gateway/wire/http1.py"}),
        ("a prompt of an A/B", {"serving/client/completions.py", "serving/client/sse.py"}),
        ("a compaction", {"scripts/checkpoints/compaction/writing.py", "plugins/pruning.py"}),
    ],
)
def test_walks_come_by(walker: house.Walker, walk: str, visited: set[str]) -> None:
    assert visited <= walker.walk(*house.WALKS[walk][0])
