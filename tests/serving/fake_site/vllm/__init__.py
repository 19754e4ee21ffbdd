"""A fake vLLM: just enough of its registry, plugin loader and server to test what starts and inspects it."""

import importlib
from typing import ClassVar


class _Lazy:
    def __init__(self, path: str) -> None:
        self.path = path

    def load_model_cls(self) -> type:
        module, _, name = self.path.partition(":")
        loaded: type = getattr(importlib.import_module(module), name)
        return loaded


class ModelRegistry:
    """Architectures by name, as vLLM keeps them."""

    models: ClassVar[dict[str, _Lazy]] = {
        name: _Lazy(f"vllm.models:{name}")
        for name in ("LagunaForCausalLM", "DFlashLagunaForCausalLM", "DFlashDraftModel")
    }

    @classmethod
    def register_model(cls, architecture: str, path: str) -> None:
        cls.models[architecture] = _Lazy(path)
