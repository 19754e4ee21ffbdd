"""What a checkpoint's files say about it, before anything is started."""

from laguna_serve.serving.checkpoint.fields import CheckpointError, ConfigJson, Fields
from laguna_serve.serving.checkpoint.folder import (
    check_pruning_files,
    find_cached_snapshot,
    find_folder,
    name_checkpoint,
    read_config,
    require_folder,
)
from laguna_serve.serving.checkpoint.target import Target, is_drafter, read_dtype, read_target

__all__ = [
    "CheckpointError",
    "ConfigJson",
    "Fields",
    "Target",
    "check_pruning_files",
    "find_cached_snapshot",
    "find_folder",
    "is_drafter",
    "name_checkpoint",
    "read_config",
    "read_dtype",
    "read_target",
    "require_folder",
]
