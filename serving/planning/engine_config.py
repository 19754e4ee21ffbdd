"""What one vLLM engine is started with."""

from __future__ import annotations

from dataclasses import dataclass

from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.checkpoint import name_checkpoint

# Where a server listens for clients unless it is told otherwise.
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One vLLM engine.

    Attributes:
        model: checkpoint folder or hub id of the target.
        keep_mask: file of a pruning mask; the experts of a base checkpoint are cut down to it while they are loaded.
        group_indices: file of the mask's groups; together with `keep_mask`.
        draft: checkpoint folder or hub id of a DFlash drafter, or None for plain decoding.
        gamma: tokens proposed per step; None with a draft takes the drafter's trained maximum, block − 1.
        adaptive: γ is decided in every step, `gamma` being the most (speculation/adaptive.py).
        beyond_block: a γ that the drafter was not trained for is served, as a measurement may want it.
        gamma_schedule: vLLM's inclusive (first, last, K) ranges of batch sizes; K at most gamma, 0 for plain steps.
        draft_sampling: how drafts for sampled requests are chosen (speculation/drafting.py).
        host: address to listen on.
        port: None picks a free one at start.
        served_model_name: name in requests; None takes the folder's name or the hub id.
        dtype: vLLM's `--dtype`; "auto" follows the checkpoint.
        max_model_len: longest sequence in tokens, prompt included; None takes the model's own.
        max_num_seqs: sequences decoded together.
        enforce_eager: without compilation and CUDA graphs: quick to start, slow to run.
        prefix_caching: reuse the KV cache of equal prompt beginnings.
        kv_cache_gib: size of the KV cache in GiB; None picks it from the memory that is free.
        seed: vLLM's seed for sampling.
        exact: kernels whose rows do not depend on the batch, checked at the start (engine/batch_invariance.py).
        weight_updates: new weights may come from folders while it serves (plugins/weight_folder.py); this opens vLLM's
            development routes, for which nothing asks a key: an engine for the loopback address.
        return_routed_experts: answers carry the experts that every token went to (docs/rl.md); mixtures only.
        chat: tool calls, reasoning and thinking as the release has them or the user asks (chat/vendor_defaults.py);
            None for vLLM's own defaults, which have none of them.
        extra_args: appended to the command unchanged.
    """

    model: str
    keep_mask: str | None = None
    group_indices: str | None = None
    draft: str | None = None
    gamma: int | None = None
    beyond_block: bool = False
    adaptive: bool = False
    gamma_schedule: tuple[tuple[int, int, int], ...] | None = None
    draft_sampling: str = "greedy"
    host: str = DEFAULT_HOST
    port: int | None = None
    served_model_name: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    enforce_eager: bool = False
    prefix_caching: bool = True
    kv_cache_gib: float | None = None
    seed: int = 0
    exact: bool = False
    weight_updates: bool = False
    return_routed_experts: bool = False
    chat: ChatOptions | None = None
    extra_args: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        """What requests send as "model"."""
        return name_checkpoint(self.model) if self.served_model_name is None else self.served_model_name
