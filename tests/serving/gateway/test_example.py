"""The example configuration: complete, valid, and true about defaults and restarts."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from pydantic import BaseModel

from laguna_serve.serving.cli import main
from laguna_serve.serving.gateway.config import ConfigError, parse_config, read_example
from laguna_serve.serving.gateway.config.fixed import FIXED
from laguna_serve.serving.gateway.config.keys import AccessTable, Key
from laguna_serve.serving.gateway.config.listening import Admin, Server
from laguna_serve.serving.gateway.config.owned import Group, OwnedEngine
from laguna_serve.serving.gateway.config.tables import Health, Limits, Model, Shadow, Upstream
from laguna_serve.serving.gateway.config.telemetry import Traces, Tracing


def uncomment(example: str) -> str:
    """The example with the settings that it has as comments; of two that exclude each other the first."""
    lines = [re.sub(r"^# (\w+ = )", r"\1", line) for line in example.splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("api_key_env", "ssl_keyfile")))


def test_example_has_every_key_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", "--example"]) == 0
    example = capsys.readouterr().out
    parse_config(tomllib.loads(example), "example")
    written = {match[1] for match in re.finditer(r"^(?:# )?(\w+) = ", example, re.MULTILINE)}
    known: set[str] = set()
    for table in (
        Server,
        Admin,
        Limits,
        Health,
        AccessTable,
        Tracing,
        Traces,
        Key,
        Model,
        Upstream,
        Group,
        OwnedEngine,
    ):
        known |= table.model_fields.keys()
    assert written == known - {"upstreams", "shadows", "engine"}
    with pytest.raises(ConfigError) as caught:  # nothing but the files that are not there
        parse_config(tomllib.loads(uncomment(example)), "example")
    assert "no such key" not in str(caught.value)
    assert re.sub(r"api_key_file: |ssl_certfile: |keys_file: ", "", str(caught.value)).count("No such file") == 3


def test_example_says_what_the_defaults_are() -> None:
    """Where a comment does not call a value an example, it is the default."""
    table: type[BaseModel] = Server
    names = {"server": Server, "admin": Admin, "limits": Limits, "health": Health, "models": Model, "keys": Key}
    names |= {"access": AccessTable, "tracing": Tracing, "traces": Traces}
    names |= {"models.upstreams": Upstream, "models.shadows": Shadow, "models.engine": OwnedEngine, "groups": Group}
    checked = 0
    for line in read_example().splitlines():
        if header := re.fullmatch(r"\[+([\w.]+)\]+(\s+#.*)?", line):
            table = names[header[1]]
        elif (setting := re.match(r"(\w+) = (.*?)\s*(#.*)?$", line)) and "example" not in (setting[3] or ""):
            value = tomllib.loads(f"x = {setting[2]}")["x"]
            default = table.model_fields[setting[1]].default
            assert value == (list(default) if isinstance(default, tuple) else default), line
            checked += 1
    assert checked > 20


def test_example_says_what_needs_a_restart() -> None:
    """Every key of these tables is called (start) in the example if and only if a reload cannot change it."""
    example = read_example()
    for name, table in (
        ("server", Server),
        ("admin", Admin),
        ("access", AccessTable),
        ("tracing", Tracing),
        ("traces", Traces),
    ):
        part = example.partition(f"[{name}]")[2].partition("\n[")[0]
        for key in table.model_fields:
            (line,) = re.findall(rf"^(?:# )?{key} = .*$", part, re.MULTILINE)
            before = part[: part.index(line)].rstrip("\n").rpartition("\n")[2]
            marked = "(start)" in line or before.startswith("# (start)")
            assert marked == (key in FIXED[name]), line


def test_example_is_in_the_wheel() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["laguna_serve.serving.gateway"]
    assert any(fnmatch("gateway.example.toml", pattern) for pattern in patterns)
