"""Every import is declared in pyproject.toml, by the list of the role that needs it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Which optional lists a folder's code may rely on, besides the dependencies of all.
ROLES = {
    "serving": {"gpu", "ray", "tracing"},
    "plugins": {"gpu", "quantised", "train"},
    "kernels": {"train"},
    "bench": {"bench", "gpu", "ray", "train"},
    "evals": {"evals"},
    "scripts": {"train", "gpu"},
}
# Of what several roles share, the part that only one of them imports.
SHARED = {"serving/kit/figures.py": {"bench"}, "serving/client/openai_endpoint.py": {"evals"}}
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "markdown_it": "markdown-it-py",
    "opentelemetry": "opentelemetry-sdk",
    "prometheus_client": "prometheus-client",
    "pydantic_core": "pydantic",
    "pynvml": "nvidia-ml-py",
    "python_multipart": "python-multipart",
}
# Several distributions with one name to import: whoever imports it needs both of ours.
TOGETHER = {"opentelemetry-exporter-otlp-proto-http": "opentelemetry-sdk"}
# vLLM's own; and the clients that scripts/clients.sh tries have an environment and a list of their own.
WITH_VLLM = {"huggingface-hub", "numba", "tokenizers", "torch", "triton", "transformers", "vllm"}
CLIENTS = "scripts/clients/"


def list_imports(path: Path) -> set[str]:
    """Top-level names of what a file imports, anywhere in it, that are neither ours nor the standard library's."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"laguna_serve"}


def list_declared(roles: set[str]) -> set[str]:
    """Distributions of the dependencies of all and of some roles."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][role] for role in roles)]
    return {re.split(r"[\[<>=~! ]", item)[0] for items in lists for item in items}


@pytest.mark.parametrize("folder", ROLES)
def test_every_import_is_declared(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith((CLIENTS, "evals/spec_rl/")):
            continue
        declared = list_declared(ROLES[folder] | SHARED.get(relative, set())) | (
            WITH_VLLM if "gpu" in ROLES[folder] or folder == "kernels" else set()
        )
        missing = {DISTRIBUTIONS.get(name, name) for name in list_imports(path)} - declared
        assert not missing, (
            f"{relative}: imports {sorted(missing)}, which pyproject.toml declares for no role of {folder}/"
        )


def test_everything_declared_is_imported() -> None:
    imported = {
        DISTRIBUTIONS.get(name, name)
        for folder in ROLES
        for path in (ROOT / folder).rglob("*.py")
        for name in list_imports(path)
    }
    roles = set(PROJECT["optional-dependencies"]) - {"cpu", "all"}
    unused = {TOGETHER.get(name, name) for name in list_declared(roles)} - imported
    assert not unused, f"pyproject.toml declares {sorted(unused)}, which nothing imports"


def test_all_is_every_role() -> None:
    listed = re.findall(r"laguna-serve\[([\w,]+)\]", PROJECT["optional-dependencies"]["all"][0])
    assert set(listed[0].split(",")) == set(PROJECT["optional-dependencies"]) - {"cpu", "gpu", "all"}
