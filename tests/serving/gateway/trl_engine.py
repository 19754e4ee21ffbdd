"""A mock of an engine whose weights come over the process group of a trainer."""

from __future__ import annotations

import json
from typing import Any, Self

from gateway_engine import RlEngine
from gateway_fakes import Exchange

NCCL = {"backend": "nccl"}
INIT, START, UPDATE = "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"


class TrlEngine(RlEngine):
    """With vLLM's routes for a trainer's process group; `joined` are the bodies that it got."""

    def __init__(self, workers: int = 1, transfer: dict[str, str] | None = NCCL) -> None:
        super().__init__()
        self.workers, self.transfer = workers, transfer
        self.joined: list[Any] = []
        self.handlers |= {"/server_info": self.describe, "/get_world_size": self.count, INIT: self.join}
        self.handlers["/reset_prefix_cache"] = self.reset

    async def describe(self, exchange: Exchange) -> None:
        config = {"weight_transfer_config": self.transfer, "model_config": {"logprobs_mode": "raw_logprobs"}}
        await exchange.answer(json.dumps({"vllm_config": config, "vllm_env": {"SECRET": "1"}}).encode())

    async def count(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"world_size": self.workers}).encode())

    async def join(self, exchange: Exchange) -> None:
        self.joined.append(json.loads(exchange.body)["init_info"])
        await exchange.answer(b"{}")

    async def reset(self, exchange: Exchange) -> None:
        self.take(exchange.line.split(" ")[1], {})
        await exchange.answer(b'{"success": true}')

    def __enter__(self) -> Self:
        super().__enter__()
        return self
