"""The repository's shape: packages declared, folders without __init__.py, and who may import whom."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "evals", "kernels", "plugins", "scripts", "serving")
# What a folder's code may import of the project, and what it must not import of the stack.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "plugins": {"plugins", "kernels"},
    "serving": {"serving", "plugins"},
    # An evaluation is a measurement: it shares the benchmark's client, statistics and ways of ending.
    "evals": {"evals", "bench", "serving"},
    "bench": {"bench", "serving"},
    # What is trained on is rewarded by what evaluates it.
    "scripts": {"scripts", "evals", "plugins", "kernels", "serving"},
}
# `laguna`'s own way to the tools that make checkpoints, imported when one of them is called.
MAY_REACH_UP = {"serving/commands/checkpoint_tools.py": {"scripts"}}
HTTP_ONLY = {"serving", "evals", "bench"}
# The ground floor of serving, which the rest of it and all the others stand on.
GROUND_FLOOR = ("serving/machine", "serving/kit", "serving/client", "serving/checkpoint")
# Modules that stand on nothing of ours, which a folder may use though they are not below it: names of layer kinds, of
# formats and of instruction sets, without an import of the stack; and how much memory is free.
LEAVES = {
    "serving": (
        "laguna_serve.plugins.layers",
        "laguna_serve.plugins.formats.experts",
        "laguna_serve.plugins.formats.sequential_head",
        "laguna_serve.kernels.isa",
    ),
    "plugins": ("laguna_serve.serving.machine.memory",),
}
# Each has one home: exit statuses, progress, whole files, the palette of figures, and so on.
HOMES = {
    r"^HELD\b.*=": "serving/kit/cli.py",
    r"^class \w*Progress\b": "serving/kit/progress.py",
    r"os\.fsync\(": "serving/kit/files.py",
    r"^class EndpointError\b": "serving/client/errors.py",
    r"^class SseParser\b": "serving/client/sse.py",
    r"text_string_to_metric_families\(": "serving/client/exposition.py",
    r"^INK\b": "serving/kit/figures.py",
    r"mpl\.use\(": "serving/kit/figures.py",
    r"^def read_environment\b": "serving/kit/environment.py",
    r"^class Journal\(": "serving/kit/journal.py",
    r"^class Table\b": "serving/kit/tables.py",
}
# Child processes, whose lines their parents read; and a log of the gateway's.
PRINT_JSON = {
    *("plugins/probes/arithmetic.py", "scripts/clients/sdks.py", "serving/machine/rates.py"),
    *("serving/gateway/relay/shadow.py", "serving/kit/cli.py"),
}
MOST_FILES = 12
# Rooms from the ground up: one may use those before it.
ROOMS = {
    "serving": (
        *("machine", "kit", "client", "checkpoint", "chat", "speculation", "planning", "supervision", "engine"),
        *("gateway", "service", "cluster", "commands"),
    ),
    "serving/gateway": (
        "config",
        "wire",
        "telemetry",
        "access",
        "engines",
        "counts",
        "residence",
        "relay",
        "traces",
        "clients",
        "workers",
        "admin",
    ),
    "scripts": ("text", "checkpoints", "training", "clients", "frontier", "insights", "grpo_arms", "dante"),
}
# A file that a docstring names, and what says, in the same paragraph, that it is another program's.
FILE = re.compile(r"(?<![\w/.{-])((?:[\w-]+/)*[\w-]+\.py)\b")
OTHERS = re.compile(r"vllm|transformers|torch|TRL|compressed-tensors|LLaDA|traceback", re.IGNORECASE)
COMMANDS = ("bench", "evals", "scripts")
# The gateway's are in its room `clients`.
LOOSE = {("serving/gateway/relay/relay.py", "answer.py"), ("serving/gateway/relay/relay.py", "asgi.py")}
MODULE = re.compile(r"laguna_serve((?:\.[a-z_]\w*)+)(?:[.:][A-Z]\w*)?")
# Benchmarks of a kernel, or of a decode that has no server in between, call it in their own process.
KERNEL_BENCHMARKS = {
    *("bench/diffusion/arms.py", "bench/diffusion/run.py", "bench/exactness/__main__.py"),
    *("bench/linear/timing.py", "bench/moe.py", "bench/moe_layer/layers.py", "bench/moe_layer/timing.py"),
    *("bench/moe_tuning/__main__.py", "bench/moe_tuning/measure.py", "bench/moe_tuning/space.py"),
}
# It asks every command for its flags.
REFERENCE = "scripts/reference.py"
HEAVY = {"torch", "vllm", "transformers", "triton"}


@cache
def sources(folder: str) -> tuple[Path, ...]:
    """A folder's modules, without those of a distribution of its own (evals/spec_rl)."""
    others = {path.parent for path in (ROOT / folder).rglob("pyproject.toml")}
    return tuple(sorted(path for path in (ROOT / folder).rglob("*.py") if not others & set(path.parents)))


@cache
def read_names(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Every module that a file imports, anywhere in it, by its full name; and every one that it names in a string."""
    names: set[str] = set()
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports, got a relative one"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (m := MODULE.fullmatch(node.value)):
            named.add(m[1].removeprefix("."))
    return frozenset(names), frozenset(named)


def imported(path: Path) -> frozenset[str]:
    return read_names(path)[0]


def is_of(name: str, modules: Sequence[str]) -> bool:
    """Whether a name is one of the modules, or in one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def is_kernel_benchmark(path: Path) -> bool:
    return path.relative_to(ROOT).as_posix() in KERNEL_BENCHMARKS


def test_declared_packages_are_the_folders_with_code() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = {
        ".".join(["laguna_serve", *path.parent.relative_to(ROOT).parts])
        for folder in FOLDERS
        for path in sources(folder)
    }
    assert set(declared) == present, (
        "a wheel leaves out what is not declared; a package without a folder does not install"
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_folder_has_no_init(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), "it would shadow distributions of the same name"


@pytest.mark.parametrize("folder", FOLDERS)
def test_subfolders_with_code_are_packages(folder: str) -> None:
    for path in sources(folder):
        if path.parent != ROOT / folder:
            assert (path.parent / "__init__.py").exists(), f"{path.parent}: expected an __init__.py"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_keep_their_direction(folder: str) -> None:
    leaves = LEAVES.get(folder, ())
    for path in sources(folder):
        found = {name for name in imported(path) if name.startswith("laguna_serve.") and not is_of(name, leaves)}
        ours = {name.split(".")[1] for name in found}
        if is_kernel_benchmark(path):
            ours -= {"kernels", "plugins"}
        allowed = MAY_IMPORT[folder] | MAY_REACH_UP.get(path.relative_to(ROOT).as_posix(), set())
        if path == ROOT / REFERENCE:
            ours -= {"bench"}
        assert ours <= allowed, f"{path}: imports {sorted(ours - allowed)}"


def test_nothing_but_the_command_line_stands_on_commands() -> None:
    """So that what a command reaches up for is not below anything."""
    commands = "laguna_serve.serving.commands"
    for path in (path for top in FOLDERS for path in sources(top)):
        own = path.relative_to(ROOT).as_posix()
        if own != "serving/cli.py" and not own.startswith("serving/commands/"):
            assert not any(name.startswith(commands) for name in imported(path)), f"{path}: imports {commands}"


@pytest.mark.parametrize("folder", sorted(HTTP_ONLY))
def test_http_side_imports_no_engine(folder: str) -> None:
    for path in sources(folder):
        if is_kernel_benchmark(path):
            continue
        heavy = {name.split(".")[0] for name in imported(path)} & HEAVY
        assert not heavy, f"{path}: imports {sorted(heavy)}; speak HTTP, or ask in a subprocess"


@pytest.mark.parametrize("leaf", sorted({leaf for leaves in LEAVES.values() for leaf in leaves}))
def test_leaves_stand_on_leaves(leaf: str) -> None:
    path = ROOT.joinpath(*leaf.split(".")[1:]).with_suffix(".py")
    own = {name for name in imported(path) if name.startswith("laguna_serve.")}
    assert all(is_of(name, LEAVES["serving"]) for name in own)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_shadows_the_standard_library(folder: str) -> None:
    for path in sources(folder):
        assert path.stem not in sys.stdlib_module_names, f"{path}: breaks `python {folder}/…`, whose folder comes first"


@pytest.mark.parametrize("folder", GROUND_FLOOR)
def test_ground_floor_imports_nothing_above_it(folder: str) -> None:
    ground = tuple(f"laguna_serve.{name.replace('/', '.')}" for name in GROUND_FLOOR)
    for path in sources(folder):
        above = {
            name
            for name in imported(path)
            if name.startswith("laguna_serve.") and not name.startswith(ground) and not is_of(name, LEAVES["serving"])
        }
        assert not above, f"{path}: imports {sorted(above)}"


@pytest.mark.parametrize(("house", "room"), [(house, room) for house, rooms in ROOMS.items() for room in rooms])
def test_rooms_import_nothing_above_them(house: str, room: str) -> None:
    own = f"laguna_serve.{house.replace('/', '.')}."
    below = tuple(f"{own}{name}." for name in ROOMS[house][: ROOMS[house].index(room) + 1])
    for path in sources(f"{house}/{room}"):
        above = {name for name in imported(path) if name.startswith(own) and not name.startswith(below)}
        assert not above, f"{path}: imports {sorted(above)}"


@pytest.mark.parametrize("house", ROOMS)
def test_every_room_has_its_floor(house: str) -> None:
    assert {path.parent.name for path in (ROOT / house).glob("*/__init__.py")} == set(ROOMS[house])


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_that_are_named_in_strings_are_there(folder: str) -> None:
    for path in sources(folder):
        for name in read_names(path)[1]:
            module = ROOT.joinpath(*name.split("."))
            there = module.with_suffix(".py").exists() or (module / "__init__.py").exists()
            assert there, f"{path}: names laguna_serve.{name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_that_docstrings_name_are_there(folder: str) -> None:
    """From the module's own folder, or from one above it; a command by its name alone."""
    wrong = []
    for path in sources(folder):
        own = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                for named in [] if OTHERS.search(paragraph) else FILE.findall(paragraph):
                    homes = [*own.parents, *map(Path, COMMANDS)]
                    if (own.as_posix(), named) not in LOOSE and not any((ROOT / at / named).exists() for at in homes):
                        wrong.append(f"{own} {getattr(node, 'name', '')}: {named}")
    assert not wrong


@pytest.mark.parametrize("pattern", HOMES)
def test_what_all_share_exists_once(pattern: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in sources(folder)
        if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == {HOMES[pattern]}


def test_results_are_printed_by_the_kit() -> None:
    """So that all commands agree on when the line for programs is there, and on what `--json` means."""
    printing = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in sources(folder)
        if "print(json.dumps(" in path.read_text(encoding="utf-8")
    }
    assert printing == PRINT_JSON


def test_folders_are_not_crowded() -> None:
    files = Counter(path.parent for top in FOLDERS for path in sources(top) if path.name != "__init__.py")
    crowded = [folder.relative_to(ROOT).as_posix() for folder, count in files.items() if count > MOST_FILES]
    assert not crowded, f"more than {MOST_FILES} files: give them a room"


def test_names_of_test_files_are_unique() -> None:
    """Pytest imports them by name alone: of two with one name it takes the first, and ends with an error."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
