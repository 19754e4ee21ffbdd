"""vLLM's plugin loader in short: it filters by VLLM_PLUGINS, and logs and swallows what an import raises."""

import os
import traceback
from importlib.metadata import entry_points


def load_general_plugins() -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    for entry_point in entry_points(group="vllm.general_plugins"):
        if allowed is not None and entry_point.name not in allowed.split(","):
            continue
        try:
            register = entry_point.load()
        except Exception:
            traceback.print_exc()
            continue
        register()
