"""The `vllm.general_plugins` entry point: tells vLLM which class serves which architecture.

vLLM calls `register` in every process it starts, possibly more than once, and logs and swallows whatever it raises;
`laguna doctor` therefore proves the outcome in a fresh process. Classes are registered by name, so nothing is imported
until a model of that architecture is loaded.
"""

from __future__ import annotations

import multiprocessing
import sys

# Every vLLM minor version between these two, both included, is supported; on a CPU, whose runner is repaired, one is.
CHECKED_VLLM = ("0.26", "0.33")
CHECKED_VLLM_CPU = ("0.32", "0.32")

# What stock vLLM gets wrong on every device, and what it gets wrong on a CPU besides; the modules' docstrings say what,
# and when each can go.
ARCHITECTURES = {
    "LagunaForCausalLM": "laguna_serve.plugins.models.laguna:LagunaForCausalLM",
    "LagunaDenseForCausalLM": "laguna_serve.plugins.models.dense:LagunaDenseForCausalLM",
    "LagunaSentinelForCausalLM": "laguna_serve.plugins.models.sentinel:LagunaSentinelForCausalLM",
    "DFlashLagunaForCausalLM": "laguna_serve.plugins.models.dflash:DFlashLagunaForCausalLM",
}
CPU_ARCHITECTURES = {
    "LagunaForCausalLM": "laguna_serve.plugins.models.laguna_cpu:LagunaForCausalLM",
    "DFlashLagunaForCausalLM": "laguna_serve.plugins.models.dflash_cpu:DFlashLagunaForCausalLM",
    "DFlashDraftModel": "laguna_serve.plugins.models.dflash_cpu:DFlashQwen3ForCausalLM",
}

# Pooling models: what `laguna serve` starts vLLM for is not among them.
MASK_PREDICTORS = {"LLaDAModelLM": "laguna_serve.plugins.models.llada:LladaForMaskPrediction"}

# The name of weight_folder.py's engine in vLLM's --weight-transfer-config.
TRANSFER_BACKEND = "folder"
# Of the worker that counts what it decides (worker.py), on the server's command line.
ADAPTIVE_WORKER = "laguna_serve.plugins.worker.AdaptiveCPUWorker"
# The name of random_weights.py's loader in vLLM's --load-format.
RANDOM_WEIGHTS = "laguna-random"


def architectures() -> dict[str, str]:
    """Architecture → "module:Class" for the platform that vLLM detects on this machine."""
    from vllm.platforms import current_platform

    return ARCHITECTURES | CPU_ARCHITECTURES if current_platform.is_cpu() else ARCHITECTURES


def register() -> None:
    """Register our classes with vLLM, and repair what requests run into; calling it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    for architecture, path in (architectures() | MASK_PREDICTORS).items():
        ModelRegistry.register_model(architecture, path)
    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            TRANSFER_BACKEND, "laguna_serve.plugins.weight_folder", "FolderWeightTransferEngine"
        )
    # The API server loads no weights: two seconds of imports less, unless its core, forked, is to find the loader.
    if multiprocessing.parent_process() is not None or any(RANDOM_WEIGHTS in argument for argument in sys.argv):
        register_random_weights()
    from laguna_serve.plugins.repairs import repair_front_end, repair_runner

    repair_front_end()
    if current_platform.is_cpu():
        from laguna_serve.kernels.isa import ask_for_tiles
        from laguna_serve.plugins.cpu_linear import accelerate_linear
        from laguna_serve.plugins.processes.core import fork_core
        from laguna_serve.plugins.processes.groups import share_devices
        from laguna_serve.plugins.processes.inspection import inspect_here
        from laguna_serve.plugins.processes.stack import give_room

        if multiprocessing.parent_process() is None and ADAPTIVE_WORKER in sys.argv:
            from laguna_serve.plugins.adaptive.counters import publish_counters

            publish_counters()
        ask_for_tiles()
        fork_core()
        give_room()
        inspect_here()
        share_devices()
        repair_runner()
        accelerate_linear()


def register_random_weights() -> None:
    """Register the loader of RANDOM_WEIGHTS, once; processes that vLLM starts have it by themselves."""
    from vllm.model_executor import model_loader

    if RANDOM_WEIGHTS not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        from laguna_serve.plugins.random_weights import RandomWeightsLoader

        model_loader.register_model_loader(RANDOM_WEIGHTS)(RandomWeightsLoader)
