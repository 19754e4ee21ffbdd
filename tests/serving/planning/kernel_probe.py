"""Which kernels vLLM has for experts in a release's numbers on GPUs of given compute capabilities, and on this CPU.

    python kernel_probe.py 80 90 …

The platform's class is swapped for one that answers as such a GPU would (checked against vLLM 0.32.0): nothing is
computed, hence the process of its own. Prints JSON: form → capability, or "cpu" → backends.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import vllm.model_executor.layers.quantization.utils.quant_utils as schemes
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.oracle import fp8, int_wna16, nvfp4
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

ROUTING = RoutingMethodType.MiniMax2  # sigmoid scores with a selection bias and no groups: Laguna's
FORMS = ("FP8", "NVFP4", "INT4")


def make_gpu(capability: int) -> type[Platform]:
    class Gpu(Platform):
        _enum = PlatformEnum.CUDA
        device_name = device_type = "cuda"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(capability // 10, capability % 10)

        @classmethod
        def supports_fp8(cls) -> bool:
            return capability >= 89

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "gpu"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 100

    return Gpu


def list_experts(form: str) -> list[str]:
    """Backends with a kernel that takes the device and the numbers, and on a CPU Laguna's router as well."""
    weights, inputs, backends, find = {
        "FP8": (schemes.kFp8Static128BlockSym, schemes.kFp8Dynamic128Sym, fp8.Fp8MoeBackend, fp8.backend_to_kernel_cls),
        "NVFP4": (schemes.kNvfp4Static, schemes.kNvfp4Dynamic, nvfp4.NvFp4MoeBackend, nvfp4.backend_to_kernel_cls),
        "INT4": (schemes.kInt4Static, None, int_wna16._get_priority_backends(), int_wna16.backend_to_kernel_cls),
    }[form]
    found = []
    for backend in backends:
        try:
            classes = find(backend)
        except Exception:  # not built for this platform
            continue
        choices = classes if isinstance(classes, list | tuple) else [classes]
        if any(_takes(kernel, weights, inputs) for kernel in choices):
            found.append(backend.name)
    return found


def _takes(kernel: Any, weights: Any, inputs: Any) -> bool:
    try:
        if not kernel._supports_current_device() or not kernel._supports_quant_scheme(weights, inputs):
            return False
        return not current_platform.is_cpu() or bool(kernel._supports_routing_method(ROUTING, weights, inputs))
    except Exception:  # a kernel that asks for the real device's libraries
        return False


def main(capabilities: list[int]) -> None:
    real = type(current_platform)
    found: dict[str, dict[str, list[str]]] = {form: {} for form in FORMS}
    with set_current_vllm_config(VllmConfig()):
        for capability in (0, *capabilities):
            current_platform.__class__ = make_gpu(capability) if capability else real
            for form in FORMS:
                found[form][str(capability or "cpu")] = list_experts(form)
        current_platform.__class__ = real
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
