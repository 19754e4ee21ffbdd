"""Which code computes on this machine, as a JSON object on the last line of stdout; without vLLM, in seconds.

python -m laguna_serve.plugins.probes.arithmetic
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from laguna_serve import kernels, plugins
from laguna_serve.kernels import linear, sentinel_moe
from laguna_serve.kernels.isa import multiplies_bf16
from laguna_serve.kernels.linear import IsaError, choose_path, uses_linear_op
from laguna_serve.kernels.toolchain import BuildError

SOURCES = (".py", ".cpp", ".hpp", ".cu", ".json")
# What asks computes nothing that is served.
OWN = Path(__file__).resolve().parent


def describe_arithmetic() -> dict[str, str]:
    """Name of a part → what it is here."""
    shared = [f"{folder}/native" for folder in kernels.__path__]
    found = {
        "laguna-serve sources": hash_sources([*plugins.__path__, *kernels.__path__]),
        "sentinel op": f"{_find_sentinel_path()}, sources {hash_sources([*sentinel_moe.__path__, *shared])}",
        "linear op": f"{_find_linear_path()}, sources {hash_sources([*linear.__path__, *shared])}",
    }
    if torch.version.cuda is not None and torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return found | {"GPU": f"{torch.cuda.get_device_name()}, capability {capability}", "CUDA": torch.version.cuda}
    return found | {
        "torch's instruction set": torch.backends.cpu.get_cpu_capability(),
        "bf16 arithmetic": "used" if multiplies_bf16() else "not there, or not to be used",
    }


def hash_sources(folders: Iterable[str]) -> str:
    """Hash code and configuration in these folders, but for the probes: 16 digits of a SHA-256."""
    found = hashlib.sha256()
    for folder in map(Path, folders):
        paths = (path for path in folder.resolve().rglob("*") if path.suffix in SOURCES and path.parent != OWN)
        for path in sorted(paths):
            found.update(f"{path.relative_to(folder.resolve()).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _find_sentinel_path() -> str:
    if torch.version.cuda is not None and torch.cuda.is_available():
        return "Triton"
    from laguna_serve.kernels.sentinel_moe.cpu import PathError, describe

    try:
        return describe()
    except (BuildError, PathError) as error:
        return str(error)


def _find_linear_path() -> str:
    if torch.version.cuda is not None:
        return "not used"
    try:
        if not uses_linear_op():
            return "not used"
        return choose_path() if linear.load_library() is not None else "vLLM's: no C++ compiler made it"
    except IsaError as error:
        return str(error)


if __name__ == "__main__":
    print(json.dumps(describe_arithmetic()))
