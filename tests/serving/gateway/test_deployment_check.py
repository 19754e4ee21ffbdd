"""laguna doctor --deployment: what stands between a configuration and its users."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from gateway_fakes import Upstream

from laguna_serve.serving.cli import main
from laguna_serve.serving.gateway.config import parse_config
from laguna_serve.serving.service import deployment
from laguna_serve.serving.service.deployment import format_deployment, inspect_deployment

KEY = {"name": "one", "sha256": "0" * 64}


def inspect(engine: str, *, server: dict[str, Any] | None = None, **tables: Any) -> dict[str, bool]:
    """What is missing → whether that is serious."""
    upstream = {"name": "a", "url": engine, "max_in_flight": 8}
    given = {"server": server or {}, "models": [{"name": "m", "upstreams": [upstream]}], "health": {"timeout_s": 1.0}}
    result = inspect_deployment(parse_config(given | tables, "gateway.toml"), "gateway.toml")
    assert result.ok == (not any(gap.serious for gap in result.gaps))
    return {gap.what.partition(":")[0]: gap.serious for gap in result.gaps}


def write_certificate(folder: Path, days: float) -> dict[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(days=9)).not_valid_after(now + datetime.timedelta(days=days))
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(private)
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


def test_gateway_for_this_machine_alone_wants_nothing() -> None:
    with Upstream() as engine:
        assert inspect(engine.url) == {}


def test_open_door_is_serious() -> None:
    with Upstream() as engine:
        assert inspect(engine.url, server={"host": "0.0.0.0"}) == {"keys": True, "TLS": False}
        assert inspect(engine.url, server={"host": "0.0.0.0"}, keys=[KEY]) == {"TLS": False}
        behind = {"host": "0.0.0.0", "trusted_proxies": ["10.0.0.0/8"]}
        assert inspect(engine.url, server=behind, keys=[KEY]) == {"balancer": False}
        assert inspect(engine.url, server=behind | {"lame_duck_s": 10.0}, keys=[KEY]) == {}


@pytest.mark.parametrize(("days", "found"), [(300, {}), (5, {"certificate": False}), (-1, {"certificate": True})])
def test_certificate_that_ends_is_told(tmp_path: Path, days: float, found: dict[str, bool]) -> None:
    with Upstream() as engine:
        server = {"host": "0.0.0.0", **write_certificate(tmp_path, days)}
        assert inspect(engine.url, server=server, keys=[KEY]) == found


def test_engines_that_are_not_there_are_told() -> None:
    assert inspect("http://127.0.0.1:9") == {"engine": True}
    with Upstream() as engine:
        engine.healthy = False
        assert inspect(engine.url) == {"engine": True}


def test_limits_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "find_hard_limit", lambda: 64)
    monkeypatch.setattr(deployment, "_refuses", lambda _folder: "Permission denied")
    with Upstream() as engine:
        access = {"usage_file": str(tmp_path / "usage.json")}
        assert inspect(engine.url, access=access) == {"open files": True, "usage": True}


def test_budgets_without_a_file_are_forgotten() -> None:
    with Upstream() as engine:
        assert inspect(engine.url, keys=[{**KEY, "tokens_per_day": 1000}]) == {"budgets": False}


def test_command_says_it_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gateway.toml"
    tables = '[[models]]\nname = "m"\n[[models.upstreams]]\nname = "a"\nurl = "http://127.0.0.1:9"\n'
    path.write_text(f'[server]\nhost = "0.0.0.0"\n{tables}')
    assert main(["doctor", "--deployment", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["missing", "missing", "advised"]
    assert "engine: a of m at http://127.0.0.1:9 is not well" in "\n".join(lines)
    assert json.loads(lines[-1])["schema"] == "laguna_serve.deployment/1"
    path.write_text("models = 3")
    assert main(["doctor", "--deployment", str(path)]) == 2
    assert main(["doctor", "m", "--deployment", str(path)]) == 2
    with Upstream() as engine:
        path.write_text(tables.replace("http://127.0.0.1:9", engine.url))
        assert main(["doctor", "--deployment", str(path)]) == 0
        assert "nothing is missing that can be seen from here" in capsys.readouterr().out


def test_serious_gaps_come_first() -> None:
    gaps = [deployment.Gap(what="b", remedy=""), deployment.Gap(what="a", remedy="", serious=True)]
    text = format_deployment(deployment.DeploymentResult(configuration="c", ok=False, gaps=tuple(gaps)))
    assert [line.split()[1] for line in text.splitlines()[1:]] == ["a", "b"]
