"""Keys of laguna serve: where they come from, and where they are never seen."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest
from serving_fakes import post, read_url, serving

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.cli import main
from laguna_serve.serving.service.api_keys import describe_keys, read_keys

KEY, OTHER = "sk-first-4711", "sk-second-0815"
COMPLETIONS = "/v1/completions"


def test_keys_come_from_flags_files_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n  {OTHER}  \n{KEY}\n")
    assert read_keys([KEY], {}) == (KEY,)
    assert read_keys([f"@{file}"], {}) == (KEY, OTHER)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as editors on Windows put before a text
    assert read_keys([f"@{file}"], {}) == (KEY, OTHER)
    assert read_keys([OTHER, f"@{file}"], {"LAGUNA_API_KEY": "unused"}) == (OTHER, KEY)
    assert read_keys([], {"LAGUNA_API_KEY": KEY, "VLLM_API_KEY": OTHER}) == (KEY,)
    assert read_keys([], {"LAGUNA_API_KEY": "", "VLLM_API_KEY": OTHER}) == (OTHER,)
    assert read_keys([], {}) == ()


@pytest.mark.parametrize("key", ["", "two words", "tab\t", "schlüssel", "line\nline"])
def test_a_key_that_no_header_carries_is_refused_unseen(key: str) -> None:
    with pytest.raises(CheckpointError, match="--api-key: expected printable ASCII without spaces") as caught:
        read_keys([key], {})
    assert not key or key not in str(caught.value)


def test_files_that_hold_no_key_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, reason in (
        ("none", "No such file"),
        ("empty", "expected a key per line, got none"),
        ("binary", "bytes that are no text"),
        (".", "Is a directory"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            read_keys([f"@{tmp_path / name}"], {})
        assert "\n" not in str(caught.value)


def test_the_gateway_is_given_digests() -> None:
    assert describe_keys([KEY, OTHER])[1] == {
        "name": "api-key-2",
        "sha256": hashlib.sha256(OTHER.encode()).hexdigest(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("source", ["flag", "file", "environment"])
@pytest.mark.parametrize("bare", [False, True], ids=["gateway", "bare"])
def test_keys_are_asked_for_and_seen_nowhere(
    fake_vllm: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, bare: bool
) -> None:
    (tmp_path / "keys").write_text(KEY)
    flags = {"flag": ["--api-key", KEY], "file": ["--api-key", f"@{tmp_path / 'keys'}"], "environment": []}[source]
    if source == "environment":
        monkeypatch.setenv("LAGUNA_API_KEY", KEY)
    with serving(target, tmp_path, *flags, *(["--no-gateway"] if bare else [])) as server:
        url = read_url(server, gateway=not bare)
        told = post(url, COMPLETIONS, headers={"Authorization": f"Bearer {KEY}"})
        if bare:  # the fake lets everybody in; vLLM reads this variable
            assert told["environment"]["VLLM_API_KEY"] == KEY
        else:
            assert KEY not in json.dumps(told), "the engine need not know it"
            assert post(url, COMPLETIONS)["status"] == 401
            assert post(url, COMPLETIONS, headers={"x-api-key": KEY})["start"] == 1
        assert KEY not in json.dumps(told["argv"])
        assert "LAGUNA_API_KEY" not in told["environment"]
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    assert server.returncode == 0
    assert KEY not in out + err + (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
@pytest.mark.parametrize("keyed", [False, True])
def test_an_open_door_is_told_once(fake_vllm: Path, target: Path, tmp_path: Path, host: str, keyed: bool) -> None:
    flags = ["--host", host, *(["--api-key", KEY] if keyed else [])]
    with serving(target, tmp_path, *flags) as server:
        read_url(server)
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=60)
    assert err.count("everybody who can reach it may ask; give --api-key") == (host == "0.0.0.0" and not keyed)


def test_the_bare_engine_takes_one_key(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(target), "--no-gateway", "--api-key", KEY, "--api-key", OTHER]) == 2
    err = capsys.readouterr().err
    assert "--api-key: expected one key with --no-gateway, as vLLM takes, got 2" in err
    assert KEY not in err
