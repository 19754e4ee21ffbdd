"""The campaign's steps: commands that their programs take, results that are known, and the list that people read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.bench.ab import AbConfig
from laguna_serve.bench.acceptance.__main__ import AcceptanceConfig
from laguna_serve.bench.certify import CertifyConfig
from laguna_serve.bench.diffusion.run import DiffusionConfig
from laguna_serve.bench.experiments.checkpoints import write_checkpoints
from laguna_serve.bench.experiments.figures import BY_SCHEMA, extract_figures
from laguna_serve.bench.experiments.report import render_todo
from laguna_serve.bench.experiments.step import ROOT, Step, fill, list_places
from laguna_serve.bench.experiments.steps import STEPS
from laguna_serve.bench.fuzzing.options import FuzzConfig
from laguna_serve.bench.gamma.options import SweepConfig
from laguna_serve.bench.moe_layer.options import MoeConfig
from laguna_serve.bench.moe_tuning.__main__ import TuningConfig
from laguna_serve.bench.prefix.options import PrefixCacheConfig
from laguna_serve.bench.rollout.options import RolloutsConfig
from laguna_serve.bench.sampled.options import SamplingConfig
from laguna_serve.bench.swap.run import SwapConfig
from laguna_serve.scripts.generate_dense import GenerateConfig
from laguna_serve.serving.kit.flags import read_flags
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect

RESULTS = ROOT / "bench" / "results"
CONFIGS: dict[str, Any] = {
    "bench/ab.py": AbConfig,
    "bench/acceptance": AcceptanceConfig,
    "bench/certify.py": CertifyConfig,
    "bench/diffusion": DiffusionConfig,
    "bench/fuzz.py": FuzzConfig,
    "bench/gamma_sweep.py": SweepConfig,
    "bench/moe.py": MoeConfig,
    "bench/moe_tuning": TuningConfig,
    "bench/prefix_cache.py": PrefixCacheConfig,
    "bench/rollouts.py": RolloutsConfig,
    "bench/sampling.py": SamplingConfig,
    "bench/swap": SwapConfig,
    "scripts/generate_dense.py": GenerateConfig,
}
GIVEN = {"{xs2}": "org/XS2", "{xs2-draft}": "org/XS2-draft", "{xs2-pruned}": "org/XS2-10pct"}
COMMANDS = [(step, command) for step in STEPS for command in (step.command, step.rehearsal) if command]


def list_known() -> list[Path]:
    """Committed results that a step could have written."""
    found = []
    for path in sorted(RESULTS.rglob("*.json")):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and content.get("schema") in BY_SCHEMA:
            found.append(path)
    return found


@pytest.mark.parametrize(("step", "command"), COMMANDS, ids=lambda item: item.name if isinstance(item, Step) else "")
def test_command_is_one_that_its_program_takes(step: Step, command: tuple[str, ...], tmp_path: Path) -> None:
    filled = fill(command, list_places(tmp_path, tmp_path, GIVEN))
    assert not [word for word in filled if word.startswith("{") and word.endswith("}")], "an unknown placeholder"
    if filled[1] == "-m":
        assert all((ROOT / word).exists() for word in filled if word.startswith("tests/"))
        return
    assert read_flags(CONFIGS[filled[1]], filled[2:], prog=filled[1], description=None)


def test_names_are_distinct_and_a_step_is_run_or_described() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(bool(step.command) != bool(step.by_hand) for step in STEPS)
    assert all(step.estimate_s > 0 for step in STEPS if step.command)
    assert {step.row for step in STEPS} == set(range(1, 33))


def test_what_prescribes_acceptance_is_labelled() -> None:
    assert {step.name for step in STEPS if "rejection_sample_method" in str(step.command)} == {
        step.name for step in STEPS if step.synthetic
    }


def test_what_is_expected_to_fall_short_does_not_fail_the_campaign() -> None:
    """Prescribed answers, those of two models, and speculation that is expected not to pay: their commands end in 1."""
    said = {step.name for step in STEPS if "answers differ" in step.expected.replace("0 answers differ", "")}
    said |= {step.name for step in STEPS if step.synthetic or "below 1" in step.expected}
    assert {"xs2-fp8-pruned", "xs2-pruned-ab", "toy-rollouts", "xs2-synthetic-5-3"} <= said
    assert {step.name for step in STEPS if step.falls_short} == said


def test_committed_list_is_written_from_the_steps() -> None:
    again = "python bench/campaign.py --write-todo bench/results/GPU_TODO.md"
    assert (RESULTS / "GPU_TODO.md").read_text(encoding="utf-8") == render_todo(), again


@pytest.mark.parametrize("path", list_known(), ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_key_figures_of_every_committed_result(path: Path) -> None:
    schema, figures = extract_figures(path)
    assert schema == json.loads(path.read_bytes())["schema"]
    assert figures
    assert all(0 < len(line) < 400 for line in figures)


@pytest.mark.parametrize("small", [True, False], ids=["small", "full size"])
def test_checkpoints_are_taken_by_the_launcher(small: bool, tmp_path: Path) -> None:
    write_checkpoints(tmp_path, small=small)
    write_checkpoints(tmp_path, small=small)
    pair = EngineConfig(str(tmp_path / "xs2-random"), draft=str(tmp_path / "xs2-draft-random"))
    checked = inspect(pair)
    assert checked.gamma == 7
    assert checked.warnings == () or "trained for" in checked.warnings[0]
    for name in ("xs2-pruned-random", "xs2-fp8-random", "xs2-fp8-pruned-random", "dense-config"):
        assert inspect(EngineConfig(str(tmp_path / name))).target is not None
    if not small:
        assert 66.0e9 < checked.weight_bytes < 69.0e9
        weights = tmp_path / "xs2-draft-random" / "model.safetensors"
        assert weights.stat().st_blocks * 512 < 1 << 20, "a file of zeros takes no room"
