"""Stage 2 with weights, gradients and moments shared out among processes, and with moments of 8 bits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.optimiser import Optimiser
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import FlagError

ROOT = Path(__file__).resolve().parents[3]
# Every process trains the same student whole and in parts, and in parts with a stop in the middle.
TRAIN = """
import json, os, signal, sys, torch
from pathlib import Path
from tiny_laguna import make_config
from transformers import LagunaForCausalLM
from laguna_serve.scripts.training.dense.config import Recipe
from laguna_serve.scripts.training.dense.losses import find_top
from laguna_serve.scripts.training.dense.stages import train_student
from laguna_serve.scripts.training.dense.student import student_config
from laguna_serve.scripts.training.dense.targets import Batch
from laguna_serve.scripts.training.ranks import open_ranks
from laguna_serve.serving.kit.signals import defer_signals
folder, shown = Path(sys.argv[1]), {}
class Targets:
    stop = None
    def batch(self, step):
        if step == self.stop:
            os.kill(os.getpid(), signal.SIGINT)
        ids = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(step % 2))
        return Batch(ids, ids > 20)
    def top(self, batch, rows):
        logits = torch.randn(8, 11, 64, generator=torch.Generator().manual_seed(int(batch.ids.sum())))
        return find_top(logits[rows][batch.predicted[rows]], 8)
def fit(name, ranks, stop=None, **more):
    torch.manual_seed(0)
    student = LagunaForCausalLM(student_config(make_config(), [24, 30]))
    recipe = Recipe(seed=0, stage1_steps=1, stage2_steps=6, rows=8, length=12, warm_up=2, log_every=1, **more)
    targets, log = Targets(), []
    targets.stop = stop if ranks.first else None
    with defer_signals():
        try:
            log = train_student(student, targets, recipe, folder / name, threads=1, ranks=ranks)
        except KeyboardInterrupt:
            return None
    state = {key: value.tolist() for key, value in student.state_dict().items()}
    return {"losses": [record["loss"] for record in log], "state": state}
with open_ranks() as ranks:
    lean = {"accumulate": 2, "checkpointing": True, "logit_chunk": 5}
    for weights in ("float32", "bfloat16"):
        shown[f"whole {weights}"] = fit(f"whole-{weights}", ranks, weights=weights)
        shown[f"parts {weights}"] = fit(f"parts-{weights}", ranks, weights=weights, fsdp=True, **lean)
    shown["stopped"] = fit("stopped", ranks, stop=3, fsdp=True, **lean)
    shown["resumed"] = fit("stopped", ranks, fsdp=True, **lean)
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
shown["threads"] = [name for name in names if "gloo" in name]
(folder / f"shown-{ranks.rank}.json").write_text(json.dumps(shown))
"""


@pytest.mark.slow
def test_student_in_parts_is_the_student_that_was_whole(tmp_path: Path) -> None:
    """In fp32 to rounding, in bf16 to bf16's; what is stopped and goes on is the same to the bit."""
    (tmp_path / "train.py").write_text(TRAIN)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "train.py")]
    paths = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *torchrun, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **paths})
    assert done.returncode == 0, done.stderr[-3000:]
    shown, other = (json.loads((tmp_path / f"shown-{rank}.json").read_text()) for rank in range(2))
    assert shown["threads"] == other["threads"] == [], "the group's threads ended with it"
    assert shown["stopped"] is None
    assert shown["resumed"] == shown["parts float32"]
    for weights, tolerance in (("float32", 1e-4), ("bfloat16", 0.02)):
        whole, parts = shown[f"whole {weights}"], shown[f"parts {weights}"]
        assert parts["losses"] == pytest.approx(whole["losses"], rel=tolerance)
        assert whole["losses"][4] < whole["losses"][0], "of the same batch"
        for name, values in whole["state"].items():
            got, wanted = torch.tensor(parts["state"][name]), torch.tensor(values)
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=name)


def test_what_cannot_be_shared_out_is_refused() -> None:
    config = DistillConfig(teacher="t", out=Path("out"), layerwise=True, store=Path("store"), rows=6, fsdp=True)
    with pytest.raises(FlagError, match=r"--fsdp: expected several processes, got one; start it with torchrun"):
        config.check_processes(1)
    with pytest.raises(FlagError, match=r"--rows: expected a multiple of 4 processes with --fsdp, got 6; change it"):
        config.check_processes(4)
    config.check_processes(3)
    with pytest.raises(FlagError, match=r"--moments: expected float32 with --fsdp"):
        DistillConfig(teacher="t", out=Path("out"), fsdp=True, moments="8bit")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is here")
def test_moments_of_8_bits_without_torchao_say_what_to_do() -> None:
    with pytest.raises(CommandError, match=r"--moments 8bit: expected an environment with torchao, got none; run bash"):
        Optimiser(nn.Linear(1, 1), 0.0, "8bit")


EIGHT_BITS = """
import torch
from torch import nn
from laguna_serve.scripts.training.optimiser import Optimiser
torch.compile = lambda act, **_: act  # half a minute of compiling for nothing that is tested here
def fit(moments, steps, state=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(torch.bfloat16)
    optimiser = Optimiser(model, 0.01, moments)
    if state is not None:
        optimiser.load_state_dict(state)
    losses = []
    for step in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        optimiser.clear()
        loss = (model(x) - x).float().square().mean()
        loss.backward()
        optimiser.step(3e-3, [model])
        losses.append(loss.item())
    state = optimiser.state_dict()
    kept = sum(
        t.codes.numel() + 4 * t.scale.numel() if hasattr(t, "codes") else 4 * t.numel()
        for s in state["optimizer"]["state"].values()
        for name, t in s.items()
        if name != "step"
    )
    return losses, state, kept
wide, _, wide_bytes = fit("float32", range(60))
narrow, _, narrow_bytes = fit("8bit", range(60))
assert narrow[-1] < 0.7 * narrow[0], narrow
assert abs(narrow[-1] - wide[-1]) < 0.05 * wide[0], (narrow[-1], wide[-1])
assert narrow_bytes < 0.3 * wide_bytes, (narrow_bytes, wide_bytes)
_, half, _ = fit("8bit", range(30))
torch.save(half, "half.pt")
rest, _, _ = fit("8bit", range(30, 60), torch.load("half.pt", weights_only=True))
assert rest == narrow[30:]
"""


@pytest.mark.slow
def test_moments_of_8_bits_learn_and_are_resumed(tmp_path: Path) -> None:
    python = ROOT / ".venv-train" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-train: bash scripts/client_env.sh train")
    done = subprocess.run(
        [str(python), "-c", EIGHT_BITS], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
