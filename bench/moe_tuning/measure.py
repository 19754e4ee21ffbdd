"""The clock of bench/moe_tuning: one candidate's time for XS.2's layer, from CUDA graphs."""

from __future__ import annotations

import torch

from laguna_serve.bench.moe_layer import layers
from laguna_serve.bench.moe_layer.layers import Batch, Router, Shape
from laguna_serve.kernels.sentinel_moe import gpu
from laguna_serve.kernels.sentinel_moe.configs import Tiles, Weights

LAYERS = 3  # 4.8 GB in bf16, against 50 MB of second-level cache


class Clock:
    """Random layers of XS.2's shape in bf16 or in 8 bits, and batches of some numbers of tokens."""

    def __init__(self, weights: Weights, tokens: tuple[int, ...], replays: int) -> None:
        self._replays = replays
        self._shape = Shape(256, 2048, 512, 64, 8, torch.bfloat16, torch.device("cuda"))
        self._blocks = [self._make_blocks(seed, weights) for seed in range(LAYERS)]
        router = Router(self._shape, "uniform", 0)
        self._batches = {count: [router.draw(count) for _ in range(layers.GRAPH_CALLS)] for count in tokens}

    def _make_blocks(self, seed: int, weights: Weights) -> gpu.Blocks:
        layer = layers.make_layer(self._shape, 0.0, seed, with_zeroed=False)
        most = self._shape.intermediate // self._shape.block
        if weights != "fp8":
            return gpu.Blocks(layer.w13_blocks, layer.w2_blocks, layer.block_start, None, None, most)
        # Any scales: what is timed does not depend on their values.
        w13, w2 = (blocks.to(torch.float8_e4m3fn) for blocks in (layer.w13_blocks, layer.w2_blocks))
        w13_scales, w2_scales = (
            torch.ones(*blocks.shape[:-1], blocks.shape[-1] // 128, device=blocks.device) for blocks in (w13, w2)
        )
        return gpu.Blocks(w13, w2, layer.block_start, w13_scales, w2_scales, most)

    def time(self, tiles: Tiles) -> dict[int, list[float]]:
        """µs of a call, of each replay of 39, by number of tokens."""
        return {count: self._time_batches(tiles, batches) for count, batches in self._batches.items()}

    def _time_batches(self, tiles: Tiles, batches: list[Batch]) -> list[float]:
        def call() -> None:
            for i, batch in enumerate(batches):
                out = torch.empty_like(batch.x)
                gpu.run_tokens(batch.x, batch.weights, batch.ids, self._blocks[i % LAYERS], tiles, out)

        replay = layers.record_graph(call)
        layers.time_calls(replay, self._shape.device)
        return [layers.time_calls(replay, self._shape.device) / len(batches) * 1e6 for _ in range(self._replays)]
