"""What every table of a configuration is: strict, frozen, and silent about its values."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from laguna_serve.serving.kit.results import JsonObject

logger = logging.getLogger(__name__)


class ConfigTable(BaseModel):
    """A table of the file."""

    # Values of a configuration are in no message of pydantic's own: some are secret.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)
    # Names that keys had in version 0.1, accepted for one release.
    old_names: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, given: Any) -> Any:
        return cls.rename_keys(given) if isinstance(given, dict) else given

    @classmethod
    def rename_keys(cls, given: JsonObject) -> JsonObject:
        """Rename keys to their names of today, with a warning for each that was not."""
        for old in cls.old_names.keys() & given.keys():
            table, new = cls.__name__.lower(), cls.old_names[old]
            logger.warning("%s.%s: its name is %s now; rename it in the file", table, old, new)
            given = {new: given[old], **{name: value for name, value in given.items() if name != old}}
        return given
