"""What says how a hub's model is served is there before its flags are chosen, at the first start as at every other."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from laguna_serve.serving.chat.release import assume_release
from laguna_serve.serving.engine.hub import fetch_description

RELEASES = Path(__file__).parents[2] / "fixtures" / "releases"
COMMIT = "a" * 40
PROGRAM = """
import json, sys
from laguna_serve.serving.chat.vendor_defaults import ChatOptions
from laguna_serve.serving.engine.hub import fetch_description
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.planning.inspection import inspect
model, draft = sys.argv[1:]
notes = [fetch_description(model), fetch_description(draft, drafter=True)]
found = inspect(EngineConfig(model, draft=draft, chat=ChatOptions()), weights=False)
flags = [flag.name for flag in found.chat.flags]
print(json.dumps({"notes": notes, "gamma": found.gamma, "flags": flags, "bytes": found.target_bytes}))
"""


@contextmanager
def hub(**models: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub with these models of "poolside", and what was asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            asked.append(f"{self.command} {path}")
            parts = path.split("/")
            listing = parts[:2] == ["api", "models"]
            folder = models.get((parts[3] if listing else parts[1]).replace(".", "_").replace("-", "_"))
            if folder is None:
                self.send_error(404)
                return
            if listing:
                names = [*sorted(file.name for file in folder.iterdir()), "model-00001-of-00002.safetensors"]
                tree = [{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in names]
                siblings = [{"rfilename": name} for name in names]
                info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}
                body = json.dumps(tree if "tree" in parts else info).encode()
            else:
                body = (folder / parts[-1]).read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def run(url: str, cache: Path, model: str, draft: str) -> dict[str, object]:
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "PATH": "/usr/bin:/bin", "HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model, draft], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_first_start_has_the_flags_of_every_other(tmp_path: Path) -> None:
    """γ by the drafter's block, thinking by the release: nothing of either was on this machine."""
    release = tmp_path / "release"
    release.mkdir()
    for file in (RELEASES / "Laguna-S-2.1").iterdir():
        (release / file.name).write_bytes(file.read_bytes())
    (release / "tokenizer_config.json").write_text("{}")
    model, draft = "poolside/Laguna-S-2.1", "poolside/Laguna-S-2.1-DFlash"
    drafter = RELEASES / "Laguna-S-2.1-DFlash"
    with hub(Laguna_S_2_1=release, Laguna_S_2_1_DFlash=drafter) as (url, asked):
        first = run(url, tmp_path / "cache", model, draft)
        assert not any("safetensors" in line and "index" not in line for line in asked)
        count = len(asked)
        again = run(url, tmp_path / "cache", model, draft)
        assert len(asked) == count, "what is here is not asked for"
    assert first == again
    assert first["notes"] == [None, None]
    assert first["gamma"] == json.loads((drafter / "config.json").read_text())["dflash_config"]["block_size"] - 1
    assert "--default-chat-template-kwargs" in str(first["flags"])
    assert int(str(first["bytes"])) > 1 << 36, "planned by config.json"


@pytest.mark.slow
def test_hub_that_has_no_such_model_is_said_in_a_line(tmp_path: Path) -> None:
    program = "from laguna_serve.serving.engine.hub import fetch_description as f; print(f('poolside/nothing'))"
    with hub() as (url, _):
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
    (line,) = done.stdout.splitlines()
    assert line.startswith("poolside/nothing: its configuration could not be fetched (")
    assert line.endswith("); flags are chosen by its name")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE"])
def test_nothing_is_asked_of_a_hub_that_is_not_to_be(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert fetch_description("poolside/Laguna-XS.2") is None


def test_folders_are_nothing_to_fetch(tmp_path: Path) -> None:
    assert fetch_description(str(tmp_path)) is None
    assert fetch_description(str(tmp_path / "no" / "such")) is None


def test_what_is_known_of_a_name_is_the_releases() -> None:
    """Should the hub not answer, thinking is as it will be when it has."""
    for name in ("Laguna-S-2.1", "Laguna-S-2.1-FP8", "Laguna-XS.2", "Laguna-XS-2.1-NVFP4", "Laguna-M.1"):
        told = json.loads((RELEASES / name / "generation_config.json").read_text()).get("default_chat_template_kwargs")
        assert dict(assume_release(f"poolside/{name}").template_kwargs) == (told or {})
