"""Levers on top of speculation: each with γ*, against its own plain decoding and against the plain target."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laguna_serve.bench.gamma.points import make_config, measure_point
from laguna_serve.bench.harness.arms import Arm, ArmSpec, open_arm
from laguna_serve.bench.harness.runner import MeasurementStoppedError
from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.kit.files import write_json
from laguna_serve.serving.kit.progress import Progress

PLAIN = "plain"
FLAGS = {
    "fp8-kv": ("--kv-cache-dtype", "fp8"),
    "chunked-prefill": ("--enable-chunked-prefill", "--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
}


@dataclass(frozen=True, slots=True)
class Lever:
    """`name`, and of the levers that are another checkpoint its path."""

    name: str
    checkpoint: str | None = None

    def apply(self, config: EngineConfig) -> EngineConfig:
        """The engine with this lever pulled."""
        if self.checkpoint is not None:
            return replace(config, model=self.checkpoint)
        if self.name == "prefix-caching":
            return replace(config, prefix_caching=True)
        return replace(config, extra_args=FLAGS[self.name])


def parse_lever(text: str) -> Lever:
    """`fp8-kv`, `prefix-caching`, `chunked-prefill`, `pruned=CHECKPOINT` or `dense=CHECKPOINT`."""
    name, given, checkpoint = text.partition("=")
    if name in ("pruned", "dense") and checkpoint:
        return Lever(name, checkpoint)
    if name in (*FLAGS, "prefix-caching") and not given:
        return Lever(name)
    expected = "fp8-kv, prefix-caching, chunked-prefill, pruned=CHECKPOINT or dense=CHECKPOINT"
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def measure_levers(
    args: argparse.Namespace, gamma: int, prompts: list[Prompt], folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Every lever of `args.stack` at concurrency 1; one that fails is told so and does not lose the others.

    Raises:
        EngineError, EndpointError: the plain target, with which all are compared, could not be asked.
    """
    plain = _load(folder, PLAIN, gamma)
    if plain is None:
        spec = ArmSpec(PLAIN, f"{args.model}; no drafter", config=make_config(args, None))
        with open_arm(spec, folder, progress.say) as arm:
            plain = {"gamma": gamma, **asyncio.run(_ask(arm, prompts[: args.num_prompts], args.max_tokens))}
        write_json(_place(folder, PLAIN), plain)
    return [_measure_lever(args, lever, gamma, prompts, plain, folder, progress) for lever in args.stack]


def list_lever_specs(args: argparse.Namespace, gamma: int) -> list[ArmSpec]:
    """The engines of every lever at a γ."""
    return [spec for lever in args.stack for spec in _make_specs(args, lever, gamma)]


def _make_specs(args: argparse.Namespace, lever: Lever, gamma: int) -> list[ArmSpec]:
    return [
        ArmSpec(arm, f"{lever.name}; γ {tokens or 0}", config=lever.apply(make_config(args, tokens)))
        for arm, tokens in ((BASELINE, None), (CANDIDATE, gamma))
    ]


def _measure_lever(
    args: argparse.Namespace,
    lever: Lever,
    gamma: int,
    prompts: list[Prompt],
    plain: dict[str, Any],
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    done = _load(folder, lever.name, gamma)
    if done is not None and done["checkpoint"] == lever.checkpoint:
        return done
    progress.say(f"lever {lever.name}, γ {gamma}")
    specs = _make_specs(args, lever, gamma)
    found: dict[str, Any] = {"lever": lever.name, "checkpoint": lever.checkpoint, "gamma": gamma}
    try:
        with open_arm(specs[0], folder, progress.say) as ours, open_arm(specs[1], folder, progress.say) as theirs:
            point = measure_point(args, gamma, 1, prompts, (ours, theirs), progress)
            # After the timed prompts, or a prefix cache would know them.
            answers = asyncio.run(_ask(ours, prompts[: args.num_prompts], args.max_tokens))
    except (EngineError, EndpointError, MeasurementStoppedError) as error:
        progress.say(f"lever {lever.name} failed and is left out: {error}")
        return {**found, "failed": str(error)}
    differ = sum(ours != theirs for ours, theirs in zip(answers["token_ids"], plain["token_ids"], strict=True))
    kept = ("speedup", "ci95", "tau", "tok_per_s", "memory", "parity")
    found |= {key: point[key] for key in kept} | {
        "failed": None,
        "differ_from_plain_target": differ,
        "loss": answers["loss"],
        "loss_change": answers["loss"] - plain["loss"],
    }
    write_json(_place(folder, lever.name), found)
    return found


async def _ask(arm: Arm, prompts: Sequence[Prompt], max_tokens: int) -> dict[str, Any]:
    """Greedy answers, and the loss on the prompts themselves (nats per token)."""
    async with open_session() as session:
        model_name = arm.model_name or await find_model_name(session, arm.base_url)
        client = Client(session, arm.base_url, model_name, max_tokens)
        answers, losses = [], []
        for prompt in prompts:
            answers.append(list((await client.probe(prompt.text)).token_ids))
            losses += await client.score(prompt.text)
    return {"token_ids": answers, "loss": sum(losses) / len(losses), "tokens": len(losses)}


def _load(folder: Path, name: str, gamma: int) -> dict[str, Any] | None:
    """A finished measurement at this γ."""
    if not _place(folder, name).exists():
        return None
    found: dict[str, Any] = json.loads(_place(folder, name).read_text(encoding="utf-8"))
    return found if found["gamma"] == gamma else None


def _place(folder: Path, name: str) -> Path:
    return folder / f"stack-{name}.json"
