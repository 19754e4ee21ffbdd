"""Real engines: a sound pair is certified, and each planted defect is called one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from laguna_serve.bench import certify

pytestmark = pytest.mark.vllm

TOY = Path(__file__).resolve().parents[2] / "toy"
SIZE = ["--num-prompts", "16", "--max-tokens", "32", "--concurrency", "1,3", "--eager"]
FLAGS = [
    "--model",
    str(TOY / "teacher"),
    "--draft",
    str(TOY / "dflash"),
    "--prompts",
    str(TOY / "prompts.jsonl"),
    *SIZE,
]
# What of a certificate does not depend on the candidate.
SHARED = ("baseline*", "again*", "row-matched*")

# A plugin of vLLM's that plants a defect in engines with a trained drafter; the row-matched control's is left alone.
# It does so when the sampler is made, in whatever other plugins have made of it by then.
PLANT = """
from vllm.v1.sample import rejection_sampler


def register():
    make = rejection_sampler.RejectionSampler.__init__

    def note(self, sampler, spec_config=None, *more, **named):
        make(self, sampler, spec_config, *more, **named)
        if spec_config is not None and "random-drafter" not in spec_config.model:
            plant(self)

    rejection_sampler.RejectionSampler.__init__ = note


DEFECT
"""
# Draft i is held against what the target says of position i + 1, and so is what is reported of it.
OFF_BY_ONE = """
def plant(sampler):
    forward = sampler.forward

    def verify(metadata, *more, **named):
        metadata.target_logits_indices = metadata.target_logits_indices + 1
        return forward(metadata, *more, **named)

    sampler.forward = verify
"""
# Every 40th drafted token is accepted whatever the target says.
NOT_THE_ARGMAX = """
def plant(sampler):
    judge, seen = rejection_sampler.rejection_sample, iter(range(1, 1 << 30))

    def accept(draft_token_ids, num_draft_tokens, max_spec_len, cu, draft_probs, target_logits, *more, **named):
        for row, token in enumerate(draft_token_ids.tolist()):
            if next(seen) % 40 == 0:
                target_logits[row, token] = target_logits[row].max() + 1
        return judge(draft_token_ids, num_draft_tokens, max_spec_len, cu, draft_probs, target_logits, *more, **named)

    rejection_sampler.rejection_sample = accept
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The certificate of the sound pair: its folder, its result."""
    out = tmp_path_factory.mktemp("sound")
    assert certify.main([*FLAGS, "--out", str(out)]) == 0
    return out, json.loads((out / "certificate.json").read_text())


def certify_like(sound: tuple[Path, dict[str, Any]], out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Certify another candidate against the passes that the sound pair's baseline and controls made."""
    (out / "passes").mkdir(parents=True)
    for pattern in SHARED:
        for path in (sound[0] / "passes").glob(pattern):
            shutil.copyfile(path, out / "passes" / path.name)
    status = certify.main([*FLAGS, "--no-locate", "--out", str(out), *more])
    return status, json.loads((out / "certificate.json").read_text())


def test_sound_pair_is_certified(sound: tuple[Path, dict[str, Any]]) -> None:
    result = sound[1]
    assert result["verdict"] in ("identical", "equal up to ties")
    assert result["arms"]["candidate"]["acceptance"] > 2
    assert result["arms"]["row-matched"]["acceptance"] < 1.1
    for load in result["loads"]:
        assert not load["drift"]["drifts"]
        assert load["candidate"]["tokens"] == 16 * 32


def test_one_weight_off_is_a_defect(sound: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(TOY / "teacher", wrong)
    path = wrong / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 5] *= -1  # one sign of 6 million weights
    save_file(tensors, path, {"format": "pt"})
    status, result = certify_like(sound, tmp_path / "out", "--candidate-model", str(wrong), "--no-replay")
    assert (status, result["verdict"]) == (1, "defect")
    assert any("drift" in reason or "differ beyond rounding" in reason for reason in result["reasons"])


def test_off_by_one_position_is_a_defect(
    sound: tuple[Path, dict[str, Any]], tmp_path: Path, plant: Callable[[str], None]
) -> None:
    plant(PLANT.replace("DEFECT\n", OFF_BY_ONE))
    status, result = certify_like(sound, tmp_path / "out")
    assert (status, result["verdict"]) == (1, "defect")
    assert any("differ beyond rounding" in reason for reason in result["reasons"])
    # The exact model sides with the baseline.
    assert result["replay"]["baseline"] > 10 * max(1, result["replay"]["candidate"])


def test_accepted_token_that_was_not_the_argmax_is_a_defect(
    sound: tuple[Path, dict[str, Any]], tmp_path: Path, plant: Callable[[str], None]
) -> None:
    plant(PLANT.replace("DEFECT\n", NOT_THE_ARGMAX))
    status, result = certify_like(sound, tmp_path / "out", "--no-replay")
    assert (status, result["verdict"]) == (1, "defect")
    assert any("own log-probabilities do not put first" in reason for reason in result["reasons"])
