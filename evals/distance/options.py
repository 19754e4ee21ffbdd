"""Which references are compared, who judges them, and the engines that come of it."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from laguna_serve.bench.arms.arms import BASELINE, ArmSpec
from laguna_serve.bench.arms.diffusion import serves_diffusion
from laguna_serve.bench.harness.prompts import PromptsConfig
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.client.completions import find_root
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import MOST_SEED, Flag, FlagError, Quick, check_bounds
from laguna_serve.serving.kit.flags.vllm import find_value
from laguna_serve.serving.machine.dtype import AUTO
from laguna_serve.serving.planning.launch import find_engine_dtype

JUDGE = "judge"
# A name is a folder's, too.
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
URL = ("http://", "https://")
# Of a masked diffusion engine that is started without --block-length: canvases are of whole blocks.
USUAL_BLOCK = 32


def parse_other(text: str) -> tuple[str, str]:
    """ "dual=--cache dual" or "dual=http://127.0.0.1:8001": a name, and an engine's flags or an endpoint."""
    name, equals, what = text.partition("=")
    if not equals or not NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(f"expected NAME=FLAGS or NAME=URL like 'dual=--cache dual', got {text!r}")
    return name, what.strip()


@dataclass(frozen=True, kw_only=True)
class ReferencesConfig(PromptsConfig):
    """The references, their judge, and on which prompts; the files go to `out`."""

    num_prompts: Annotated[int | None, Flag("the first N (default: all)", metavar="N", at_least=1)] = None
    prompt_tokens: Annotated[
        int | None,
        Flag("prompts are cut from the left to N tokens (default: to what fits before the answer)", metavar="N",
             at_least=1),
    ] = None  # fmt: skip
    max_tokens: Annotated[int, Flag("of an answer, at most (default: 128)", metavar="N", at_least=1)] = 128
    concurrency: Annotated[int, Flag("requests in flight (default: 4)", metavar="N", at_least=1)] = 4
    seed: Annotated[int, Flag("bootstrap, engines (default: 0)", at_least=0, at_most=MOST_SEED)] = 0
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]
    other: Annotated[
        tuple[tuple[str, str], ...],
        Flag(
            "a reference to hold against the baseline, and the engine's flags for it, or its URL; once for each",
            metavar="NAME=FLAGS",
            parse=parse_other,
            repeated=True,
            group="the references",
        ),
    ]
    baseline_args: Annotated[str, Flag("the baseline's flags, after an = (default: none)", metavar="…")] = ""
    model: Annotated[str | None, Flag("checkpoint of all references (with URLs: the served name)", metavar="M")] = None
    dtype: Annotated[str, Flag("of all references (default: the engine's choice)")] = AUTO
    baseline_url: Annotated[
        str | None, Flag("an endpoint that runs already; then the others are URLs, too", metavar="U")
    ] = None
    judge: Annotated[
        str | None,
        Flag("causal model with the same tokenizer, whose loss on the answers is measured", metavar="M",
             group="who judges"),
    ] = None  # fmt: skip
    judge_url: Annotated[str | None, Flag("or an endpoint of vLLM's that serves one", metavar="U")] = None
    judge_args: Annotated[str, Flag("extra vLLM flags for the judge, after an =", metavar="…")] = ""
    judge_dtype: Annotated[str, Flag("vLLM's --dtype for the judge (default: as the launcher settles it)")] = AUTO

    QUICK: ClassVar = Quick("16 prompts × 32 tokens", {"num_prompts": 16, "max_tokens": 32})

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        self._check_others()
        if (self.judge is None) == (self.judge_url is None):
            got = "neither" if self.judge is None else "both"
            raise FlagError(f"--judge and --judge-url: expected one of them, got {got}")
        if self.judge_url is not None and (self.judge_args or self.judge_dtype != AUTO):
            raise FlagError(
                "--judge-args, --judge-dtype: expected none with --judge-url, which runs already; drop them"
            )
        given = {"--baseline-args": self.baseline_args, "--judge-args": self.judge_args}
        for flag, text in given.items() | {(f"--other {name}", text) for name, text in self.other}:
            try:
                shlex.split(text)
            except ValueError as error:
                raise FlagError(f"{flag}: expected flags as in a shell, got {str(error).lower()}") from None

    def _check_others(self) -> None:
        names = [name for name, _ in self.other]
        if not names:
            raise FlagError("--other: expected a reference to hold against the baseline, got none")
        if taken := next((name for name in names if name in (BASELINE, JUDGE) or names.count(name) > 1), None):
            raise FlagError(f"--other {taken}: expected names of their own, got one that is taken; rename it")
        if wrong := next((name for name, what in self.other if what.startswith(URL) != self.by_url), None):
            expected = "a URL, as the baseline's" if self.by_url else "flags, as the baseline has no URL"
            raise FlagError(f"--other {wrong}: expected {expected}, got the other")
        if self.by_url and (self.baseline_args or self.dtype != AUTO):
            raise FlagError(
                "--baseline-args, --dtype: expected none with URLs, as those engines run already; drop them"
            )
        if not self.by_url and self.model is None:
            raise FlagError("--model: expected a checkpoint, or --baseline-url, got neither")

    @property
    def by_url(self) -> bool:
        """No reference's engine is started here."""
        return self.baseline_url is not None

    def list_flags(self) -> dict[str, str]:
        """List the flags of every reference that is started here, the baseline's first."""
        return {} if self.by_url else {BASELINE: self.baseline_args, **dict(self.other)}


def make_specs(config: ReferencesConfig) -> dict[str, ArmSpec]:
    """Make every reference's arm, the baseline first."""
    if config.baseline_url is not None:
        urls = {BASELINE: config.baseline_url, **dict(config.other)}
        return {name: _make_running(name, url, config.model) for name, url in urls.items()}
    assert config.model is not None
    dtype = find_engine_dtype(EngineConfig(model=config.model)) if config.dtype == AUTO else config.dtype
    specs = {}
    for name, text in config.list_flags().items():
        flags = tuple(shlex.split(text))
        engine = EngineConfig(model=config.model, dtype=dtype, prefix_caching=False, seed=config.seed, extra_args=flags)
        specs[name] = ArmSpec(name, f"{config.model}; {shlex.join(flags) or 'no flags'}", config=engine)
    return specs


def make_judge(config: ReferencesConfig) -> ArmSpec:
    """Make the judge's arm: without compilation, as it reads each answer once."""
    if config.judge_url is not None:
        return _make_running(JUDGE, config.judge_url, None)
    assert config.judge is not None
    if serves_diffusion(config.judge):
        expected = "expected a causal model, which reads an answer from left to right"
        raise CheckpointError(f"--judge {config.judge}: {expected}, got a masked diffusion model; choose another judge")
    dtype = config.judge_dtype
    engine = EngineConfig(
        model=config.judge,
        dtype=find_engine_dtype(EngineConfig(model=config.judge)) if dtype == AUTO else dtype,
        enforce_eager=True,
        prefix_caching=False,
        seed=config.seed,
        extra_args=tuple(shlex.split(config.judge_args)),
    )
    return ArmSpec(JUDGE, "; ".join(filter(None, [config.judge, config.judge_args])), config=engine)


def _make_running(name: str, url: str, model: str | None) -> ArmSpec:
    bare = find_root(url)
    return ArmSpec(name, f"running at {bare}", url=bare, model_name=model)


def find_canvas(max_tokens: int, flags: Mapping[str, str]) -> int:
    """Find what an answer takes of the context: `max_tokens`, in whole blocks of the longest that a reference has."""
    block = max(USUAL_BLOCK if value is None else value for value in _read_numbers(flags, "--block-length"))
    return -(-max_tokens // block) * block


def find_context(flags: Mapping[str, str]) -> int | None:
    """Find the shortest context that references are given by their flags; None where none says."""
    return min((value for value in _read_numbers(flags, "--max-model-len") if value is not None), default=None)


def _read_numbers(flags: Mapping[str, str], name: str) -> list[int | None]:
    """Read a flag of every reference, of one at least; None where it is not given as a number above 0."""
    given = [find_value(shlex.split(text), name) for text in flags.values()] or [None]
    return [int(value) if value is not None and value.isdecimal() and int(value) else None for value in given]


def check_vocabularies(model: str | None, judge: str | None) -> None:
    """Refuse a judge that cannot read the references' token ids, as far as files on this machine say.

    Whether the tokenizers read alike is asked of the engines; this is known before one is started.

    Raises:
        CheckpointError: tokens of both vocabularies have other ids.
    """
    ours, theirs = _read_vocabulary(model), _read_vocabulary(judge)
    if ours is None or theirs is None:
        return
    shared = ours.keys() & theirs.keys()
    wrong = sum(ours[token] != theirs[token] for token in shared)
    if wrong or not shared:
        got = f"one in which {wrong} of {len(shared)} shared tokens have other ids"
        raise CheckpointError(f"--judge {judge}: expected the tokenizer of {model}, got {got}; choose another judge")


def _read_vocabulary(name: str | None) -> dict[str, int] | None:
    """Read token → id of a tokenizer.json, special ones among them; None where there is none, or an unlike one."""
    folder = None if name is None else find_folder(name)
    if folder is None:
        return None
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        return {**content["model"]["vocab"], **added}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
