"""Generate with a model in this process and print, as JSON, the tokens and what the model holds.

python model_probe.py MODEL PROMPTS.jsonl SETTINGS

SETTINGS: a JSON object of arguments for vLLM's LLM, and
"reload": checkpoints whose weights are then loaded in place by vLLM itself, one after the other
"updates": [{"folder": …, "draft": true or false}, …], versions that are then transferred, one after the other; one
that is refused is reported, and of every state the digests of the weights, ours and vLLM's own
"prompts": how many of the prompts; all when it is not given
"unmended": a function of models/laguna_cpu.py that does nothing but what vLLM's own does

With a drafter the parameters are the last loaded model's.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(model: str, prompts_file: str, settings: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import base_loader

    held: dict[str, list[int]] = {}
    pack = base_loader.process_weights_after_loading

    def count_and_pack(model: Any, *arguments: Any) -> None:
        """On a CPU vLLM then packs the matrices away, where nothing tells their size (checked against 0.32.0)."""
        held.update({name: [tensor.numel(), tensor.element_size()] for name, tensor in model.named_parameters()})
        pack(model, *arguments)

    base_loader.process_weights_after_loading = count_and_pack
    with open(prompts_file, encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    arguments: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512} | json.loads(settings)
    if arguments.pop("unmended", None) == "process_experts":
        from laguna_serve.plugins.models import laguna_cpu

        laguna_cpu.process_experts = laguna_cpu.UnquantizedFusedMoEMethod.process_weights_after_loading
    prompts = prompts[: arguments.pop("prompts", None)]
    reloads, updates = arguments.pop("reload", []), arguments.pop("updates", [])
    if updates:
        arguments |= {"weight_transfer_config": {"backend": "folder"}, "disable_log_stats": False}
        arguments["worker_extension_cls"] = "laguna_serve.plugins.weight_digests.WeightDigests"
    llm = LLM(model=model, max_num_seqs=64, kv_cache_memory_bytes=2**29, seed=0, **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)

    def generate() -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]

    loaded = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    report: dict[str, Any] = {"class": type(loaded).__name__, "tokens": generate()}
    report["tokens_after_reload"] = []
    for folder in reloads:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        llm.reset_prefix_cache()
        report["tokens_after_reload"].append(generate())
    report["accepted"] = [count_accepted(llm)] if updates else []
    report["updates"] = []
    report["digests"] = llm.collective_rpc("digest_weights") if updates else []
    report["checksums"] = llm.collective_rpc("compute_weight_checksums") if updates else []
    for update in updates:
        kind = "start_draft_weight_update" if update.pop("draft", False) else "start_weight_update"
        llm.collective_rpc(kind)
        try:
            llm.collective_rpc("update_weights", args=(update,))
            llm.collective_rpc("finish_weight_update")
            refused = None
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
        llm.reset_prefix_cache()
        report["updates"].append({"refused": refused, "tokens": generate()})
        report["accepted"].append(count_accepted(llm) - sum(report["accepted"]))
        report["digests"] += llm.collective_rpc("digest_weights")
        report["checksums"] += llm.collective_rpc("compute_weight_checksums")
    report["parameters"] = held
    print("\n" + json.dumps(report))


def count_accepted(llm: Any) -> int:
    """Draft tokens that were accepted since the start."""
    name = "vllm:spec_decode_num_accepted_tokens"
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == name)


if __name__ == "__main__":
    main(*sys.argv[1:])
