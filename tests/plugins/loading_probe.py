"""Load checkpoints in this process, one after the other, and print what comes of each as JSON: null, or the error.

python loading_probe.py CASES

CASES: a JSON list of objects: "model", perhaps "draft", which is then loaded too, and "arguments" for vLLM;
"stock": without our look at what is missing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any


def main(cases: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    print("\n" + json.dumps([load(**case) for case in json.loads(cases)]))


def load(
    model: str, draft: str | None = None, arguments: dict[str, Any] | None = None, stock: bool = False
) -> str | None:
    from vllm import LLM

    from laguna_serve.plugins.formats import completeness

    settings: dict[str, Any] = {"max_num_seqs": 1, "max_model_len": 64, "kv_cache_memory_bytes": 2**26}
    settings |= {"enforce_eager": True, "dtype": "float32"} | (arguments or {})
    if draft is not None:
        settings["speculative_config"] = {"model": draft, "method": "dflash", "num_speculative_tokens": 7}
    look = completeness.list_missing
    if stock:
        completeness.list_missing = lambda *_: []
    try:
        LLM(model=model, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        completeness.list_missing = look
        gc.collect()
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
