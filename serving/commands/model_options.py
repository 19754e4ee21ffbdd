"""How a model is loaded, and with what drafter: the flags that `laguna serve` and `laguna doctor` share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import Flag, check_bounds, read_flags
from laguna_serve.serving.speculation.flags import ADAPTIVE, DraftSampling, parse_gamma_or_adaptive
from laguna_serve.serving.speculation.gamma_store import AUTO, settle_gamma

Options = TypeVar("Options", bound="ModelOptions")
# Where flags belong that a command of ours does not know.
VLLM_FLAGS = "vLLM's own flags go behind a bare --"
BY_DEFAULT = "by default what the release names, else poolside_v1 where the chat template goes with it"


def parse_gamma_or_auto(text: str) -> int | str | None:
    """Parse a number of tokens, "max" (None), "auto" or "adaptive"."""
    return AUTO if text == AUTO else parse_gamma_or_adaptive(text)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What decides how a model is loaded and what it takes.

    Attributes:
        gamma: None is the drafter's maximum; "auto" what a sweep stored for this model, drafter, device and vLLM;
            "adaptive" decides in every step.
        extra_args: for vLLM, unchanged: what stands behind a bare `--`.
    """

    keep_mask: Annotated[str | None, Flag("prune a base checkpoint's experts while loading", metavar="M.npy")] = None
    group_indices: Annotated[str | None, Flag("the mask's groups of atoms", metavar="G.npy")] = None
    draft: Annotated[
        str | None,
        Flag(
            "DFlash drafter, in Laguna's or the speculators format, or a LLaDA's draft: checkpoint folder or hub id",
            metavar="D",
        ),
    ] = None
    gamma: Annotated[
        int | Literal["auto", "adaptive"] | None,
        Flag(
            "tokens proposed per step; max, the default: as many as the drafter was trained for (its block − 1); auto:"
            " what bench/gamma_sweep.py found for this model, drafter, device and vLLM; adaptive: decided every step,"
            " down to none, by what is accepted and what steps take",
            metavar="N|max|auto|adaptive",
            parse=parse_gamma_or_auto,
        ),
    ] = None
    draft_sampling: DraftSampling = "greedy"
    dtype: Annotated[
        str, Flag("bfloat16, float32, … (default: the checkpoint's; float32 on a CPU that multiplies it faster)")
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        Flag(
            "longest sequence, prompt and answer, in tokens (default: the model's, on a GPU what fits)",
            metavar="N",
            at_least=1,
        ),
    ] = None
    max_num_seqs: Annotated[
        int, Flag("requests that are computed together; more wait (default: 64)", metavar="N", at_least=1)
    ] = 64
    kv_cache_gib: Annotated[
        float | None, Flag("size of the KV cache in GiB (default: from the free memory)", metavar="GIB")
    ] = None
    eager: Annotated[bool, Flag("no compilation: quick to start, slow to run")] = False
    prefix_caching: Annotated[bool, Flag("do not reuse equal prompt beginnings")] = True
    tool_call_parser: Annotated[
        str | None,
        Flag(
            f"which of vLLM's parsers reads tool calls, none to leave them as text; {BY_DEFAULT}", metavar="NAME|none"
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Flag(
            "which of vLLM's parsers keeps thoughts apart from the answer, none to leave them in it;"
            + f" {BY_DEFAULT}",
            metavar="NAME|none",
        ),
    ] = None
    thinking: Annotated[
        Literal["on", "off", "template"] | None,
        Flag(
            "do requests think that do not say so in chat_template_kwargs? template: as the chat template has it;"
            " by default as the release says"
        ),
    ] = None
    extra_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self)


def read_model_flags(
    config: type[Options], argv: Sequence[str] | None, *, prog: str, description: str, epilog: str
) -> Options:
    """Read a command line: its own part, as `read_flags` does, and for vLLM what stands behind a bare `--`."""
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    own = read_flags(config, given[:split], prog=prog, description=description, epilog=epilog, elsewhere=VLLM_FLAGS)
    return replace(own, extra_args=tuple(given[split + 1 :]))


def make_engine_config(model: str, options: ModelOptions) -> EngineConfig:
    """Make the engine of these options, on the loopback address and a free port.

    Raises:
        CheckpointError: γ "auto" or "adaptive" without a drafter, or "auto" without a sweep of this pair.
    """
    if options.gamma in (AUTO, ADAPTIVE) and options.draft is None:
        raise CheckpointError(f"--gamma {options.gamma}: expected --draft beside it, got none; name the drafter")
    drafting = settle_gamma(model, options.draft, options.gamma, options.draft_sampling)
    if (advice := drafting.advice) is not None:
        plain = "plain decoding is fastest here: the drafter is left out"
        what = plain if drafting.draft is None else f"γ {drafting.gamma}"
        print(f"--gamma auto: {what}, by the sweep of {advice.date}: {list(advice.schedule)}", file=sys.stderr)
    return EngineConfig(
        model=model,
        keep_mask=options.keep_mask,
        group_indices=options.group_indices,
        draft=drafting.draft,
        gamma=drafting.gamma,
        adaptive=drafting.adaptive,
        gamma_schedule=drafting.schedule,
        draft_sampling=drafting.sampling,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        enforce_eager=options.eager,
        prefix_caching=options.prefix_caching,
        kv_cache_gib=options.kv_cache_gib,
        chat=ChatOptions(options.tool_call_parser, options.reasoning_parser, options.thinking),
        extra_args=options.extra_args,
    )
