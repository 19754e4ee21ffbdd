"""Tables of engines that the gateway owns: what is taken, what is refused, and what `laguna serve MODEL…` makes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.cli import main
from laguna_serve.serving.commands.serve import ServeConfig
from laguna_serve.serving.commands.serve_several import OF_ONE, plan_several
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.gateway.config import ConfigError, parse_config
from laguna_serve.serving.gateway.config.owned import OwnedEngine, name_engine
from laguna_serve.serving.gateway.relay.heartbeat import read_error, wants_stream
from laguna_serve.serving.gateway.residence import plans
from laguna_serve.serving.gateway.residence.owner import Owner
from laguna_serve.serving.gateway.residence.plans import find_log, make_engine_config, plan_bytes
from laguna_serve.serving.planning.launch import EngineError
from laguna_serve.serving.service.several import SeveralSettings, make_several_config

# Flags of `laguna serve` that are not an engine's, and keys of an engine that are no flags.
NOT_THE_ENGINES = {
    *("more_models", "memory_budget", "idle_timeout", "host", "port", "served_model_name", "gateway", "gateway_config"),
    *("api_key", "allow_origin", "restart", "dry_run"),
}
OURS = {"group", "pinned", "idle_timeout_s", "min_residence_s", "memory_gib", "sleep_level", "start_timeout_s"}

TOY = Path(__file__).parents[2] / "toy"


def parse(engine: dict[str, Any], **more: Any) -> Any:
    return parse_config({"models": [{"name": "m", "engine": {"model": "folder", **engine}}], **more}, "test")


def test_an_engine_takes_what_serve_takes() -> None:
    flags = {field.name for field in fields(ServeConfig)} - NOT_THE_ENGINES
    assert OwnedEngine.model_fields.keys() - OURS == flags


@pytest.mark.parametrize(
    ("engine", "more", "message"),
    [
        ({"modell": "x"}, {}, "models.0.engine.modell: expected no such key; did you mean model"),
        ({"model": ""}, {}, "models.0.engine: expected a checkpoint folder or a hub id as model"),
        ({"gamma": "adaptive"}, {}, "models.0.engine: expected a draft beside gamma 'adaptive', got none"),
        ({"pinned": True, "idle_timeout_s": 1.0}, {}, "expected no idle_timeout_s of a model that is pinned, got both"),
        ({"sleep_level": 3}, {}, "models.0.engine.sleep_level: expected at most 2, got 3"),
        ({"max_num_seqs": 0}, {}, "models.0.engine.max_num_seqs: expected at least 1, got 0"),
        ({"kv_cache_gib": -1}, {}, "models.0.engine.kv_cache_gib: expected more than 0, got -1"),
        ({"group": "gpu"}, {}, "expected a [[groups]] for every engine's group, got none for 'gpu'"),
        ({}, {"groups": [{"name": "a"}, {"name": "a"}]}, "expected distinct names of groups, got 'a' twice"),
        ({}, {"groups": [{"name": "a", "memory_gib": 0}]}, "groups.0.memory_gib: expected more than 0, got 0"),
    ],
)
def test_wrong_tables_are_refused(engine: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(engine, **more)
    assert message in str(caught.value)


def test_url_and_engine_exclude_each_other() -> None:
    upstreams = [{"name": "a", "url": "http://127.0.0.1:8000"}]
    with pytest.raises(ConfigError, match="expected upstreams or an engine, got both"):
        parse_config({"models": [{"name": "m", "engine": {"model": "x"}, "upstreams": upstreams}]}, "test")


def test_table_becomes_the_engine() -> None:
    config = parse({"gamma": 3, "draft": "d", "eager": True, "extra_args": ["--block-size", "32"], "sleep_level": 2})
    made = make_engine_config("m", config.models[0].engine)
    assert isinstance(made, EngineConfig)
    assert (made.model_name, made.gamma, made.enforce_eager, made.weight_updates) == ("m", 3, True, True)
    assert made.extra_args == ("--block-size", "32", "--enable-sleep-mode")
    assert made.port is None


def test_plans_say_nothing_of_what_is_not_there(target: Path, fake_vllm: Path, tmp_path: Path) -> None:
    nowhere, here = (parse({"model": name}).models[0].engine for name in ("no/such/folder/here", str(target)))
    assert plan_bytes("m", nowhere) == 0
    assert plan_bytes("m", here) > 3 * 10**9
    toy = Path(__file__).resolve().parents[2] / "toy"
    llada = parse({"model": str(toy / "llada"), "draft": str(toy / "llada-draft")}).models[0].engine
    assert plan_bytes("m", llada) == 4 * (1_738_880 + 1_134_208) + 10**9
    given = parse({"memory_gib": 2}).models[0].engine
    assert plan_bytes("m", given) == 2 << 30
    strange = tmp_path / "strange"  # not planned: what it stores is known all the same
    strange.mkdir()
    (strange / "config.json").write_text('{"architectures": ["DeepseekV3ForCausalLM"]}')
    unplanned = parse({"model": str(strange)}).models[0].engine
    assert plan_bytes("m", unplanned) == 0
    save_file({"w": np.zeros(1000, np.float32)}, strange / "model.safetensors")
    assert plan_bytes("m", unplanned) > 10**9
    assert find_log("a/b c", given, 80).name == "gateway-80-a-b-c.log"
    assert name_engine("é") == "engine"


def test_check_refuses_a_folder_that_is_not_there(
    tmp_path: Path, fake_vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text('[server]\nport = 0\n[[models]]\nname = "m"\n[models.engine]\nmodel = "/no/such/folder"\n')
    assert main(["gateway", "--config", str(path), "--check"]) == 2
    assert "/no/such/folder" in capsys.readouterr().err


def test_check_refuses_a_group_in_which_a_model_has_no_room(
    tmp_path: Path, fake_vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, server = tmp_path / "gateway.toml", "[server]\nport = 0\n"
    model = f'[[models]]\nname = "m"\n[models.engine]\nmodel = "{TOY / "teacher"}"\nmemory_gib = 1.5\n'
    path.write_text(f'{server}{model}[[groups]]\nname = "default"\nmemory_gib = 1.5\n')
    assert main(["gateway", "--config", str(path), "--check"]) == 0
    path.write_text(f'{server}{model}[[groups]]\nname = "default"\nmemory_gib = 0.5\n')
    assert main(["gateway", "--config", str(path), "--check"]) == 2
    fault = "memory of the group default: expected 1.5 GiB or more, which m takes, got 512.0 MiB; raise it"
    assert fault in capsys.readouterr().err
    assert main(["serve", str(TOY / "teacher"), "--memory-budget", "1e-9", "--port", "0"]) == 2
    assert "which teacher takes, got 0.0 MiB; raise it" in capsys.readouterr().err


def test_check_refuses_flags_that_an_engine_does_not_know(
    tmp_path: Path, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were found out when somebody asked for the model."""
    asked: list[list[str]] = []
    monkeypatch.setattr(plans, "check_flags", lambda commands: asked.extend(list(one[3:]) for one in commands))
    path = tmp_path / "gateway.toml"
    teacher, llada = str(TOY / "teacher"), str(TOY / "llada")
    model = '[[models]]\nname = "{}"\n[models.engine]\nmodel = "{}"\nextra_args = ["--nosuch-flag"]\n'
    path.write_text(f"[server]\nport = 0\n{model.format('t', teacher)}")
    assert main(["gateway", "--config", str(path), "--check"]) == 0
    assert asked == [[teacher, "--nosuch-flag"]]
    path.write_text(f"[server]\nport = 0\n{model.format('l', llada)}")
    assert main(["gateway", "--config", str(path), "--check"]) == 2
    assert "unrecognized arguments: --nosuch-flag" in capsys.readouterr().err
    assert main(["serve", llada, teacher, "--port", "0", "--", "--nosuch-flag"]) == 2
    assert "unrecognized arguments: --nosuch-flag" in capsys.readouterr().err


def test_several_models_become_engines_of_one_budget() -> None:
    given = ServeConfig(
        model="org/a", more_models=("org/b",), memory_budget=8.0, idle_timeout=60.0, eager=True, port=0, api_key=("k",)
    )
    config = make_several_config(plan_several(given))
    assert [model.name for model in config.models] == ["org/a", "org/b"]
    assert [model.engine.eager for model in config.models if model.engine] == [True, True]
    assert [model.engine.idle_timeout_s for model in config.models if model.engine] == [60.0, 60.0]
    assert (config.groups[0].memory_gib, len(config.keys), config.server.port) == (8.0, 1, 0)


@pytest.mark.parametrize("name", OF_ONE)
def test_flags_of_one_model_are_refused_beside_several(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"expected one model beside it, got 2; give each model its"):
        plan_several(ServeConfig(model="a", more_models=("b",), **{name: "x"}))  # type: ignore[arg-type]


def test_several_models_are_distinct_and_behind_the_gateway() -> None:
    with pytest.raises(CheckpointError, match="expected each once"):
        plan_several(ServeConfig(model="a", more_models=("a",)))
    with pytest.raises(CheckpointError, match="expected none of them beside several models"):
        plan_several(ServeConfig(model="a", more_models=("b",), gateway=False))
    with pytest.raises(CheckpointError, match=r"--memory-budget: expected more than 0, got -1"):
        plan_several(ServeConfig(model="a", memory_budget=-1.0))
    same = SeveralSettings(models=("a", "b"), engine={}, names={"a": "b"})
    with pytest.raises(EngineError, match="expected distinct names of models"):
        make_several_config(same)


def test_streams_and_errors_are_read_as_they_come() -> None:
    assert [wants_stream(body) for body in (b'{"stream": true}', b'{"stream": 1}', b"{}", b"no", b"[]")] == [
        *(True, False, False, False, False)
    ]
    error = read_error(400, b'{"error": {"message": "m", "type": "t", "code": 7, "param": "p"}}')
    assert (error.status, error.message, error.kind, error.code, error.param) == (400, "m", "t", "7", "p")
    assert read_error(502, b"<html>").message == "The engine answered with status 502 and no stream."


@pytest.mark.parametrize(
    ("engines", "server", "wanted"), [(1, {}, False), (2, {}, True), (2, {"spare_process": False}, False)]
)
def test_a_spare_process_is_for_gateways_that_swap(engines: int, server: dict[str, Any], wanted: bool) -> None:
    models = [{"name": f"m{number}", "engine": {"model": "folder", "memory_gib": 1}} for number in range(engines)]
    owner = Owner()
    owner.configure(parse_config({"models": models, "server": server}, "test"))
    assert owner._spares._wanted is wanted


def test_a_model_of_which_nothing_is_known_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    owner, config = Owner(), parse({"model": "no/such/folder/here"})
    owner.configure(config)
    owner.configure(config)
    (line,) = caplog.messages
    assert line.startswith("model m: what it takes is not known before its first load, which makes no room")
    owner.configure(parse({"model": "no/such/folder/here", "memory_gib": 1}))
    assert len(caplog.messages) == 1
