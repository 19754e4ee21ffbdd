"""Whatever can be refused is refused before the first engine starts, by every command that starts several."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mock_engine import MockEngine, Settings

from laguna_serve.bench import ab, certify, gamma_sweep, prefix_cache, rollouts, sampling
from laguna_serve.bench.arms import arms
from laguna_serve.evals import invariance
from laguna_serve.serving.kit.flags import read_flags
from laguna_serve.serving.kit.run_dir import claim_folder
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.planning import launch

TOY = Path(__file__).resolve().parents[2] / "toy"
PROMPTS = ["--prompts", str(TOY / "prompts.jsonl")]
NOBODY = "http://127.0.0.1:9"
Main = Callable[[list[str]], int]
# The command, its other arguments, and what γ is called there.
COMMANDS: dict[str, tuple[Main, list[str], str]] = {
    "ab": (ab.main, [*PROMPTS, "--quick"], "--gamma"),
    "ab-certify": (ab.main, [*PROMPTS, "--quick", "--certify", "--sequential"], "--gamma"),
    "certify": (certify.main, [*PROMPTS, "--quick"], "--gamma"),
    "gamma_sweep": (gamma_sweep.main, [*PROMPTS, "--quick"], "--gammas"),
    "sampling": (sampling.main, [*PROMPTS, "--quick"], "--gammas"),
    "rollouts": (rollouts.main, [*PROMPTS], "--gamma"),
    "prefix_cache": (prefix_cache.main, [*PROMPTS, "--quick"], "--gamma"),
    "invariance": (invariance.main, ["--form", "completion", "--walls", "none"], "--gamma"),
}
each_command = pytest.mark.parametrize("command", COMMANDS)
each_benchmark = pytest.mark.parametrize("command", [name for name in COMMANDS if name != "invariance"])
each_arm = pytest.mark.parametrize("name", ["ab", "ab-certify", "certify", "invariance"])


class NoEngine:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; give the line that says why."""
    monkeypatch.setattr(arms, "Engine", NoEngine)

    def run(command: str, *flags: str, model: Path = TOY / "teacher", draft: Path | None = TOY / "dflash") -> str:
        main, more, _ = COMMANDS[command]
        pair = ["--model", str(model), *([] if draft is None else ["--draft", str(draft)])]
        try:
            status = main([*pair, *more, "--out", str(tmp_path / "out"), *flags])
        except SystemExit as error:  # argparse, after its usage
            status = int(error.code or 0)
        lines = capsys.readouterr().err.splitlines()
        assert status == 2, lines
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return run


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a toy checkpoint with some of its config changed."""

    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path / f"changed-{name}"
        shutil.copytree(TOY / name, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return make


@each_command
def test_gamma_beyond_the_block(refuse: Callable[..., str], command: str) -> None:
    flag = COMMANDS[command][2]
    assert "expected 1 to 7" in (line := refuse(command, flag, "9")) or "expected at most 7" in line


@each_command
def test_drafter_that_does_not_fit(refuse: Callable[..., str], copy: Callable[..., Path], command: str) -> None:
    ids = json.loads((TOY / "dflash" / "config.json").read_text())["dflash_config"]
    changes = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5, 100]}
    misfit = copy("dflash", dflash_config=ids | {"target_layer_ids": [1, 3, 4, 99]}, **changes)
    assert "expected target layer ids from 0 to 5, got [99]" in refuse(command, draft=misfit)


@each_command
def test_target_as_a_drafter(refuse: Callable[..., str], command: str) -> None:
    assert "expected a DFlash drafter, got LagunaForCausalLM" in refuse(command, draft=TOY / "teacher")


@each_command
@pytest.mark.parametrize("what", ["model", "draft"])
def test_weights_that_are_cut_off(
    refuse: Callable[..., str], copy: Callable[..., Path], command: str, what: str
) -> None:
    broken = copy("teacher" if what == "model" else "dflash")
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "expected a whole safetensors file" in refuse(command, **{what: broken})


@each_command
@pytest.mark.parametrize("what", ["model", "draft"])
def test_checkpoint_that_is_not_there(refuse: Callable[..., str], tmp_path: Path, command: str, what: str) -> None:
    assert "expected an existing folder or a hub id" in refuse(command, **{what: tmp_path / "none"})


@each_command
def test_memory_that_cannot_suffice(refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(launch, "find_device", lambda _install: Device("cpu", "a small one", 1 << 30, 1 << 30))
    assert refuse(command).split(": ", 1)[1].startswith("error: memory of a small one: expected ")


@each_command
def test_dtype_that_there_is_none_of(refuse: Callable[..., str], command: str) -> None:
    assert "dtype: expected auto, half, float16, bfloat16, float, float32, got 'float8'" in refuse(
        command, "--dtype", "float8"
    )


@each_benchmark
def test_folder_that_cannot_be_one(refuse: Callable[..., str], tmp_path: Path, command: str) -> None:
    (tmp_path / "a-file").write_text("")
    line = refuse(command, "--out", str(tmp_path / "a-file" / "below"))
    assert f"expected a folder, got the file {tmp_path / 'a-file'}; choose another" in line


@each_benchmark
def test_prompts_that_are_not_there(refuse: Callable[..., str], tmp_path: Path, command: str) -> None:
    line = refuse(command, "--prompts", str(tmp_path / "none.jsonl"))
    assert "none.jsonl: expected a prompts file, got No such file or directory; check --prompts" in line


@each_benchmark
def test_more_prompts_than_there_are(refuse: Callable[..., str], command: str) -> None:
    flags = ["--batch", "4096"] if command == "rollouts" else ["--num-prompts", "100000"]
    line = refuse(command, *flags)
    assert re.search(r"expected (at most 512, got 100000|prompts enough for 100000|6144 of them)", line), line


@each_benchmark
def test_prompts_that_are_no_json(refuse: Callable[..., str], tmp_path: Path, command: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\nnonsense\n')
    assert "bad.jsonl:2: expected one JSON object, got invalid JSON" in refuse(
        command, "--prompts", str(tmp_path / "bad.jsonl")
    )


@pytest.mark.parametrize("command", ["certify", "gamma_sweep", "sampling", "rollouts", "prefix_cache"])
def test_folder_of_another_measurement(refuse: Callable[..., str], tmp_path: Path, command: str) -> None:
    for name in ("passes", "points", "samples"):
        claim_folder(tmp_path / "out" / name, {"of": "another"})
    assert "got another one's; choose another --out or remove it" in refuse(command)


@pytest.mark.parametrize("command", ["gamma_sweep", "sampling", "rollouts"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline-url", NOBODY], "--baseline-url and --candidate-url: expected both or neither, got one"),
        (["--candidate-url", f"7={NOBODY}"], "--baseline-url and --candidate-url: expected both or neither, got one"),
        (["--baseline-url", NOBODY, "--candidate-url", NOBODY], "expected γ=URL like 7=http://127.0.0.1:8001"),
        (["--baseline-url", NOBODY, "--candidate-url", f"7={NOBODY}"], "expected a list of models, got"),
        (["--baseline-url", NOBODY, *["--candidate-url", f"7={NOBODY}"] * 2], "--candidate-url: expected one"),
    ],
)
def test_endpoints(refuse: Callable[..., str], command: str, flags: list[str], message: str) -> None:
    assert message in refuse(command, *flags)


def test_endpoint_that_asks_for_a_key(refuse: Callable[..., str]) -> None:
    with MockEngine(Settings(key="k")) as engine:
        urls = ["--baseline-url", engine.url, "--candidate-url", engine.url]
        line = refuse("ab", *urls, draft=None)
    assert "401" in line
    assert line.endswith("name the engine's own address: no key is sent")


@pytest.mark.parametrize("command", ["ab", "certify", "gamma_sweep", "sampling", "rollouts"])
def test_endpoint_of_another_model(refuse: Callable[..., str], command: str) -> None:
    with MockEngine() as engine:
        candidate = engine.url if command in ("ab", "certify") else f"7={engine.url}"
        urls = ["--baseline-url", engine.url, "--candidate-url", candidate]
        line = refuse(command, *urls, model=Path("theirs"), draft=None if candidate == engine.url else TOY / "dflash")
    assert f"{engine.url}: expected a server of 'theirs', got one of 'fake'; name that with --model" in line


@each_arm
@pytest.mark.parametrize("arm", ["baseline", "candidate"])
def test_flags_that_are_the_launchers(refuse: Callable[..., str], name: str, arm: str) -> None:
    assert "--port: expected it from the launcher" in refuse(name, f"--{arm}-args=--port 9")


@each_arm
@pytest.mark.parametrize("arm", ["baseline", "candidate"])
def test_flags_with_an_open_quote(refuse: Callable[..., str], name: str, arm: str) -> None:
    assert f"--{arm}-args: expected flags as in a shell, got no closing quotation" in refuse(name, f"--{arm}-args='")


@each_arm
def test_other_candidate_that_is_not_there(refuse: Callable[..., str], tmp_path: Path, name: str) -> None:
    line = refuse(name, "--candidate-model", str(tmp_path / "none"))
    assert "none: expected an existing folder or a hub id" in line


def test_ablations_checkpoint_that_is_not_there(refuse: Callable[..., str], tmp_path: Path) -> None:
    line = refuse("gamma_sweep", "--stack", f"pruned={tmp_path / 'none'}")
    assert "none: expected an existing folder or a hub id" in line


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nonsense 3", "unrecognized arguments: --nonsense"),
        ("--max-num-batched-tokens many", "argument --max-num-batched-tokens"),
    ],
)
def test_flags_that_vllm_does_not_know(refuse: Callable[..., str], flags: str, message: str) -> None:
    line = refuse("ab", f"--candidate-args={flags}")
    assert line.startswith("ab.py: error: vLLM's flags: expected those that it knows, got ")
    assert message in line


@pytest.mark.vllm
def test_sound_flags_pass() -> None:
    flags = ["--candidate-args=--max-num-batched-tokens 512 --no-enable-prefix-caching", *PROMPTS, "--out", "o"]
    plan, _ = ab.prepare(
        read_flags(ab.AbConfig, ["--model", str(TOY / "teacher"), *flags], prog="ab.py", description=None)
    )
    assert plan.prompts
