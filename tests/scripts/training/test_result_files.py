"""Every committed result of the training commands is read by its type, and written back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from laguna_serve.scripts.clients.report import ClientsResult
from laguna_serve.scripts.dante.toy import DanteToyResult
from laguna_serve.scripts.distill_dense import DistillResult
from laguna_serve.scripts.frontier.result import FrontierResult
from laguna_serve.scripts.make_toy import ToyManifest
from laguna_serve.scripts.training.dense.experiments.result import DenseExperiments
from laguna_serve.scripts.training.pruning.artefacts import ScoresManifest
from laguna_serve.scripts.training.pruning.curve import CurveResult
from laguna_serve.scripts.training.rl.run import GrpoResult
from laguna_serve.serving.kit.results import read_result, to_json

ROOT = Path(__file__).resolve().parents[3]
FILES: dict[str, type[msgspec.Struct]] = {
    "bench/results/clients.json": ClientsResult,
    "bench/results/clients-swapped.json": ClientsResult,
    "bench/results/toy-distillation/distillation.json": DistillResult,
    "bench/results/toy-dante/dante-toy.json": DanteToyResult,
    "bench/results/toy-dante-600/dante-toy.json": DanteToyResult,
    **{f"bench/results/toy-dense-experiments/seed-{seed}.json": DenseExperiments for seed in range(3)},
    **{f"bench/results/toy-grpo/seed-{seed}.json": GrpoResult for seed in range(3)},
    "bench/results/toy-pruning-frontier/frontier.json": FrontierResult,
    "bench/results/toy-pruning-loss/curve.json": CurveResult,
    "tests/toy/MANIFEST.json": ToyManifest,
    "tests/toy/dense/MANIFEST.json": DistillResult,
    "tests/toy/masks/MANIFEST.json": ScoresManifest,
}


@pytest.mark.parametrize("name", FILES)
def test_committed_file_is_its_type(name: str) -> None:
    written, read = json.loads((ROOT / name).read_text()), read_result(ROOT / name, FILES[name])
    again = json.loads(json.dumps(to_json(read)))
    if "environment" in again:  # which later results say more of
        again["environment"] = {key: again["environment"][key] for key in written["environment"]}
    assert again == written
    assert list(again) == list(written), "in the order in which it is written"
