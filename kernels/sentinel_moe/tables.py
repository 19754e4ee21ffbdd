"""Tiles that were measured: a file for each device, written by `python bench/moe_tuning`, over the table of configs.py.

A file is looked for in the folder `tables` here, by the device's name, or is the one that LAGUNA_MOE_TILES names.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from laguna_serve.kernels.sentinel_moe import configs
from laguna_serve.kernels.sentinel_moe.configs import TABLE, Tiles, Weights

VARIABLE = "LAGUNA_MOE_TILES"
SCHEMA = "laguna_serve.moe_tiles/1"
FOLDER = Path(__file__).parent / "tables"


class TableError(ValueError):
    """A file of tiles that is none, as one line."""


def name_file(device: str) -> str:
    """NVIDIA H100 80GB HBM3 → nvidia-h100-80gb-hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def find_table(device: str) -> dict[tuple[configs.Path, Weights], Tiles]:
    """Find the table for a device of this name: its measured rows, and for the rest those of configs.py.

    Raises:
        TableError: LAGUNA_MOE_TILES names something else than a table of this device.
    """
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else FOLDER / name_file(device)
    if named is None and not path.exists():
        return TABLE
    return TABLE | read_table(path, device)


def read_table(path: Path, device: str) -> dict[tuple[configs.Path, Weights], Tiles]:
    """Read the rows of a file.

    Raises:
        TableError: it cannot be read, has another schema or device, or a row is not as Tiles are.
    """
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: expected a table of tiles, got {error}; unset {VARIABLE}") from None
    found = table.get("schema") if isinstance(table, dict) else None
    if found != SCHEMA or table.get("device") != device:
        got = f"schema {found} of {table.get('device') if isinstance(table, dict) else None}"
        raise TableError(f"{path}: expected schema {SCHEMA} of {device}, got {got}; unset {VARIABLE}")
    return {(row["path"], row["weights"]): _read_tiles(path, row) for row in table["rows"]}


def _read_tiles(path: Path, row: dict[str, Any]) -> Tiles:
    tiles = row.get("tiles")
    names = [field.name for field in fields(Tiles)]
    known = row["path"] in get_args(configs.Path) and row["weights"] in get_args(Weights)
    if not known or not isinstance(tiles, dict) or sorted(tiles) != sorted(names):
        raise TableError(f"{path}: expected rows of a path, weights and {', '.join(names)}, got {row}; measure again")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in tiles.items()}
    return Tiles(**values)
