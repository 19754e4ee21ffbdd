"""One vLLM engine as a process: started, watched, taken down again, and started anew."""

from laguna_serve.serving.engine.engine import Engine
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.launch import EngineError, find_port, require_port

__all__ = ["Engine", "EngineConfig", "EngineError", "find_port", "require_port"]
