"""Compiles the kernels' C++ with a check of their own, without torch, to be run natively or by an emulator."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from laguna_serve.kernels.linear import build as linear
from laguna_serve.kernels.sentinel_moe import build as sentinel

HERE = Path(__file__).parent
# The files of the sentinel op that need no torch.
UNITS = ("driver", "pairs", "paths")


def compile_sentinel(compiler: str, machine: str, folder: Path, *link: str) -> Path:
    """Compile every path of a machine and native_check.cpp. Raises CalledProcessError."""
    flags: Mapping[str, Sequence[str]] = {**sentinel.PATHS[machine], **sentinel.PORTABLE, **dict.fromkeys(UNITS, ())}
    commands = [(sentinel.SOURCES / f"{name}.cpp", (*sentinel.STRICT, *own)) for name, own in flags.items()]
    commands.append((HERE / "native_check.cpp", ("-std=c++17", "-O1", f"-I{sentinel.SOURCES}")))
    return compile_program(compiler, commands, folder, link)


def compile_linear(compiler: str, path: str, folder: Path, *link: str) -> Path:
    """Compile a path of the linear product and linear_check.cpp. Raises CalledProcessError."""
    flags = (*(flag for flag in linear.FLAGS if flag != "-shared"), *linear.PATH_FLAGS[path])
    commands = [(linear.find_source(path), flags), (HERE / "linear_check.cpp", ("-std=c++17", "-O2"))]
    return compile_program(compiler, commands, folder, ("-fopenmp", *link))


def compile_program(
    compiler: str, commands: Sequence[tuple[Path, Sequence[str]]], folder: Path, link: Sequence[str] = ()
) -> Path:
    """Compile files, each with its flags, two at a time, and link them. Raises CalledProcessError."""
    program = folder / "check"

    def compile_one(command: tuple[Path, Sequence[str]]) -> str:
        source, flags = command
        made = str(folder / f"{source.stem}.o")
        subprocess.run([compiler, *flags, "-w", "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compile_one, commands))
    subprocess.run([compiler, *made, *link, "-o", str(program)], check=True)
    return program


def run_check(*command: str | Path) -> str:
    """Run a check, which must hold; returns what it printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout
