"""`laguna compact` stopped on the way, continued, repeated, on a full disk; and how much memory it takes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from compact_cases import config, weights, write_base, write_masks

from laguna_serve.scripts.checkpoints import compact
from laguna_serve.scripts.checkpoints import output as output_module
from laguna_serve.scripts.checkpoints.compaction import writing

MIB = 2**20
# Prints the peak beyond what is resident once everything is imported.
PEAK = """
import sys
from pathlib import Path
from laguna_serve.scripts.checkpoints import compact
import torch
torch.zeros(1)
def read(key):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)).split()[1])
Path("/proc/self/clear_refs").write_text("5")
before = read("VmRSS")
code = compact.main(sys.argv[1:])
print("PEAK", (read("VmHWM") - before) * 1024)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 260 MiB in six shards; a layer's experts are 47 MiB, so most layers lie in two of them."""
    folder = tmp_path_factory.mktemp("large")
    cfg = config(hidden=512, width=256, experts=64, layers=6)
    return write_base(folder / "base", cfg, weights(cfg), shards=6)


def start(large: Path, out: Path, *flags: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "compact", str(large), "--random-mask", "0.1", *flags]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--out", str(out)], **pipes, **options)


def small(tmp_path: Path, shards: int = 5) -> list[str]:
    cfg = config()
    write_base(tmp_path / "base", cfg, weights(cfg), shards)
    return [str(tmp_path / "base"), *write_masks(tmp_path, cfg), "--out", str(tmp_path / "out")]


def read_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--zeroed"]], ids=["compact", "zeroed"])
def test_peak_memory_is_at_most_two_shards(large: Path, tmp_path: Path, mode: list[str]) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs to measure a peak")
    flags = [str(large), "--random-mask", "0.1", "--out", str(tmp_path / "out"), *mode]
    # Apart, as malloc keeps what one leaves behind, which only matters at sizes as small as these.
    for what in ([], ["--verify"]):
        command = [sys.executable, "-c", PEAK, *flags, *what]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(done.stdout.splitlines()[-1].split()[1])
        largest = max(p.stat().st_size for folder in (large, tmp_path / "out") for p in folder.glob("*.safetensors"))
        print(f"peak {mode} {what}: {peak / MIB:.0f} MiB, largest shard {largest / MIB:.0f} MiB")
        assert peak <= 2 * largest


def test_two_runs_do_not_write_into_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, inner = small(tmp_path), []
    write = writing.write_shard

    def write_and_try_again(*given: Any) -> None:
        write(*given)
        if not inner:
            inner.append(0)
            inner[0] = compact.main(flags)

    monkeypatch.setattr(writing, "write_shard", write_and_try_again)
    assert compact.main(flags) == 0
    assert inner == [2]
    assert "expected to write alone, got another run at it" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "compact.json").read_text())["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_stopped_and_continued(large: Path, tmp_path: Path, sent: signal.Signals) -> None:
    out = tmp_path / "out"
    process = start(large, out)
    deadline = time.monotonic() + 60
    while len(list(out.glob("model-*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command continues" in said
    assert "Traceback" not in said
    assert not (out / "config.json").exists(), "half a checkpoint must not look like one"
    assert not list(out.glob(".*")), "no partial file is left"
    noted = json.loads((out / "compact.json").read_text())["finished"]
    kept = {name: (out / name).stat().st_ino for name in noted}
    assert kept

    again = start(large, out, "--verify")
    printed, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "continuing: " in said
    assert json.loads(printed.splitlines()[-1])["verify"]["held"]
    assert kept.items() <= {p.name: p.stat().st_ino for p in out.glob("model-*.safetensors")}.items(), (
        "kept as they are"
    )


@pytest.mark.slow
def test_every_place_to_stop_leads_to_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = small(tmp_path)
    assert compact.main(command) == 0
    whole = read_files(tmp_path / "out")
    write_file = output_module.write_file
    stops = 0
    for stop_at in range(1, 40):
        out = tmp_path / f"out{stop_at}"
        calls = 0

        def stopping(path: Path, write: Any, stop_at: int = stop_at) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            write_file(path, write)

        for module in (output_module, writing):
            monkeypatch.setattr(module, "write_file", stopping)
        code = compact.main([*command[:-1], str(out)])
        for module in (output_module, writing):
            monkeypatch.setattr(module, "write_file", write_file)
        if code == 0:
            break
        stops += 1
        assert code == 130
        complete = (
            json.loads((out / "compact.json").read_text())["complete"] if (out / "compact.json").exists() else False
        )
        assert not complete
        assert compact.main([*command[:-1], str(out)]) == 0
        assert read_files(out) == whole, f"stopped at write {stop_at}"
    assert stops > 15


def test_full_disk_leaves_finished_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = small(tmp_path)
    save_file, calls = output_module.save_file, 0

    def filling(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(output_module, "save_file", filling)
    assert compact.main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("laguna: error")]
    assert len(errors) == 1
    assert "no space left" in errors[0]
    out = tmp_path / "out"
    assert [p.name[:11] for p in sorted(out.iterdir())] == ["compact.jso", "model-00001", "model-00002"]
    assert compact.main([*command, "--verify"]) == 0


@pytest.mark.slow
def test_file_size_limit_is_a_full_disk(large: Path, tmp_path: Path) -> None:
    """The real thing: the kernel refuses in the middle of a file."""
    limit = 24 * MIB
    process = start(
        large, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("laguna: error: ")
    left = [p.name for p in (tmp_path / "out").iterdir()]
    assert not [name for name in left if name.endswith(".partial") or name == "config.json"]


def test_finished_identical_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = small(tmp_path)
    assert compact.main(command) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert compact.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "already complete"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_damaged_file_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = small(tmp_path)
    assert compact.main(command) == 0
    whole = read_files(tmp_path / "out")
    (tmp_path / "out" / "model-00003-of-00007.safetensors").write_bytes(b"short")
    assert compact.main(command) == 0
    assert read_files(tmp_path / "out") == whole


def test_other_arguments_are_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = small(tmp_path)
    assert compact.main(command) == 0
    before = read_files(tmp_path / "out")
    cfg = config()
    masks = write_masks(tmp_path / "others", cfg, ratio=0.2)
    base, out = command[0], command[-2:]
    os.utime(Path(base) / "model-00001-of-00005.safetensors", ns=(1, 1))
    for flags, differing in (
        (command, "base"),
        ([base, *masks, *out], "base"),
    ):
        capsys.readouterr()
        assert compact.main(flags) == 2
        said = capsys.readouterr().err
        assert f"expected {differing} " in said
        assert len(said.splitlines()) == 1
    write_base(tmp_path / "base2", cfg, weights(cfg), 5)
    first = [str(tmp_path / "base2"), *masks, "--out", str(tmp_path / "out2")]
    assert compact.main(first) == 0
    for flags, differing in (
        ([*first, "--zeroed"], "mode"),
        ([first[0], *command[1:5], *first[-2:]], "keep_mask_sha256"),
        ([first[0], "--random-mask", "0.1", "--block-size", "4", *first[-2:]], "group_indices_sha256"),
    ):
        capsys.readouterr()
        assert compact.main(flags) == 2
        assert f"expected {differing} " in capsys.readouterr().err
    assert read_files(tmp_path / "out") == before
