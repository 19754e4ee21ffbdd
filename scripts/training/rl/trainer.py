"""The trainer's side of a GRPO run: model, optimizer, and a state to continue from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import msgspec
import torch
from transformers import AutoTokenizer, LagunaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from laguna_serve.scripts.training.pruning.streaming.layers import read_laguna
from laguna_serve.scripts.training.rl.off_policy.importance import Correction
from laguna_serve.scripts.training.rl.off_policy.mismatch import TrainerMismatch, watch_routers
from laguna_serve.scripts.training.rl.off_policy.replay import replay_experts
from laguna_serve.scripts.training.rl.policy import find_logprobs, find_loss, make_batch, write_version
from laguna_serve.scripts.training.rl.rollouts import Rollout
from laguna_serve.scripts.training.rl.steps import GrpoRun, OffPolicy, Step
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.errors import first_line
from laguna_serve.serving.kit.files import write_stream
from laguna_serve.serving.kit.results import to_json

STATE = "state.pt"
CLIP_NORM = 1.0
KEPT_FOLDERS = 2  # the version that is served, and the one before, to fall back to


@dataclass(slots=True)
class Trainer:
    """`step` gradient steps have been taken; `version` is what that state is called, `folder` where it was written.

    `drafter` is the state of a drafter that learns, as it was saved.
    """

    model: LagunaForCausalLM
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    out: Path
    correction: Correction
    decisive: GrpoRun
    step: int = 0
    folder: Path = Path()
    log: list[Step] = field(default_factory=list)
    drafter: dict[str, Any] | None = None

    @classmethod
    def open(cls, folder: Path, out: Path, lr: float, correction: Correction, decisive: GrpoRun) -> Trainer:
        """Start from a checkpoint, or where the run in `out` was saved.

        Raises:
            CheckpointError: `out` holds another run.
        """
        disable_progress_bar()
        model = LagunaForCausalLM.from_pretrained(folder, config=read_laguna(folder), dtype=torch.float32).eval()
        # The routers stay: where tokens go is not for a handful of rollouts to change.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("mlp.gate.weight"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        trainer = cls(model, optimizer, AutoTokenizer.from_pretrained(folder), out, correction, decisive)
        if (out / STATE).exists():
            state = _read_state(out / STATE)
            if state["decisive"] != _show_run(decisive):
                got = f"another run's ({_name_difference(state['decisive'], decisive)})"
                raise CheckpointError(f"{out}: expected this run's state, got {got}; choose another --out")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            trainer.step = state["step"]
            trainer.log = msgspec.json.decode(state["log"], type=list[Step])
            trainer.drafter = state.get("drafter")
        return trainer

    @property
    def version(self) -> str:
        """What the present weights are called."""
        return f"step-{self.step}"

    def learn(self, groups: Sequence[Sequence[Rollout]]) -> tuple[TrainerMismatch, OffPolicy]:
        """One step on groups of rollouts, with the experts that the engine chose where they say them.

        Returns how far trainer and engine were apart before it, and what came of that.
        """
        tokens = capped = dropped = 0
        rerouted: int | None = None
        mismatch = TrainerMismatch()
        for batch in map(make_batch, groups):
            with watch_routers(self.model) as routers, replay_experts(self.model, batch.experts) as replay:
                logprobs = find_logprobs(self.model, batch.tokens)
            loss = find_loss(logprobs, logprobs.detach(), batch, self.correction)
            loss.total.backward()
            mismatch.add(logprobs, batch, routers.find_tied(batch))
            tokens, capped, dropped = tokens + loss.tokens, capped + loss.capped, dropped + loss.dropped
            if replay.rerouted is not None:
                rerouted = (rerouted or 0) + int(replay.rerouted.sum())
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= max(tokens, 1)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return mismatch, OffPolicy(mean_nats=mismatch.mean, capped=capped, dropped=dropped, rerouted=rerouted)

    def write(self) -> tuple[Path, dict[str, str]]:
        """Write the present weights as a checkpoint; return its folder and the digests of its files. Older ones go."""
        self.folder = self.out / "served" / self.version
        digests = write_version(self.model, self.tokenizer, self.folder)
        versions = sorted(self.folder.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for old in versions[:-KEPT_FOLDERS]:
            shutil.rmtree(old)
        return self.folder, digests

    def keep(self) -> None:
        """Keep this version as a checkpoint."""
        write_version(self.model, self.tokenizer, self.out / "versions" / self.version)

    def save(self, drafter: dict[str, Any] | None = None) -> None:
        """Save everything that the run continues from."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        state |= {"log": msgspec.json.encode(self.log).decode(), "decisive": _show_run(self.decisive)}
        state |= {} if drafter is None else {"drafter": drafter}
        write_stream(self.out / STATE, lambda file: torch.save(state, file))


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        state["decisive"], state["step"], state["log"]
    except (OSError, RuntimeError, EOFError, UnpicklingError, LookupError, TypeError) as error:
        got = f"one that cannot be read ({first_line(error)})"
        raise CheckpointError(f"{path}: expected the state of a run, got {got}; choose another --out") from None
    return state


def _name_difference(begun: str, run: GrpoRun) -> str:
    """Name what another run's state was begun with, and what is asked for now."""
    before, now = json.loads(begun), to_json(run)
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, not {now.get(name)!r}" for name in names)


def _show_run(run: GrpoRun) -> str:
    return json.dumps(to_json(run), sort_keys=True)
