"""The registry of transfer engines."""

from typing import ClassVar


class WeightTransferEngineFactory:
    """Engines by name, as vLLM keeps them."""

    _registry: ClassVar[dict[str, tuple[str, str]]] = {}

    @classmethod
    def register_engine(cls, name: str, module: str, class_name: str) -> None:
        if name in cls._registry:
            raise ValueError(f"{name} is already registered")
        cls._registry[name] = (module, class_name)
