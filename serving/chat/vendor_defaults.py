"""How Poolside serves its Laguna releases, as vLLM's flags and environment, each with its reason.

The serving line of the public recipes (github.com/vllm-project/recipes, models/poolside/Laguna-*.yaml for XS.2, XS-2.1,
S-2.1 and M.1, read 2026-11): automatic tool choice with the `poolside_v1` tool parser, the `poolside_v1` reasoning
parser, thinking through `--default-chat-template-kwargs`. The 2.1 releases name parsers and template variables in
generation_config.json, of which vLLM reads the sampling parameters alone (`--generation-config auto`, its default,
which we leave as it is).

Checked against the sources of vLLM 0.26.0, 0.32.0 and 0.33.0:

- Both parsers, all five flags and all three variables exist in each.
- vLLM finds the marks of thinking by asking a parser that was made without template variables, and this one then has
  none to name (config/reasoning.py): without `--reasoning-config` every request with a budget of thoughts, such as an
  Anthropic client's `thinking: enabled`, is refused with 400.
- `VLLM_USE_DEEP_GEMM` (default 1) governs FP8, MXFP4 and MXFP8 layers only: bf16 weights never reach DeepGEMM, and 0
  takes it out of the candidates in fused_moe/oracle/fp8.py. The recipes say that it does not go together with a DFlash
  drafter, and of no version that it does.
- `VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER` (default 1) takes effect on compute capability 9.0 alone
  (utils/flashinfer.py), for weights in 128×128 FP8 blocks; the recipes of all FP8 releases set 0.
- `VLLM_USE_V2_MODEL_RUNNER` unset means V2 wherever Triton works: on a CPU, where triton-cpu is installed (0.32: any
  model; 0.26: dense ones, and DFlash drafters that mix kinds of attention). 0 is obeyed in each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from laguna_serve.serving.chat.release import Release
from laguna_serve.serving.checkpoint import CheckpointError, ConfigJson
from laguna_serve.serving.kit.flags.vllm import find_value, names_flag, names_part

POOLSIDE = "poolside_v1"
NONE = "none"
AUTO_CHOICE, TOOL_PARSER = "--enable-auto-tool-choice", "--tool-call-parser"
REASONING_PARSER, TEMPLATE_KWARGS = "--reasoning-parser", "--default-chat-template-kwargs"

REASONING_CONFIG = "--reasoning-config"
MARKS = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}


@dataclass(frozen=True, slots=True)
class VllmSetting:
    """One flag or environment variable; `value` is None for a flag without one."""

    name: str
    value: str | None
    reason: str

    @property
    def arguments(self) -> list[str]:
        """Its words on vLLM's command line: one, or two with a value."""
        return [self.name] if self.value is None else [self.name, self.value]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the user asked for.

    Attributes:
        tool_call_parser: a parser of vLLM's, "none", or None for the release's.
        reasoning_parser: likewise.
        thinking: "on", "off" or "template" (as the chat template has it); None for what the release says:
            generation_config.json, else its template.
    """

    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    thinking: str | None = None


@dataclass(frozen=True, slots=True)
class ChatContract:
    """What vLLM gets.

    Attributes:
        flags: for its command line.
        notes: why some are absent, a line each.
        template: there is a chat template.
        tool_parser: which parser reads tool calls; None where they stay text.
        thinking: do requests think that do not say? None where the template has no such switch.
    """

    flags: tuple[VllmSetting, ...] = ()
    notes: tuple[str, ...] = ()
    template: bool = False
    tool_parser: str | None = None
    thinking: bool | None = None

    @property
    def arguments(self) -> list[str]:
        """The words of all flags, for vLLM's command line."""
        return [argument for setting in self.flags for argument in setting.arguments]


NO_CONTRACT = ChatContract()


def describe_chat(contract: ChatContract) -> list[str]:
    """Describe what it can do in a chat, for people, a line each; nothing of a model without a chat template."""
    if not contract.template:
        return []
    tools = "off" if contract.tool_parser is None else f"on ({contract.tool_parser})"
    thinking = {None: "not by this chat template", True: "on", False: "off"}[contract.thinking]
    how = "" if contract.thinking is None else ' (per request: "chat_template_kwargs": {"enable_thinking": true|false})'
    return [f"tool calls: {tools}; thinking: {thinking}{how}", *contract.notes]


def choose_chat_flags(release: Release, options: ChatOptions, extra_args: Sequence[str] = ()) -> ChatContract:
    """Choose the chat flags of vLLM's command line. What `extra_args` sets itself is left to it.

    Raises:
        CheckpointError: thinking is asked of a template that has no such switch.
    """
    notes: list[str] = []
    tool_parser = _choose_tool_parser(release, options, notes)
    reasoning_parser = _choose_reasoning_parser(release, options, notes)
    kwargs = _choose_template_kwargs(release, options)
    flags: list[VllmSetting] = []
    given = find_value(extra_args, TOOL_PARSER)
    parser = given or (tool_parser.value if tool_parser is not None else None)
    if parser is not None and not names_flag(extra_args, AUTO_CHOICE, f"--no-{AUTO_CHOICE[2:]}"):
        flags.append(VllmSetting(AUTO_CHOICE, None, "clients send tools without a tool_choice, which means auto"))
    marks = None
    if reasoning_parser is not None and reasoning_parser.value == POOLSIDE:
        reason = "the parser does not tell vLLM the marks of thinking, which a budget of thoughts needs"
        marks = VllmSetting(REASONING_CONFIG, json.dumps(MARKS), reason)
    # A parser of the user's own has its own marks.
    replaced = ((TOOL_PARSER,), (REASONING_PARSER,), (REASONING_PARSER, REASONING_CONFIG), (TEMPLATE_KWARGS,))
    for setting, names in zip((tool_parser, reasoning_parser, marks, kwargs), replaced, strict=True):
        if setting is not None and not any(names_part(extra_args, name) for name in names):
            flags.append(setting)
    return ChatContract(
        flags=tuple(flags),
        notes=tuple(notes),
        template=release.abilities is not None,
        tool_parser=parser,
        thinking=_read_thinking(release, find_value(extra_args, TEMPLATE_KWARGS) or (kwargs.value if kwargs else None)),
    )


def choose_environment(
    device_kind: str, *, drafter: bool, configs: Sequence[ConfigJson] = ()
) -> tuple[VllmSetting, ...]:
    """Variables for vLLM's process; what the user has set stays.

    Args:
        device_kind: "cpu" or "gpu".
        drafter: a DFlash drafter is served with the model.
        configs: the config.json of model and drafter, as far as they are on this machine.
    """
    if device_kind == "cpu":
        reason = "the repairs for CPUs are for vLLM's model runner V1, which triton-cpu would otherwise replace"
        return (VllmSetting("VLLM_USE_V2_MODEL_RUNNER", "0", reason),)
    settings: list[VllmSetting] = []
    if drafter:
        reason = "DeepGEMM, which FP8 layers take by themselves, does not go together with a DFlash drafter"
        settings.append(VllmSetting("VLLM_USE_DEEP_GEMM", "0", reason))
    if any(has_block_fp8(config) for config in configs):
        reason = "for weights in FP8 blocks, as the recipes of all FP8 releases have it; only Hopper has this kernel"
        settings.append(VllmSetting("VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER", "0", reason))
    return tuple(settings)


def has_block_fp8(config: ConfigJson) -> bool:
    """Whether weights are FP8 in blocks, as compressed-tensors or as Hugging Face's `fp8` stores them."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return False
    if quantization.get("quant_method") == "fp8":
        return bool(quantization.get("weight_block_size"))
    groups = quantization.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    return any(
        isinstance(weight, dict)
        and (weight.get("type"), weight.get("num_bits")) == ("float", 8)
        and bool(weight.get("block_structure"))
        for weight in weights
    )


def _choose_tool_parser(release: Release, options: ChatOptions, notes: list[str]) -> VllmSetting | None:
    if options.tool_call_parser is not None:
        return (
            None if options.tool_call_parser == NONE else VllmSetting(TOOL_PARSER, options.tool_call_parser, "as asked")
        )
    if release.abilities is None:
        notes.append("no tool calls: the checkpoint has no chat template")
        return None
    if release.tool_call_parser is not None:
        return VllmSetting(TOOL_PARSER, release.tool_call_parser, "named by generation_config.json")
    if release.abilities.tools:
        return VllmSetting(TOOL_PARSER, POOLSIDE, "the chat template lists tools and writes calls in Poolside's form")
    why = release.abilities.error or "it does not list tools, or writes calls in another form than Poolside's"
    notes.append(f"no tool calls by the chat template: {why}; --tool-call-parser names a parser")
    return None


def _choose_reasoning_parser(release: Release, options: ChatOptions, notes: list[str]) -> VllmSetting | None:
    if options.reasoning_parser is not None:
        named = VllmSetting(REASONING_PARSER, options.reasoning_parser, "as asked")
        return None if options.reasoning_parser == NONE else named
    if release.abilities is None:
        return None
    if release.missing_tokens and release.reasoning_parser in (None, POOLSIDE):
        if release.abilities.thinking:
            notes.append(f"no reasoning parser: the tokenizer has no token {' or '.join(release.missing_tokens)}")
        return None
    if release.reasoning_parser is not None:
        return VllmSetting(REASONING_PARSER, release.reasoning_parser, "named by generation_config.json")
    if release.abilities.thinking:
        return VllmSetting(REASONING_PARSER, POOLSIDE, "enable_thinking makes the chat template open with <think>")
    return None


def _choose_template_kwargs(release: Release, options: ChatOptions) -> VllmSetting | None:
    """Choose the variables that requests get which do not say otherwise.

    The reasoning parser sees these and not the template: thinking that is the template's own default must be said.
    """
    abilities = release.abilities
    kwargs = dict(release.template_kwargs)
    reason = "named by generation_config.json"
    if options.thinking in ("on", "off"):
        if abilities is None or not abilities.thinking:
            got = "no chat template" if abilities is None else abilities.error or "one without that switch"
            remedy = "leave --thinking out, or pass --chat-template FILE to vLLM"
            raise CheckpointError(
                f"--thinking {options.thinking}: expected a chat template with enable_thinking, got {got}; {remedy}"
            )
        kwargs["enable_thinking"] = options.thinking == "on"
        reason = "as asked"
    elif options.thinking == "template":
        kwargs.pop("enable_thinking", None)
    if abilities is not None and abilities.thinks_by_default and "enable_thinking" not in kwargs:
        kwargs["enable_thinking"] = True
        reason = "the chat template's own default, which the reasoning parser cannot see"
    return VllmSetting(TEMPLATE_KWARGS, json.dumps(kwargs), reason) if kwargs else None


def _read_thinking(release: Release, kwargs: str | None) -> bool | None:
    if release.abilities is None or not release.abilities.thinking:
        return None
    try:
        chosen = json.loads(kwargs or "{}")
    except ValueError:  # the user's own, of which vLLM will say what is wrong
        return None
    return (
        bool(chosen.get("enable_thinking", release.abilities.thinks_by_default)) if isinstance(chosen, dict) else None
    )
