"""The entry point: what it registers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_entry_point_imports_no_engine() -> None:
    loaded = run_python(
        "import sys, laguna_serve.plugins.register\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.vllm
def test_registering_twice_changes_nothing_and_imports_no_model() -> None:
    lines = run_python(
        "import sys, warnings\n"
        "from laguna_serve.plugins.register import architectures, register\n"
        "register()\n"
        "from vllm import ModelRegistry\n"
        "first = dict(ModelRegistry.models)\n"
        "register()\n"
        "print(*sorted(architectures()))\n"
        "print(all(ModelRegistry.models[a].module_name == p.split(':')[0] for a, p in architectures().items()))\n"
        "print(ModelRegistry.models.keys() == first.keys())\n"
        "models = ('vllm.model_executor.models.laguna', 'laguna_serve.plugins.models')\n"
        "print([m for m in sys.modules if m.startswith(models)])"
    ).splitlines()
    names = (
        "DFlashDraftModel DFlashLagunaForCausalLM LagunaDenseForCausalLM LagunaForCausalLM LagunaSentinelForCausalLM"
    )
    assert lines[-4:] == [names, "True", "True", "[]"]
