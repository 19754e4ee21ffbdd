"""Write docs/reference: every command's flags, the gateway's configuration and metrics, and the schemas of results.

What is written comes from the code: `--help` of each command, the configuration's and the results' types, the metrics'
own registry. A test fails when a page is not what this would write.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric

from laguna_serve.plugins.adaptive.counters import SIZE, CounterCollector, Counters
from laguna_serve.serving import cli
from laguna_serve.serving.gateway.access.keyring import Keyring
from laguna_serve.serving.gateway.access.ledger import Ledger
from laguna_serve.serving.gateway.config import Config
from laguna_serve.serving.gateway.relay.shadow import register_outcomes
from laguna_serve.serving.gateway.residence.model import OwnedModel, State, Terms
from laguna_serve.serving.gateway.telemetry.exposition import LENGTH, LENGTH_TEXT
from laguna_serve.serving.gateway.telemetry.keys import KeyMetrics
from laguna_serve.serving.gateway.telemetry.metrics import Metrics
from laguna_serve.serving.gateway.telemetry.owned import OwnedMetrics
from laguna_serve.serving.gateway.traces.recorder import TraceRecorder
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, run_command
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, read_flags
from laguna_serve.serving.kit.results import JsonObject

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "reference"
COLUMNS = "100"
COMMAND = r"^    (\w+)  "
FAMILIES = {
    "bench": ("Benchmarks", "Measure, compare and certify engines; each needs `.venv` of scripts/bootstrap.sh."),
    "evals": ("Evaluations", "Code, loss, invariance, references and the standard suites."),
    "scripts": ("Making and training", "The toy family, students, pruning scores, reinforcement learning."),
}
# Commands that lie deeper than a folder of a family.
DEEPER = {
    "scripts": (
        "training/dense/experiments",
        "training/diffusion/calibrate.py",
        "training/diffusion/distil.py",
        "training/diffusion/prune.py",
        "training/diffusion/toy.py",
    )
}
# vLLM's that serving/deploy shows.
ENGINE_METRICS = {
    "vllm:num_requests_waiting": "Requests that wait in an engine.",
    "vllm:kv_cache_usage_perc": "Share of its KV cache that is in use, 0 to 1.",
}
EXAMPLES = """
examples:
  python scripts/reference.py            # write the pages
  python scripts/reference.py --check    # exit status 1 when one of them is out of date
"""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What to do with the pages."""

    check: Annotated[bool, Flag("only say which pages are out of date")] = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config = read_flags(ReferenceConfig, argv, prog="scripts/reference.py", description=__doc__, epilog=EXAMPLES)

    def run() -> int:
        pages = dict(write_pages())
        stale = [name for name, text in pages.items() if _read(PAGES / name) != text]
        stale += [name for name in _list_written() if name not in pages]
        if config.check:
            for name in stale:
                print(f"docs/reference/{name}: out of date; run scripts/reference.py")
            return FELL_SHORT if stale else HELD
        for name in stale:
            if name in pages:
                (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
                write_text(PAGES / name, pages[name])
            else:
                (PAGES / name).unlink()
            print(f"docs/reference/{name}")
        return HELD

    return run_command("reference.py", run)


def write_pages() -> Iterator[tuple[str, str]]:
    """(name below docs/reference, text) of every page."""
    os.environ["COLUMNS"] = COLUMNS  # argparse asks for it
    yield "laguna.md", write_commands("laguna", "The installed command.", list_subcommands())
    for folder, (title, text) in FAMILIES.items():
        yield f"{folder}.md", write_commands(title, text, list_commands(folder))
    yield "configuration.md", write_configuration()
    yield "metrics.md", write_metrics()
    schemas = dict(list_schemas())
    for name, schema in schemas.items():
        yield f"schemas/{name}.json", json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
    yield "index.md", write_index(sorted(schemas))


def list_subcommands() -> Iterator[tuple[str, str]]:
    """(name, help) of `laguna` and its subcommands."""
    front = _ask()
    yield "laguna", front
    for name in re.findall(COMMAND, front, re.MULTILINE):
        said = _ask(name)
        yield f"laguna {name}", said
        if "  COMMAND\n" in said:
            for tool in re.findall(COMMAND, said, re.MULTILINE):
                yield f"laguna {name} {tool}", _ask(name, tool)


def list_commands(folder: str) -> Iterator[tuple[str, str]]:
    """(path, help) of the commands that are files of a folder, or folders in it."""
    modules = {path.name: f"{folder}.{path.stem}" for path in (ROOT / folder).glob("*.py")}
    modules |= {
        path.parent.name: f"{folder}.{path.parent.name}.__main__" for path in (ROOT / folder).glob("*/__main__.py")
    }
    for name in DEEPER.get(folder, ()):
        dotted = name.removesuffix(".py") if name.endswith(".py") else f"{name}/__main__"
        modules[name] = f"{folder}/{dotted}".replace("/", ".")
    for name, dotted in sorted(modules.items()):
        module = importlib.import_module(f"laguna_serve.{dotted}")
        if hasattr(module, "main"):
            yield f"python {folder}/{name}", _help(lambda module=module: module.main(["--help"]))  # type: ignore[misc]
            for tool in getattr(module, "COMMANDS", ()):
                said = _help(lambda module=module, tool=tool: module.main([tool, "--help"]))  # type: ignore[misc]
                yield f"python {folder}/{name} {tool}", said


def write_commands(title: str, text: str, commands: Iterator[tuple[str, str]]) -> str:
    """Write a page of `--help`s."""
    parts = [f"# {title}", text, *(f"## {name}\n\n```text\n{said}```" for name, said in commands)]
    return "\n\n".join(parts) + "\n"


def write_configuration() -> str:
    """Write a table per part of gateway.toml."""
    schema = Config.model_json_schema()
    parts = [
        "# gateway.toml",
        "Every key of the gateway's configuration. `laguna gateway --example` prints a file that has each of them with"
        " its default.",
    ]
    for name, table in {"(top level)": schema, **schema["$defs"]}.items():
        if table.get("type") != "object":
            continue
        required = set(table.get("required", ()))
        rows = [
            f"| `{key}` | {_cell(_show_type(field))} | {_cell(_show_default(field, key in required))} |"
            for key, field in table["properties"].items()
        ]
        about = " ".join(table.get("description", "").split())
        parts.append("\n".join([f"## {name}", "", about, "", "| key | value | default |", "|--|--|--|", *rows]))
    return "\n\n".join(parts) + "\n"


def write_metrics() -> str:
    """Write tables of what /metrics has of the gateway's own, and of the engines' what is ours or used by ours."""
    text = (
        "What `/metrics` of the gateway has of its own, beside `laguna_gateway_process_*`; the engines' own metrics"
        " follow, with the labels `model` and `upstream`. A counter's samples end in `_total`. Those of models"
        " (`laguna_gateway_model_*`) are there where the gateway has engines of its own."
    )
    head = ["", "| metric | type | what |", "|--|--|--|"]
    ours = "What our plugins add to an engine's, with `--gamma adaptive` on a CPU:"
    deploy = "Of the engines' own, the dashboard and the alert rules in `serving/deploy` use these:"
    engines = [f"| `{name}` | gauge | {about} |" for name, about in ENGINE_METRICS.items()]
    parts = [text, *head, *_list_rows(collect_gateway()), "", ours, *head, *_list_rows(collect_engine())]
    return "\n".join(["# Metrics", "", *parts, "", deploy, *head, *engines]) + "\n"


def collect_gateway() -> Iterator[Metric]:
    """Yield the families of every collector of a gateway's, and what it works out of its engines' counters."""
    metrics = Metrics()
    registry = metrics.registry
    registry.register(KeyMetrics(Keyring(Ledger())))
    registry.register(OwnedMetrics({"model": OwnedModel("model", Terms())}, [state.value for state in State]))
    TraceRecorder(None, registry)
    register_outcomes(registry)
    yield from (family for family in registry.collect() if not family.name.startswith("laguna_gateway_process_"))
    yield GaugeMetricFamily(LENGTH, LENGTH_TEXT)


def collect_engine() -> Iterator[Metric]:
    """Yield the families that our plugins add to an engine's."""
    yield from CounterCollector(Counters(mmap.mmap(-1, SIZE))).collect()


def _list_rows(families: Iterable[Metric]) -> list[str]:
    return [f"| `{family.name}` | {family.type} | {_cell(family.documentation)} |" for family in families]


def list_schemas() -> Iterator[tuple[str, JsonObject]]:
    """(file name, JSON Schema) of every result type of the commands that were imported, and of `laguna`'s."""
    for name in (
        "serving.cli",
        *(f"scripts.checkpoints.{name}" for name in ("compact", "unpad", "quantise", "drafter")),
    ):
        importlib.import_module(f"laguna_serve.{name}")
    importlib.import_module("laguna_serve.scripts.training.drafter.command")
    for name in ("experiments.result", "plan.page", "store.format"):
        importlib.import_module(f"laguna_serve.scripts.training.dense.{name}")
    importlib.import_module("laguna_serve.serving.client.traffic")
    importlib.import_module("laguna_serve.serving.service.deployment")  # of laguna doctor, which imports it when asked
    importlib.import_module("laguna_serve.scripts.clients.report")  # of a command that is a shell script
    kinds = {kind.__struct_config__.tag: kind for kind in _list_structs(msgspec.Struct)}
    for tag in sorted(str(tag) for tag in kinds if str(tag).startswith("laguna_serve.")):
        name, _, version = tag.removeprefix("laguna_serve.").partition("/")
        yield f"{name}-{version}", msgspec.json.schema(kinds[tag])


def write_index(schemas: Sequence[str]) -> str:
    """Write the page that leads to the others."""
    lines = [
        "# Reference",
        "",
        "Generated from the code by `scripts/reference.py`.",
        "",
        "| what | page |",
        "|--|--|",
        "| the installed command | [laguna](laguna.md) |",
        *(f"| {text} | [{title}]({folder}.md) |" for folder, (title, text) in FAMILIES.items()),
        "| the gateway's file | [gateway.toml](configuration.md) |",
        "| the gateway's numbers | [metrics](metrics.md) |",
        "",
        "JSON Schemas of result files, by their `schema` key:",
        "",
        *(f"- [{name}](schemas/{name}.json)" for name in schemas),
    ]
    return "\n".join(lines) + "\n"


def _ask(*arguments: str) -> str:
    return _help(lambda: cli.main([*arguments, "--help"]))


def _help(call: Callable[[], object]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        call()
    return _tidy(said.getvalue())


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _list_structs(kind: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    for below in kind.__subclasses__():
        yield below
        yield from _list_structs(below)


def _list_written() -> list[str]:
    return [path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*") if path.is_file()]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _show_type(field: JsonObject) -> str:
    if "anyOf" in field:
        return " or ".join(_show_type(part) for part in field["anyOf"] if part.get("type") != "null")
    if "$ref" in field:
        return f"table [{field['$ref'].rpartition('/')[2]}](#{field['$ref'].rpartition('/')[2].lower()})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_show_type(field['items'])}" if "items" in field else "list"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:,}" for name, sign in bounds.items() if name in field]
    return " ".join([str(field.get("type", "any")), *limits])


def _show_default(field: JsonObject, required: bool) -> str:
    if required:
        return "required"
    default = field.get("default")
    return "none" if default is None else f"`{json.dumps(default)}`" if not isinstance(default, dict) else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
