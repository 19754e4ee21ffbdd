"""What of a checkpoint's numbers runs on which device with vLLM 0.32, as a table.

Read in vLLM 0.32.0: quantization/compressed_tensors (which scheme a capability gets), fused_moe/oracle/{fp8,nvfp4,
int_wna16}.py and the `_supports_*` methods of the kernels they choose from, platforms/cuda.py and cpu.py;
tests/serving/planning/test_support.py asks the same code again. On a CPU every quantised kernel for experts that vLLM
has needs AMX, and a router without Laguna's selection bias; linear layers are another matter.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from laguna_serve.plugins.formats.experts import SCALE_BLOCK, ExpertFormatError, find_unserved, read_base_format
from laguna_serve.serving.checkpoint.drafter import LAGUNA, Drafter
from laguna_serve.serving.checkpoint.fields import CheckpointError, ConfigJson, show
from laguna_serve.serving.checkpoint.parameters import EXPERTS, list_modules
from laguna_serve.serving.checkpoint.quantisation import FP8, INT4, NVFP4, OTHER, Quantisation
from laguna_serve.serving.checkpoint.target import STOCK, Target, find_served_dtype, value_bytes
from laguna_serve.serving.machine.device import Device

# Our class for dense models (plugins/models/dense.py).
DENSE = "LagunaDenseForCausalLM"
PLAIN = "plain"
NATIVE, WEIGHT_ONLY, REFUSED, UNKNOWN = "native", "weight-only", "refused", "unknown"
# The instructions that decide what of quantised weights a CPU computes with, as /proc/cpuinfo calls them.
AMX, AVX512 = "amx_tile", "avx512f"
MIN_CAPABILITY = 80
FP8_ON_CPU = ", or its compact form (`laguna compact --random-mask 0`), whose experts run here in FP8"
QUANTISED_ON_CPU = "serve the bf16 release here, or this one on a GPU of compute capability 8.0 or later"


@dataclass(frozen=True, slots=True)
class SupportVerdict:
    """What becomes of some numbers on a device; `remedy` is empty where they are served."""

    how: str
    reason: str
    remedy: str = ""

    @property
    def served(self) -> bool:
        """Whether vLLM starts with them."""
        return self.how != REFUSED


@dataclass(frozen=True, slots=True)
class GpuRow:
    """From that compute capability (× 10) on."""

    kind: str
    capability: int
    verdict: SupportVerdict


WITHOUT_BF16 = SupportVerdict(
    REFUSED, "its activations are bf16, which starts at compute capability 8.0", "take a newer GPU"
)
MARLIN = "Marlin: stored small, computed in bf16"
# Of a kind's rows the last whose capability the device reaches holds.
GPU_ROWS = (
    GpuRow(
        PLAIN,
        0,
        SupportVerdict(REFUSED, "no bf16 below compute capability 8.0, and fp16 overflows", "take a newer GPU"),
    ),
    GpuRow(PLAIN, 80, SupportVerdict(NATIVE, "bf16")),
    GpuRow(FP8, 0, WITHOUT_BF16),
    GpuRow(FP8, 80, SupportVerdict(WEIGHT_ONLY, f"no FP8 arithmetic below 8.9; {MARLIN}")),
    GpuRow(FP8, 89, SupportVerdict(NATIVE, "FP8 arithmetic, a scale per 128×128 block")),
    GpuRow(NVFP4, 0, WITHOUT_BF16),
    GpuRow(
        NVFP4,
        80,
        SupportVerdict(WEIGHT_ONLY, f"no FP4 arithmetic below 10.0; {MARLIN} (Poolside names Blackwell alone)"),
    ),
    GpuRow(NVFP4, 100, SupportVerdict(NATIVE, "FP4 arithmetic")),
    GpuRow(INT4, 0, WITHOUT_BF16),
    GpuRow(INT4, 80, SupportVerdict(WEIGHT_ONLY, MARLIN)),
)
KV_FP8_CAPABILITY = 89
OURS_ON_CPU = "experts stay in FP8 for sentinel_moe; FP8 linear layers are dequantised once, while they are loaded"


def judge_target(target: Target, device: Device) -> SupportVerdict:
    """Judge what becomes of the model's weights."""
    if device.kind == "cpu" and is_dequantised(target):
        return SupportVerdict(WEIGHT_ONLY, OURS_ON_CPU)
    return judge(target.quantisation, device, experts=not target.dense)


def is_dequantised(target: Target) -> bool:
    """FP8 that our own classes load on a CPU, with its linear layers dequantised: kept experts, and dense models."""
    return target.quantisation is not None and target.quantisation.kind == FP8 and (target.pruned or target.dense)


def judge_drafter(drafter: Drafter, device: Device) -> SupportVerdict:
    """Judge what becomes of a drafter's weights.

    vLLM's Laguna drafter reads `qkv_proj.weight` itself, for the keys and values of all layers at once, and so cannot
    have it quantised (https://github.com/vllm-project/vllm/issues/51581); Qwen3's asks the quantisation for them.
    """
    quantisation = drafter.quantisation
    if quantisation is not None and drafter.format == LAGUNA:
        fused = [f"model.layers.{layer}.self_attn.qkv_proj" for layer in range(drafter.num_layers)]
        if quantisation.kind == OTHER or any(quantisation.find_group(name) for name in fused):
            reason = "vLLM's Laguna drafter cannot have quantised queries, keys and values (vllm#51581)"
            remedy = "take one stored in bf16 that was trained for this form of the model, as the published ones are"
            return SupportVerdict(REFUSED, reason, remedy)
    return judge(quantisation, device, experts=False)


def judge(quantisation: Quantisation | None, device: Device, *, experts: bool) -> SupportVerdict:
    """Judge what becomes of weights that are stored like that; `experts`: some of them are a mixture's."""
    kind = PLAIN if quantisation is None else quantisation.kind
    if kind == OTHER and quantisation is not None:
        return SupportVerdict(
            UNKNOWN, f"{show(quantisation.name)} is no format of Laguna's releases: vLLM decides when it loads it"
        )
    if device.kind == "cpu":
        return _judge_cpu(kind, device.isa, experts)
    capability = MIN_CAPABILITY if device.capability is None else device.capability
    return [row.verdict for row in GPU_ROWS if row.kind == kind and row.capability <= capability][-1]


def _judge_cpu(kind: str, isa: Collection[str], experts: bool) -> SupportVerdict:
    if kind == PLAIN:
        return SupportVerdict(NATIVE, "bf16")
    if kind == NVFP4:
        return SupportVerdict(REFUSED, "vLLM has no FP4 kernel for a CPU", QUANTISED_ON_CPU)
    if experts:
        reason = "vLLM's quantised experts on a CPU know routers without Laguna's selection bias alone"
        return SupportVerdict(REFUSED, reason, QUANTISED_ON_CPU + (FP8_ON_CPU if kind == FP8 else ""))
    if kind == FP8 and AMX not in isa:
        return SupportVerdict(REFUSED, "vLLM's FP8 layers on a CPU need AMX", QUANTISED_ON_CPU)
    return SupportVerdict(WEIGHT_ONLY if kind == INT4 else NATIVE, "vLLM's CPU kernels")


def check_support(target: Target | None, drafter: Drafter | None, device: Device) -> None:
    """Raise CheckpointError for what the device does not run: weights, or a drafter's kinds of attention."""
    verdicts = [] if target is None else [(target.name, target.quantisation, judge_target(target, device))]
    verdicts += [] if drafter is None else [(drafter.name, drafter.quantisation, judge_drafter(drafter, device))]
    for name, quantisation, verdict in verdicts:
        if not verdict.served:
            kind = "bf16" if quantisation is None else describe_kind(quantisation)
            expected = f"expected weights that {device.name} runs"
            raise CheckpointError(f"{name}: {expected}, got {kind}: {verdict.reason}; {verdict.remedy}")

    if drafter is not None and drafter.mixed and device.kind == "cpu":
        expected = "expected layers of one kind on a CPU, whose model runner (V1) has one window for a drafter"
        remedy = "serve it on a GPU, or without the drafter"
        raise CheckpointError(f"{drafter.name}: {expected}, got sliding and full attention; {remedy}")


def check_split(target: Target | None, drafter: Drafter | None, ranks: int) -> None:
    """Raise CheckpointError for what tensor parallelism cannot cut into `ranks` equal parts.

    vLLM asserts each of these while it builds the layers, in every rank (models/laguna.py, distributed/utils.py of
    0.32); a drafter is cut like its target. Heads of keys and values may also be fewer than the ranks, which then
    share one.
    """
    remedy = f"take another --tensor-parallel-size than {ranks}"
    for part in (target, drafter):
        if part is None or ranks == 1:
            continue
        heads, kv_heads = (
            (part.heads, part.num_kv_heads)
            if isinstance(part, Target)
            else (part.attention.heads, part.attention.kv_heads)
        )
        widths = {"intermediate_size": part.intermediate_size}
        widths |= {f"query heads of layer {layer}": count for layer, count in enumerate(heads)}
        if isinstance(part, Target) and not part.dense:
            widths |= {"moe_intermediate_size": part.expert_size}
            widths |= {"shared_expert_intermediate_size": part.shared_expert_size}
        for name, width in widths.items():
            if width % ranks:
                expected = f"expected {name} to be divisible by {ranks} GPUs"
                raise CheckpointError(f"{part.name}: {expected}, got {width}; {remedy}")
        if kv_heads % ranks and ranks % kv_heads:
            expected = f"expected {kv_heads} heads of keys and values to be shared evenly by the GPUs"
            raise CheckpointError(f"{part.name}: {expected}, got {ranks} of them; {remedy}")


def check_blocks(target: Target | None, ranks: int, *, whole_experts: bool) -> None:
    """Raise CheckpointError where a GPU's part of an FP8 matrix would end within a block, which has one scale.

    vLLM refuses it while it builds the layers (utils/fp8_utils.py of 0.32).

    Args:
        target: the model.
        ranks: how many GPUs share each layer.
        whole_experts: routed experts are given to the GPUs whole (`--enable-expert-parallel`).
    """
    if target is None or target.quantisation is None or target.quantisation.kind != FP8 or ranks == 1:
        return
    for module in list_modules(target):
        group = target.quantisation.find_group(module.name)
        if group is None or not group.blocks or (EXPERTS in module.name and (whole_experts or target.pruned)):
            continue
        width = module.columns if module.name.endswith((".o_proj", ".down_proj")) else module.rows
        part = width // ranks
        if module.name.endswith((".k_proj", ".v_proj")):
            part = max(part, target.head_dim)  # ranks share a head
        if part % SCALE_BLOCK:
            expected = f"expected parts of {module.name} in whole FP8 blocks of {SCALE_BLOCK}"
            remedy = f"take a smaller --tensor-parallel-size than {ranks}"
            raise CheckpointError(f"{target.name}: {expected}, got {width} over {ranks} GPUs; {remedy}")


def check_sizes(target: Target | None) -> None:
    """Raise CheckpointError for kept blocks of sizes that our kernels do not take."""
    if target is None or target.experts is None:
        return
    reason = find_unserved(target.experts.block_size, target.hidden_size, target.experts_per_token)
    if reason is not None:
        raise CheckpointError(f"{target.name}: {reason}")


def check_one_device(target: Target | None, overrides: str | None, ranks: int) -> None:
    """Raise CheckpointError where our dense class, which holds whole layers, would be asked for a part of them.

    vLLM would load it in every rank before it said so.

    Args:
        target: the model.
        overrides: the user's `--hf-overrides`, which may name the class; what is no JSON is left to vLLM.
        ranks: how many devices share each layer.
    """
    if target is None or ranks == 1:
        return
    try:
        named = json.loads(overrides or "{}").get("architectures", [target.architecture])
    except (ValueError, AttributeError):
        return
    if DENSE in named:
        remedy = f"""serve it on one, or padded with --hf-overrides '{{"architectures": ["{STOCK}"]}}'"""
        raise CheckpointError(f"{DENSE}: expected one device, got tensor parallel size {ranks}; {remedy}")


def check_use(name: str, config: ConfigJson, keep_mask: str | None) -> None:
    """Raise CheckpointError for a base whose experts cannot be cut into blocks, where they are to be pruned."""
    if keep_mask is None:
        return
    try:
        read_base_format(config, f"{name}: --keep-mask")
    except ExpertFormatError as error:
        raise CheckpointError(str(error)) from None


def describe_kind(quantisation: Quantisation) -> str:
    """Describe the kind for people: "FP8 (float-quantized)"."""
    return quantisation.name if quantisation.kind == OTHER else f"{quantisation.kind.upper()} ({quantisation.name})"


def choose_kv_dtype(target: Target, device: Device) -> tuple[str, str] | None:
    """`--kv-cache-dtype` and why, where vLLM's own choice does not run; None where it does.

    A checkpoint whose `kv_cache_scheme` asks for it gets a KV cache in FP8 (e4m3) by vLLM's "auto".
    """
    if target.quantisation is None or not target.quantisation.fp8_kv_cache:
        return None
    if device.kind == "cpu":
        if AVX512 in device.isa:
            return None
        return "bfloat16", "the FP8 KV cache that the checkpoint asks for needs AVX-512 on a CPU"
    if device.capability is None or device.capability >= KV_FP8_CAPABILITY:
        return None
    return "bfloat16", "the FP8 KV cache that the checkpoint asks for needs compute capability 8.9"


def kv_value_bytes(target: Target, device: Device, dtype: str, chosen: str | None = None) -> int:
    """Bytes of a value in the KV cache; `chosen` is the user's --kv-cache-dtype."""
    if chosen not in (None, "auto"):
        return 1 if chosen.startswith(("fp8", "int8")) else 2
    if chosen is None and choose_kv_dtype(target, device) is not None:
        return 2
    if target.quantisation is not None and target.quantisation.fp8_kv_cache:
        return 1
    return value_bytes(find_served_dtype(target.dtype, dtype))
