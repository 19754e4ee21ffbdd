"""Errors about a configuration: all of them, in words, in one line, and without a secret."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from test_config import GOOD, write

from laguna_serve.serving.gateway.config import ConfigError, load_config, parse_config


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("port = 0", "prot = 0\nmax_queued = 3").replace("max_queued = 8", 'max_queued = "8"')
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text.replace('"prefix"', '"luck"')))
    for told in (
        "server.prot: expected no such key; did you mean port?",
        "server.max_queued: expected no such key; it belongs in limits",
        "limits.max_queued: expected an integer, got '8'",
        "models.0.affinity: expected 'none', 'session' or 'prefix', got 'luck'",
    ):
        assert told in str(caught.value)
    assert "\n" not in str(caught.value)


SECRET, NUMBER = "sk-live-secret", 271828182845


@pytest.mark.parametrize(
    "text",
    [
        f'[[keys]]\nname = "k"\nsha256 = "{SECRET}"\n',
        f'[[keys]]\nname = "k"\nsha256 = ["{SECRET}"]\n',
        f'[[keys]]\nname = "k"\nsha256 = {{value = "{SECRET}"}}\n',
        f'[[keys]]\nname = "k"\nkey = "{SECRET}"\n',
        f'[[keys]]\nname = 3\nsha256 = "{SECRET}"\nsha = "{SECRET}"\n',
        f'[admin]\nsha256 = "{SECRET}"\n',
        f"[admin]\nsha256 = {NUMBER}\n",
        f'[admin]\nkey = "{SECRET}"\nhost = "0.0.0.0"\n',
    ],
)
def test_key_in_the_place_of_its_digest_is_never_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, GOOD + text))
    assert SECRET not in str(caught.value)
    assert str(NUMBER) not in str(caught.value)
    assert "sha256" in str(caught.value) or "expected no such key" in str(caught.value)


@pytest.mark.parametrize("tables", [f'keys = ["{SECRET}"]\n', f'keys = "{SECRET}"\n', f'admin = "{SECRET}"\n'])
def test_key_in_the_place_of_a_table_is_never_shown(tmp_path: Path, tables: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a (table|list), got a string") as caught:
        load_config(write(tmp_path, tables + GOOD))
    assert SECRET not in str(caught.value)


def test_refused_digest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'printf %s "\$KEY" \| sha256sum'):
        load_config(write(tmp_path, GOOD + f'[[keys]]\nname = "k"\nsha256 = "{SECRET}"\n'))


def test_digest_of_nothing_is_refused(tmp_path: Path) -> None:
    nothing = hashlib.sha256(b"").hexdigest()
    for table in ('[[keys]]\nname = "k"', "[admin]"):
        with pytest.raises(ConfigError, match="that of no characters at all"):
            load_config(write(tmp_path, f'{GOOD}{table}\nsha256 = "{nothing}"\n'))


def test_digest_in_capitals_is_one() -> None:
    digest = hashlib.sha256(b"sk").hexdigest()
    models = [{"name": "m", "upstreams": [{"name": "a", "url": "http://h:1"}]}]
    config = parse_config({"models": models, "keys": [{"name": "k", "sha256": digest.upper()}]}, "test")
    assert config.keys[0].sha256 == digest


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[server]\nport = 8080\n[admin]\nport = 8080\n", "expected distinct ports of server and admin, got 8080"),
        ('[server]\nssl_keyfile = "/k"\n', "server: expected ssl_certfile beside ssl_keyfile, got none"),
        (
            '[server]\nssl_certfile = "/nowhere.pem"\n',
            "ssl_certfile: expected a file that can be read, got No such file",
        ),
        ('[server]\nssl_certfile = "/dev/null"\n', "ssl_certfile: expected a file, got something else"),
        ('[server]\nmore_paths = ["metrics"]\n', "expected a path that begins with /"),
        ('[server]\nallowed_origins = ["https://a/"]\n', "no slash at the end"),
        ('[server]\ntrusted_proxies = ["10.0.0.1/8"]\n', 'expected an address or a network such as "10.0.0.0/8"'),
        ('[health]\npath = "health"\n', "health.path: expected a path that begins with /"),
        ("[health]\nfailures = 0\n", "health.failures: expected at least 1, got 0"),
        ("[limits]\nqueue_timeout_s = inf\n", "expected at most 86,400, got inf"),
        ('"a\\nb" = 1\n', "'a\\nb': expected no such key"),
    ],
)
def test_words_for_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            write(tmp_path, text + GOOD.replace("[server]\nport = 0\n", "").replace("[limits]\nmax_queued = 8\n", ""))
        )
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


BASE = '[[models]]\nname = "m"\nupstreams = [{ name = "a", url = "https://h:1" }]\n'
OWNED = '[[models]]\nname = "m"\nengine = { model = "org/name", %s }\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BASE + f"[server]\nport = {'9' * 5000}\n", "expected TOML, got Exceeds the limit"),
        (BASE + f"x = {'[' * 3000}{']' * 3000}\n", "expected TOML, got tables or lists that are nested too deeply"),
        *(
            (BASE.replace('"m"', f'"m{mark}"'), "models.0.name: expected 1 to 512 characters, none of them a control")
            for mark in ("\\u0085", "\\u009b2J", "\\u2028", "\\u2029", "\\u007f")
        ),
        (BASE + '[access]\nkeys_file = "a\\u0000"\n', "keys_file: expected the name of a file, got one with"),
        (BASE + '[server]\nssl_certfile = "a\\u0000"\n', "ssl_certfile: expected the name of a file, got one with"),
        (BASE.replace(" }", ', tls_ca_file = "\\u0000" }'), "tls_ca_file: expected the name of a file, got one with"),
        (OWNED % 'log = "a\\u0000"', "engine.log: expected a file's name"),
        (OWNED % 'extra_args = ["\\u0000"]', "engine: expected model and extra_args without the character NUL"),
    ],
)
def test_what_no_system_takes_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "gateway.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "gateway.toml")
    assert told in str(raised.value)
    assert str(raised.value).isprintable()


def test_mark_of_other_systems_editors_is_passed_over(tmp_path: Path) -> None:
    """They put U+FEFF in front."""
    keys = '[[keys]]\nname = "k"\nsha256 = "{}"\n'.format("a" * 64)
    (tmp_path / "keys.toml").write_text(keys, encoding="utf-8-sig")
    text = BASE + f'[access]\nkeys_file = "{tmp_path}/keys.toml"\n'
    (tmp_path / "gateway.toml").write_text(text, encoding="utf-8-sig")
    assert [key.name for key in load_config(tmp_path / "gateway.toml").all_keys] == ["k"]


def test_keys_are_distinct(tmp_path: Path) -> None:
    keys = "".join(f'[[keys]]\nname = "{name}"\nsha256 = "{"0" * 64}"\n' for name in "kl")
    with pytest.raises(ConfigError, match="one for both 'k' and 'l'") as caught:
        load_config(write(tmp_path, GOOD + keys))
    assert "000" not in str(caught.value)


def test_certificate_and_key_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    table = f'[server]\nssl_certfile = "{tmp_path}/cert.pem"\n'
    with pytest.raises(ConfigError, match="server: expected a certificate and its private key in PEM"):
        load_config(write(tmp_path, GOOD.replace("[server]", table)))
