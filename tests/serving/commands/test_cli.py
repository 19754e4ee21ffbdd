"""The laguna command: help, one-line errors, exit statuses, and a server that ends on a signal."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from serving_fakes import LAGUNA, read_pids, read_url, serving, wait_until_gone

from laguna_serve.serving.cli import COMMANDS, main
from laguna_serve.serving.commands.serve import ServeConfig, engine_config, rehearse
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import FlagError, read_flags
from laguna_serve.serving.planning.launch import require_device
from laguna_serve.serving.planning.plan import make_plan
from laguna_serve.serving.supervision.default_logs import find_replica_log, find_serve_log

TOY = Path(__file__).resolve().parents[2] / "toy"


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["serve", "--help"]], ids=" ".join)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "examples:\n  laguna " in capsys.readouterr().out


def test_version_names_the_packages_that_decide(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    shown = dict(line.split(" ") for line in capsys.readouterr().out.splitlines())
    assert shown["laguna-serve"] == metadata.version("laguna-serve")
    assert {"torch", "transformers"} <= set(shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see `laguna --help`"),
        (["serve"], "the following arguments are required: model; see `laguna serve --help`"),
        (
            ["serve", "m", "--draft", "d", "--gamma", "seven"],
            "argument --gamma: expected a number or max, got 'seven'; see `laguna serve --help`",
        ),
        (
            ["serve", "m", "--draft", "d", "--gamma", "0"],
            "argument --gamma: expected at least 1 or max, got 0; leave --draft out to serve without; "
            "see `laguna serve --help`",
        ),
        (["serve", "m", "--port", "x"], "argument --port: invalid int value: 'x'; see `laguna serve --help`"),
        (["traces", "list", "f", "--nonsense"], "unrecognized arguments: --nonsense; see `laguna traces list --help`"),
        *(
            (
                [command, "m", "--enforce-eager"],
                "unrecognized arguments: --enforce-eager; vLLM's own flags go behind a bare --; "
                f"see `laguna {command} --help`",
            )
            for command in ("serve", "doctor")
        ),
    ],
    ids=[
        "no-command",
        "no-model",
        "gamma-in-words",
        "no-gamma",
        "bad-port",
        "unknown-flag",
        "vllms-flag-to-serve",
        "vllms-flag-to-doctor",
    ],
)
def test_usage_error_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err == f"laguna: error: {message}\n"


def read_serve(*argv: str) -> ServeConfig:
    return read_flags(ServeConfig, argv, prog="laguna serve", description=None)


def test_serve_flags_become_a_configuration(target: Path, drafter: Path) -> None:
    flags = "--gamma 3 --port 8001 --host 0.0.0.0 --max-model-len 512 --max-num-seqs 4 --dtype float32 --eager"
    more = "--no-prefix-caching --kv-cache-gib 0.5 --served-model-name m --seed 9 --draft-sampling probabilistic"
    extra_args = ("--max-num-batched-tokens", "64")
    given = read_serve(str(target), "--draft", str(drafter), *flags.split(), *more.split())
    config = engine_config(replace(given, extra_args=extra_args))
    assert (config.model, config.draft, config.gamma) == (str(target), str(drafter), 3)
    assert (config.host, config.port, config.served_model_name) == ("0.0.0.0", 8001, "m")
    assert (config.max_model_len, config.max_num_seqs, config.dtype) == (512, 4, "float32")
    assert (config.enforce_eager, config.prefix_caching, config.kv_cache_gib, config.seed) == (True, False, 0.5, 9)
    assert (config.draft_sampling, config.extra_args) == ("probabilistic", ("--max-num-batched-tokens", "64"))


def test_gamma_max_is_what_the_drafter_was_trained_for(target: Path, drafter: Path) -> None:
    assert engine_config(read_serve(str(target), "--draft", str(drafter), "--gamma", "max")).gamma is None


def test_a_python_caller_makes_the_same_configuration(target: Path, drafter: Path) -> None:
    made = ServeConfig(model=str(target), draft=str(drafter), gamma=3, api_key=("a", "b"), restart=False)
    flags = ["--draft", str(drafter), "--gamma", "3", "--api-key", "a", "--api-key", "b", "--no-restart"]
    assert read_serve(str(target), *flags) == made
    with pytest.raises(FlagError, match="--thinking: expected one of on, off, template, got perhaps"):
        ServeConfig(model="m", thinking="perhaps")  # type: ignore[arg-type]


def test_rehearsal_that_is_refused_shows_no_command(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = replace(make_plan(EngineConfig(str(target)), require_device()), refusals=("no room",), command=())
    monkeypatch.setattr("laguna_serve.serving.commands.serve.make_plan", lambda *_: refused)
    assert rehearse(EngineConfig(str(target)), None) == refused


@pytest.mark.slow
def test_command_line_starts_without_the_stack() -> None:
    """torch and vLLM take seconds to import, and the serving side needs neither."""
    probe = "import sys; import laguna_serve.serving.cli; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = subprocess.run([*LAGUNA, name, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: laguna {name} ")


@pytest.mark.vllm
@pytest.mark.parametrize(("command", "status"), [(["doctor"], 1), (["serve", "--dry-run"], 2)])
def test_flags_that_vllm_does_not_know_are_refused_by_every_plan(
    capsys: pytest.CaptureFixture[str], command: list[str], status: int
) -> None:
    asked = [*command, str(TOY / "teacher"), "--"]
    assert main([*asked, "--max-num-batched-tokens", "64"]) == 0
    capsys.readouterr()
    assert main([*asked, "--nosuch-flag"]) == status
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    got = "got unrecognized arguments: --nosuch-flag; fix them"
    assert (plan["ok"], plan["refusals"]) == (False, [f"vLLM's flags: expected those that it knows, {got}"])


def test_log_lies_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_serve_log(8001) == tmp_path / "laguna-serve" / "serve-8001.log"
    folder = tmp_path / "laguna-serve"
    folder.mkdir()
    for number in range(30):
        for prefix in ("serve-pid-", "ray-"):
            (folder / f"{prefix}{number}.log").write_text("")
    assert find_serve_log(0) == folder / f"serve-pid-{os.getpid()}.log"
    assert find_replica_log("r#1") == folder / "ray-r#1.log"
    assert len(list(folder.glob("serve-pid-*"))) == len(list(folder.glob("ray-*"))) == 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_serve_runs_until_told_to_end(fake_vllm: Path, target: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and so it would stay
    with serving(target, tmp_path, "--", "--max-num-batched-tokens", "64") as server:
        signal.signal(signal.SIGHUP, before)
        url = read_url(server)
        server.send_signal(number)
        out, err = server.communicate(timeout=30)
    assert server.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["outcome"], result["url"], result["log"]) == ("stopped", url, str(tmp_path / "log"))
    assert "engine teacher: ready at" in err
    wait_until_gone(read_pids(fake_vllm, 3), timeout_s=0)


def ask_ready(url: str) -> int:
    """The gateway's /ready, which an engine does not have."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.slow
def test_serve_puts_the_gateway_in_front(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with serving(target, tmp_path) as server:
        url = read_url(server)
        deadline = time.monotonic() + 10
        while ask_ready(url) != 200:
            assert time.monotonic() < deadline
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    assert server.returncode == 0


@pytest.mark.slow
def test_serve_without_the_gateway_is_the_bare_engine(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with serving(target, tmp_path, "--no-gateway") as server:
        assert ask_ready(read_url(server, gateway=False)) == 404


@pytest.mark.slow
def test_serve_refuses_a_taken_port_before_an_engine_starts(fake_vllm: Path, target: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [*LAGUNA, "serve", str(target), "--port", str(taken.getsockname()[1])]
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2
    assert "to be free" in run.stderr
    assert not fake_vllm.exists()


@pytest.mark.slow
def test_serve_tells_when_the_engine_dies(fake_vllm: Path, target: Path, tmp_path: Path) -> None:
    with serving(target, tmp_path, "--no-restart") as server:
        connection = http.client.HTTPConnection(read_url(server).removeprefix("http://"), timeout=5)
        with suppress(http.client.HTTPException, OSError):
            connection.request("POST", "/v1/die")
            connection.getresponse()
        connection.close()
        out, err = server.communicate(timeout=30)
    assert server.returncode == 1
    assert "laguna: error: engine teacher: expected it to run, got exit status 1: Worker proc" in err
    assert json.loads(out.splitlines()[-1])["outcome"] == "died"
    wait_until_gone(read_pids(fake_vllm, 3), timeout_s=0)


def test_interruption_before_a_command_handles_it_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it imports what it needs, as the checkpoint tools do for seconds; and all of `laguna doctor`."""

    def interrupt(argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "doctor", (interrupt, "…"))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "laguna: interrupted; nothing was written\n"


@pytest.mark.slow
def test_serve_interrupted_at_start_leaves_nothing(
    fake_vllm: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")
    with serving(target, tmp_path) as server:
        members = read_pids(fake_vllm, 3)
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=30)
    assert server.returncode == 2
    assert err.splitlines()[-1].startswith("laguna: error: engine teacher: interrupted before it was ready")
    wait_until_gone(members, timeout_s=0)


@pytest.mark.slow
def test_serve_refuses_bad_input_in_one_line() -> None:
    command = [*LAGUNA, "serve", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("laguna: error: /no/such/model: expected an existing folder or a hub id")
    assert len(done.stderr.splitlines()) == 1
