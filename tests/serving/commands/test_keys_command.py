"""`laguna keys`: the secret is printed once, the file is whole, and a gateway takes it at SIGHUP."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.serving.cli import main
from laguna_serve.serving.gateway.config import ConfigError, parse_config

MODEL = {"name": "m", "upstreams": [{"name": "a", "url": "http://127.0.0.1:9"}]}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """The exit status, the last line as JSON where there is one, and all that was said."""
    status = main(["keys", *arguments])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return status, json.loads(lines[-1]) if lines else None, said.out + said.err


def read(path: Path) -> list[dict[str, Any]]:
    return tomllib.loads(path.read_text(encoding="utf-8")).get("keys", [])


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    at = ("--file", str(path))
    limits = ("--models", "small,größe/x", "--max-in-flight", "3", "--requests-per-minute", "60")
    limits += ("--tokens-per-minute", "1000", "--tokens-per-day", "50000", "--priority", "-2")
    status, made, _ = run(capsys, "new", "agents", *at, *limits)
    assert (status, made["outcome"], made["names"]) == (0, "made", ["agents"])
    secret = made["key"]
    assert len(secret) > 40
    assert run(capsys, "new", "other", *at)[1]["key"] != secret
    digest = hashlib.sha256(secret.encode()).hexdigest()
    expected = {"name": "agents", "sha256": digest, "models": ["small", "größe/x"], "max_in_flight": 3}
    expected |= {"requests_per_minute": 60, "tokens_per_minute": 1000, "tokens_per_day": 50000, "priority": -2}
    assert read(path)[0] == expected
    config = parse_config({"models": [MODEL], "access": {"keys_file": str(path)}}, "test")
    assert [key.name for key in config.all_keys] == ["agents", "other"]
    status, listed, said = run(capsys, "list", *at)
    assert (status, listed["names"]) == (0, ["agents", "other"])
    assert digest not in said
    assert secret not in said
    assert "50,000" in said
    assert run(capsys, "revoke", "agents", *at)[1] == {
        "schema": "laguna_serve.keys/1",
        "outcome": "revoked",
        "names": ["other"],
    }
    assert run(capsys, "revoke", "other", *at)[0] == 0
    emptied = parse_config({"models": [MODEL], "access": {"keys_file": str(path)}}, "test")
    assert emptied.asks_for_keys, "whoever has revoked the last key has opened nothing"


def test_key_that_is_revoked_by_a_link_is_gone_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, link = tmp_path / "keys.toml", tmp_path / "link.toml"
    assert run(capsys, "new", "agents", "--file", str(path))[0] == 0
    link.symlink_to(path.name)
    assert run(capsys, "revoke", "agents", "--file", str(link))[0] == 0
    assert link.is_symlink()
    assert read(path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("new", "a"), "NAME: expected one that .* has not, got a; revoke it first"),
        (("revoke", "b"), r"NAME: expected a key of .* \(a\), got b"),
        (("new", "a b"), "name: expected at most 128 letters, digits and"),
        (("new", "c", "--models", "x\x01"), "models.0: expected 1 to 512 characters"),
        (("new", "c", "--tokens-per-day", "0"), "--tokens-per-day: expected at least 1, got 0"),
        (("new", "c", "--priority", "5000"), "priority: Input should be less than or equal to 1000"),
    ],
)
def test_what_cannot_be_is_a_line_and_the_file_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "keys.toml"
    run(capsys, "new", "a", "--file", str(path))
    before = path.read_bytes()
    try:
        status = main(["keys", *arguments, "--file", str(path)])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr().err
    assert status == 2
    assert len(said.splitlines()) == 1
    assert re.search(message, said)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = 3", "expected [[keys]] alone, got other tables"),
        ('[[keys]]\nname = "a"\nsha256 = "sk-secret"', "keys_file: sha256: expected the SHA-256"),
        ('[[keys]]\nname = "a"\nsecret = "sk-secret"', "keys_file: "),
        ("[[keys]", "expected TOML, got something else"),
        ("[server]\n", "expected [[keys]] alone"),
        (None, "got No such file or directory; make it with laguna keys new NAME --file FILE"),
    ],
)
def test_file_that_is_none_is_refused_without_its_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
    status, _, said = run(capsys, "list", "--file", str(path))
    assert (status, len(said.splitlines())) == (2, 1)
    assert message in said
    with pytest.raises(ConfigError) as caught:
        parse_config({"models": [MODEL], "access": {"keys_file": str(path)}}, "test")
    assert message in str(caught.value)
    assert "sk-secret" not in said + str(caught.value)


def test_one_key_in_both_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    run(capsys, "new", "a", "--file", str(path))
    for table in ({"name": "a", "sha256": "1" * 64}, {"name": "b", "sha256": read(path)[0]["sha256"]}):
        with pytest.raises(ConfigError, match="expected distinct"):
            parse_config({"models": [MODEL], "access": {"keys_file": str(path)}, "keys": [table]}, "test")


def make_one(path: str, number: int) -> None:
    main(["keys", "new", f"key-{number}", "--file", path])


@pytest.mark.slow
def test_keys_that_are_made_at_once_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=make_one, args=(str(path), number)) for number in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert sorted(table["name"] for table in read(path)) == [f"key-{number}" for number in range(4)]


def test_folder_that_is_not_there_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, said = run(capsys, "new", "a", "--file", str(tmp_path / "no" / "keys.toml"))
    assert status == 2
    assert f"--file {tmp_path / 'no' / 'keys.toml'}: expected a folder to write to, got none; make it" in said
    assert "sk-laguna-" not in said, "a key that was not written is not printed"


def ask(url: str, secret: str) -> int:
    request = urllib.request.Request(f"{url}/metrics", headers={"authorization": f"Bearer {secret}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_running_gateway_takes_the_file_at_sighup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, toml = tmp_path / "keys.toml", tmp_path / "gateway.toml"
    first = run(capsys, "new", "first", "--file", str(path))[1]["key"]
    toml.write_text(
        f'[access]\nkeys_file = "{path}"\n[[models]]\nname = "m"\n[[models.upstreams]]\nname = "a"\n'
        'url = "http://127.0.0.1:9"\n'
    )
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--config", str(toml), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            url = server.stdout.readline().split()[2]
            assert ask(url, first) == 200
            second = run(capsys, "new", "second", "--file", str(path))[1]["key"]
            run(capsys, "revoke", "first", "--file", str(path))
            assert (ask(url, first), ask(url, second)) == (200, 401), "not before it is told"
            server.send_signal(signal.SIGHUP)
            for line in server.stderr:
                if "configuration read again" in line:
                    break
            assert (ask(url, first), ask(url, second)) == (401, 200)
            path.write_text("[[keys]\n")
            server.send_signal(signal.SIGHUP)
            for line in server.stderr:
                if "going on as before" in line:
                    break
            assert ask(url, second) == 200
        finally:
            server.kill()


def test_wrong_name_beside_thousands_is_one_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("".join(f'[[keys]]\nname = "key-{i}"\nsha256 = "{i:064x}"\n' for i in range(2000)))
    assert main(["keys", "revoke", "kye-1234", "--file", str(path)]) == 2
    said = capsys.readouterr().err
    assert len(said) < 300
    assert "key-1234" in said
    assert "and 1,997 more: see laguna keys list), got kye-1234" in said
