"""Every key of the releases' configs, absent, empty, and of every wrong type: a plan, or one line that says why not."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from release_cases import folder, read_config

from laguna_serve.serving.chat.release import read_given_template
from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.results import to_json
from laguna_serve.serving.planning.devices import plan_for
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.planning.report import format_plan
from laguna_serve.serving.planning.result import describe_plan

ABSENT = object()
ODD: tuple[Any, ...] = (
    ABSENT, None, True, -1, 1.5, float("nan"), 10**30, "x\ud800\n", [], [1], ["x"], [None], [[]], {"a": 1},
)  # fmt: skip
# (model, drafter, the folder whose config is changed): each format and quantisation once; of a quantised model what
# its config says of that.
CASES = [
    ("Laguna-XS.2", None, "Laguna-XS.2"),
    ("Laguna-XS-2.1-FP8", None, "Laguna-XS-2.1-FP8"),
    ("Laguna-XS-2.1-INT4", None, "Laguna-XS-2.1-INT4"),
    ("Laguna-XS.2", "Laguna-XS.2-speculator.dflash", "Laguna-XS.2-speculator.dflash"),
    ("Laguna-XS-2.1", "Laguna-XS-2.1-DFlash", "Laguna-XS-2.1-DFlash"),
]
MOST_CHARS = 500


def list_paths(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every key, and of the first item of every list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from list_paths(inner, (*path, key))


def change(config: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    if value is ABSENT:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def try_plan(model: str, draft: str | None, chat: ChatOptions | None = None) -> list[str]:
    try:
        plan = make_plan(EngineConfig(model, draft=draft, chat=chat), plan_for("h200"), planned=True)
        json.dumps(to_json(describe_plan(plan)))
        format_plan(plan).encode()
        return list(plan.refusals)
    except CheckpointError as error:
        return [str(error)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "draft", "changed"), CASES)
def test_no_config_leads_to_more_than_a_line(model: str, draft: str | None, changed: str, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder(changed), tmp_path / changed))
    config, refused = read_config(changed), 0
    names = [None if name is None else str(place) if name == changed else folder(name) for name in (model, draft)]
    quantised = config.get("quantization_config")
    paths = list_paths(quantised, ("quantization_config",)) if quantised else list_paths(config)
    for path in (*paths, ("quantization_config",)) if quantised else paths:
        for value in ODD:
            (place / "config.json").write_text(json.dumps(change(config, path, value)), encoding="utf-8")
            for line in try_plan(str(names[0]), names[1]):
                refused += 1
                assert len(line) < MOST_CHARS, (path, value)
                assert line.isprintable(), (path, value)
                assert ": expected " in line, (path, value)
                assert ", got " in line, (path, value)
                assert "; " in line, (path, value)
    assert refused > 100


def test_a_chat_template_that_is_named_is_text(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"expected a file of UTF-8, got other bytes .*; check the path"):
        read_given_template(str(tmp_path / "t.jinja"))


@pytest.mark.parametrize("count", [10**6, 10**12])
def test_absurd_numbers_of_layers_are_refused_before_they_are_counted_out(count: int, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder("Laguna-XS.2"), tmp_path / "m"))
    config = read_config("Laguna-XS.2") | {"num_hidden_layers": count, "layer_types": None, "mlp_layer_types": None}
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert f"expected num_hidden_layers to be at most 10000, got {count}; " in try_plan(str(place), None)[0]


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"[" * 100_000, b"[]", b"null", b'{"a": }'])
def test_what_is_no_json_is_a_line(content: bytes, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        place = Path(shutil.copytree(folder("Laguna-XS.2"), tmp_path / name))
        (place / "chat_template.jinja").unlink()  # which otherwise spares the tokenizer_config.json
        (place / name).write_bytes(content)
        (line,) = try_plan(str(place), None, ChatOptions())
        assert name in line
        assert ": expected " in line
        assert "; fetch it again" in line


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["folder", "dangling", "text"])
def test_files_that_are_none_are_a_line(kind: str, name: str, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder("Laguna-XS.2"), tmp_path / "m"))
    (place / name).unlink(missing_ok=True)
    if kind == "folder":
        (place / name).mkdir()
    elif kind == "dangling":
        (place / name).symlink_to("../blobs/none")
    else:
        (place / name).write_bytes(b"\xff\x00")
    (line,) = try_plan(str(place), None, ChatOptions())
    assert name in line
    assert ": expected " in line
    assert "; " in line
