"""Measured tables of tiles: found by the device's name, laid over the shipped table, refused where they are none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from laguna_serve.kernels.sentinel_moe import tables
from laguna_serve.kernels.sentinel_moe.configs import TABLE, Tiles
from laguna_serve.kernels.sentinel_moe.tables import TableError, find_table, name_file, read_table

DEVICE = "NVIDIA H100 80GB HBM3"
TILES = Tiles(8, 32, 128, 64, 64, 2, (4, 2), (3, 4))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    find_table.cache_clear()


def write(folder: Path, **changes: object) -> Path:
    row = {"path": "decode", "weights": "16-bit", "tiles": asdict(TILES), "candidates": []}
    path = folder / name_file(DEVICE)
    path.write_text(json.dumps({"schema": tables.SCHEMA, "device": DEVICE, "rows": [row]} | changes))
    return path


def test_a_device_without_a_file_has_the_shipped_table() -> None:
    assert find_table("NVIDIA Something") is TABLE


def test_a_devices_file_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write(tmp_path).name == "nvidia-h100-80gb-hbm3.json"
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert find_table(DEVICE) == TABLE | {("decode", "16-bit"): TILES}


def test_a_file_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAGUNA_MOE_TILES", str(write(tmp_path)))
    assert find_table(DEVICE)["decode", "16-bit"] == TILES
    with pytest.raises(
        TableError, match=r"expected schema laguna_serve.moe_tiles/1 of NVIDIA B200, got .* of NVIDIA H"
    ):
        find_table("NVIDIA B200")


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "laguna_serve.moe/1"},
        {"rows": [{"path": "decode", "weights": "int4", "tiles": asdict(TILES)}]},
        {"rows": [{"path": "decode", "weights": "fp8", "tiles": {"members": 8}}]},
        {"rows": [{"path": "decode", "weights": "fp8"}]},
    ],
)
def test_what_is_no_table_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r": expected .*, got .*; "):
        read_table(write(tmp_path, **changes), DEVICE)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"expected a table of tiles, got .*No such file.*; unset LAGUNA_MOE_TILES$"):
        read_table(tmp_path / "none.json", DEVICE)
