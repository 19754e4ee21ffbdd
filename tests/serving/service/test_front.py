"""The gateway of laguna serve: its file and flags together, what does not go together in words, and a reload."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import post, read_pids, read_url, serving

from laguna_serve.serving.cli import main
from laguna_serve.serving.planning.launch import EngineError
from laguna_serve.serving.service import front as front_module
from laguna_serve.serving.service.front import FrontSettings, make_config, open_front

COMPLETIONS = "/v1/completions"
URL = "http://127.0.0.1:7"
DIGEST = "a" * 64


def configure(tmp_path: Path, text: str, **more: Any) -> Any:
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    return make_config(FrontSettings(model="teacher", max_num_seqs=4, file=file, **more), URL)


def list_upstreams(config: Any) -> dict[str, list[tuple[str, str]]]:
    return {model.name: [(u.name, u.url) for u in model.upstreams] for model in config.models}


def test_without_a_file(tmp_path: Path) -> None:
    config = make_config(FrontSettings(model="org/teacher", max_num_seqs=4, keys=("k",), origins=("https://a.b",)), URL)
    assert list_upstreams(config) == {"org/teacher": [("engine", URL)]}
    assert config.models[0].upstreams[0].max_in_flight == 32
    assert (config.server.host, config.server.port, config.server.shutdown_timeout_s) == ("127.0.0.1", 8000, 10.0)
    assert config.limits.queue_timeout_s == 300
    assert [key.name for key in config.keys] == ["api-key-1"]
    assert config.server.allowed_origins == ("https://a.b",)


def test_the_engine_is_added_to_the_model_of_its_name(tmp_path: Path) -> None:
    other = '[[models.upstreams]]\nname = "old"\nurl = "http://127.0.0.1:9"\n'
    config = configure(tmp_path, f'[[models]]\nname = "teacher"\naffinity = "session"\n{other}')
    assert list_upstreams(config) == {"teacher": [("old", "http://127.0.0.1:9"), ("engine", URL)]}
    assert config.models[0].affinity == "session"


def test_the_model_may_have_no_other_engine(tmp_path: Path) -> None:
    config = configure(tmp_path, '[[models]]\nname = "teacher"\naffinity = "prefix"\n')
    assert list_upstreams(config) == {"teacher": [("engine", URL)]}
    assert config.models[0].affinity == "prefix"


def test_other_models_stay(tmp_path: Path) -> None:
    other = '[[models]]\nname = "dense"\n[[models.upstreams]]\nname = "d"\nurl = "http://127.0.0.1:9"\n'
    assert list_upstreams(configure(tmp_path, other)) == {
        "teacher": [("engine", URL)],
        "dense": [("d", "http://127.0.0.1:9")],
    }


def test_flags_go_before_the_file_and_keys_are_added(tmp_path: Path) -> None:
    text = '[server]\nhost = "127.0.0.2"\nport = 81\ndrain_s = 3\n[limits]\nmax_queued = 7\n[[keys]]\nname = "a"\n'
    text += f'sha256 = "{DIGEST}"\n'
    plain = configure(tmp_path, text)
    assert (plain.server.host, plain.server.port, plain.server.shutdown_timeout_s) == ("127.0.0.2", 81, 3)
    assert (plain.limits.max_queued, plain.limits.queue_timeout_s) == (7, 300)
    given = configure(tmp_path, text, host="127.0.0.3", port=0, keys=("k",))
    assert (given.server.host, given.server.port) == ("127.0.0.3", 0)
    assert [key.name for key in given.keys] == ["a", "api-key-1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[models]]\nname = "teacher"\n[[models.upstreams]]\nname = "engine"\nurl = "http://127.0.0.1:9"\n',
            "expected no upstream called 'engine' beside the one that laguna serve starts, got one; rename it",
        ),
        (
            '[[models]]\nname = "other"\n',
            "model 'other': expected upstreams, or the name of the model that is served here, 'teacher'; give its name",
        ),
        ("[server\n", "expected TOML, got"),
        ("server = 3\n", "server: expected a table, got 3; write [server]"),
        ("models = 3\n", "models: expected tables, got 3; write [[models]]"),
        ('[[keys]]\nname = "api-key-1"\nsha256 = "x"\n', "keys"),
        ("[server]\nnonsense = 1\n", "nonsense"),
    ],
    ids=["upstream-name", "other-model", "no-toml", "no-table", "no-tables", "bad-key", "unknown-key"],
)
def test_conflicts_are_told_in_one_line(
    fake_vllm: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    assert main(["serve", str(target), "--port", "0", "--gateway-config", str(file), "--api-key", "k"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert str(file) in err
    assert len(err.splitlines()) == 1
    assert not fake_vllm.exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="none: expected a file, got No such file or directory; check the path"):
        make_config(FrontSettings(model="m", max_num_seqs=1, file=tmp_path / "none"), URL)


def test_a_pipe_is_no_file_as_its_keys_would_be_gone_when_it_is_read_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(EngineError, match="expected a regular file, as it is read more than once"):
            make_config(FrontSettings(model="m", max_num_seqs=1, file=source), URL)


def test_the_bare_engine_has_no_gateway_to_configure(
    fake_vllm: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(target), "--no-gateway", "--gateway-config", "x.toml"]) == 2
    assert "--gateway-config: expected the gateway, got --no-gateway beside it" in capsys.readouterr().err
    assert not fake_vllm.exists()


def test_origins_are_the_engines_without_the_gateway(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with serving(target, tmp_path, "--no-gateway", "--allow-origin", "https://a.b") as server:
        argv = post(read_url(server, gateway=False), COMPLETIONS)["argv"]
    assert argv[argv.index("--allowed-origins") + 1] == '["https://a.b"]'


@pytest.mark.slow
def test_origins_are_allowed(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with serving(target, tmp_path, "--allow-origin", "https://a.b") as server:
        request = urllib.request.Request(
            read_url(server) + COMPLETIONS, b"{}", {"Content-Type": "application/json", "Origin": "https://a.b"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "https://a.b"


def read_line(server: Any, mark: str) -> str:
    for line in server.stderr:
        if mark in line:
            return str(line)
    raise AssertionError(f"expected {mark!r}")


def test_the_file_is_read_beside_the_streams_and_with_the_engine_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thousands of keys that takes a second, in which nothing stands still, and another engine may have come."""
    file = tmp_path / "gateway.toml"
    file.write_text("[limits]\nmax_queued = 5\n")
    going, go_on, urls, other = threading.Event(), threading.Event(), list[str](), "http://127.0.0.1:8"

    def read(settings: FrontSettings, engine_url: str) -> Any:
        going.set()
        assert go_on.wait(30)
        urls.append(engine_url)
        return make_config(settings, engine_url)

    with open_front(FrontSettings(model="teacher", max_num_seqs=4, file=file, port=0), URL) as front:
        monkeypatch.setattr(front_module, "make_config", read)
        relay, seen = front._server.relay, list[Any]()
        take = relay.configure
        monkeypatch.setattr(relay, "configure", lambda config: (take(config), seen.append(config)))
        file.write_text("[limits]\nmax_queued = 6\n")
        front.reload()
        assert going.wait(30)
        front.succeed(other)  # which needs the gateway's own thread
        go_on.set()
        for _ in range(3000):
            if seen:
                break
            time.sleep(0.01)
        engine = relay.pools["teacher"].engines[0]
        assert (engine.config.url, engine.restarts, engine.returns) == (other, 1, True)
    assert urls == [URL, other]
    assert [(list_upstreams(config), config.limits.max_queued) for config in seen] == [
        ({"teacher": [("engine", other)]}, 6)
    ]


@pytest.mark.slow
def test_sighup_before_the_engine_is_there_ends_nothing(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text("")
    with serving(target, tmp_path, "--gateway-config", str(file)) as server:
        read_line(server, "engine teacher: ")
        file.write_text('[[keys]]\nname = "a"\nsha256 = "' + DIGEST + '"\n')
        server.send_signal(signal.SIGHUP)
        assert post(read_url(server), COMPLETIONS)["status"] == 401
        read_line(server, "configuration read again")


@pytest.mark.slow
def test_sighup_reads_the_file_again(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    """Before and after a restart of the engine, whose address is not in the file."""
    file = tmp_path / "gateway.toml"
    file.write_text("[limits]\nmax_queued = 5\n")
    key = '[[keys]]\nname = "a"\nsha256 = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"\n'  # "key"
    with serving(target, tmp_path, "--gateway-config", str(file)) as server:
        url = read_url(server)
        assert post(url, COMPLETIONS)["start"] == 1
        file.write_text(key)
        server.send_signal(signal.SIGHUP)
        read_line(server, "configuration read again")
        assert post(url, COMPLETIONS)["status"] == 401
        headers = {"Authorization": "Bearer key"}
        assert post(url, COMPLETIONS, headers=headers)["start"] == 1
        post(url, "/v1/die/kill", headers=headers)
        read_line(server, "starting it again in 1 s")
        file.write_text("[limits]\nmax_queued = 5\n")
        server.send_signal(signal.SIGHUP)  # while there is no engine
        read_line(server, "configuration read again")
        read_line(server, "serving again")
        assert post(url, COMPLETIONS)["start"] == 2
        file.write_text("nonsense = 1\n")
        server.send_signal(signal.SIGHUP)
        assert "going on as before" in read_line(server, "nonsense")
        assert post(url, COMPLETIONS)["start"] == 2
        post(url, "/v1/die/kill")
        read_line(server, "serving again")
        assert post(url, COMPLETIONS)["start"] == 3
        server.send_signal(signal.SIGINT)
        out, _ = server.communicate(timeout=60)
    assert server.returncode == 0
    assert json.loads(out.splitlines()[-1])["restarts"] == 2
    assert len(read_pids(fake_vllm, 3)) >= 3
