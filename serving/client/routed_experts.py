"""The experts that an answer's tokens went to, as vLLM's `routed_experts` says it: base64 of NumPy's .npy format.

Read in vLLM 0.32 (`entrypoints/openai/completion/protocol.py`, `utils/serial_utils.py`).
"""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np

from laguna_serve.serving.kit.files import load_array

DTYPES = ("uint8", "uint16", "int16", "int32")


def decode_experts(text: str) -> np.ndarray:
    """Decode to [tokens − 1, layers, top_k]: a row of every token that was computed, the last sampled one never is.

    Layers are all of the model's; the rows of dense ones mean nothing. Prompt tokens that the request left out
    (`routed_experts_prompt_start`) have no rows.

    Raises:
        ValueError: it is no such array.
    """
    try:
        array = load_array(io.BytesIO(base64.b64decode(text, validate=True)))
    except (binascii.Error, ValueError, OSError) as error:
        raise ValueError(f"routed_experts: expected base64 of a .npy array, got {error}") from None
    if array.ndim != 3 or array.dtype.name not in DTYPES:
        got = f"{array.dtype.name} {list(array.shape)}"
        raise ValueError(f"routed_experts: expected [tokens, layers, top_k] of {', '.join(DTYPES)}, got {got}")
    return np.asarray(array)
