"""The gateway's configuration: one TOML file, read and validated whole."""

from laguna_serve.serving.gateway.config.faults import ConfigError
from laguna_serve.serving.gateway.config.reader import load_config, parse_config, read_example
from laguna_serve.serving.gateway.config.tables import Config

__all__ = ["Config", "ConfigError", "load_config", "parse_config", "read_example"]
