"""Sampling from the model's own distribution."""

from __future__ import annotations

# What a request says beside its temperature: vLLM takes each field that it leaves out from generation_config.json
# (`ModelConfig.get_diff_sampling_param`; XS.2's has `top_k: 20`).
PLAIN_SAMPLING: dict[str, float] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
