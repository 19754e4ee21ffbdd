"""Where a server may listen: names and addresses of every form, each bound or refused in a line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from laguna_serve.serving.cli import main
from laguna_serve.serving.planning.launch import EngineError, find_port, hold_port, require_port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::", ""])
def test_own_addresses_have_a_port(host: str) -> None:
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    assert require_port(host, find_port(host)) > 0


def test_name_with_addresses_of_both_kinds_is_bound_as_vllm_binds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    for found, family in (([six, four], socket.AF_INET), ([six], socket.AF_INET6)):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found, **__: found)
        with hold_port("both", 0) as held:
            assert held.family == family


@pytest.mark.parametrize("host", ["/tmp/x.sock", "999.1.1.1", "[::1]", "a..b", "a" * 300])
def test_what_is_no_host_is_called_so(host: str) -> None:
    with pytest.raises(EngineError, match=r"^host: expected an address of this machine, .*; choose another --host$"):
        find_port(host)


@pytest.mark.parametrize("flags", [[], ["--no-gateway"], ["--dry-run"]], ids=lambda flags: " ".join(flags) or "gateway")
def test_host_is_refused_before_an_engine_starts(
    flags: list[str], target: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(target), "--host", "/tmp/x.sock", "--port", "0", *flags]) == 2
    assert capsys.readouterr().err.startswith("laguna: error: host: expected an address of this machine")


def test_second_model_that_is_not_there_is_refused_before_anything_listens(
    target: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(target), "/no/such/model", "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("laguna: error: /no/such/model: expected an existing folder or a hub id")


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--port", "-1", "at least 0"),
        ("--port", "65536", "at most 65535"),
        ("--max-num-seqs", "0", "at least 1"),
        ("--max-model-len", "0", "at least 1"),
    ],
)
def test_number_out_of_bounds_is_named(
    flag: str, value: str, expected: str, target: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(target), flag, value, "--dry-run"])
    assert f"{flag}: expected {expected}, got {value}" in capsys.readouterr().err
