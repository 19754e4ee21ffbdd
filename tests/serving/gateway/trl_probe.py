"""Run by .venv-train's Python: what TRL's own client, or its trainer, makes of a server.

    trl_probe.py BASE_URL CALLS           its client; CALLS: a JSON list of [method, arguments]
    trl_probe.py BASE_URL CALLS MODEL     then GRPOTrainer with vllm_mode="server", for a step

Prints one JSON object for each call: what came back, or the class and text of what was raised.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any


def tell(act: Callable[[], Any]) -> None:
    try:
        found = {"value": act()}
    except Exception as error:
        found = {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(found), flush=True)


def run_client(url: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(base_url=url)
    tell(lambda: client.model)
    for method, arguments in calls:
        tell(lambda: getattr(client, method)(**arguments))  # noqa: B023


def run_grpo(url: str, model: str) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=url,
            vllm_server_timeout=10.0,
            max_steps=1,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=8,
            report_to="none",
        )
        rows = Dataset.from_list([{"prompt": "def add(a, b):\n"}] * 4)

        def train() -> None:
            GRPOTrainer(
                model=model,
                args=config,
                train_dataset=rows,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
            ).train()

        tell(train)


if __name__ == "__main__":
    address, asked, *trained = sys.argv[1:]
    run_client(address, json.loads(asked))
    for path in trained:
        run_grpo(address, path)
