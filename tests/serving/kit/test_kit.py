"""serving/kit: how commands end, files that appear whole or not at all, and progress on and off a terminal."""

from __future__ import annotations

import errno
import os
import pty
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from laguna_serve.serving.kit import environment, progress
from laguna_serve.serving.kit.cli import (
    COULD_NOT_RUN,
    FELL_SHORT,
    INTERRUPTED,
    Parser,
    print_result,
    run_command,
)
from laguna_serve.serving.kit.errors import CommandError, first_line
from laguna_serve.serving.kit.files import WriteError, number_lines, write_file, write_json, write_text
from laguna_serve.serving.kit.signals import check_signals, defer_signals
from laguna_serve.serving.machine.device import Device
from laguna_serve.serving.machine.rates import Rates, describe_rates
from laguna_serve.serving.supervision.service_manager import tell_ready


def fail(error: BaseException) -> Callable[[], int]:
    """A command's body that raises."""

    def body() -> int:
        raise error

    return body


@pytest.fixture(autouse=True)
def _handlers() -> object:
    """run_command sets the process's signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


FULL = "expected to write it, got no space left; free some and repeat the command"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CommandError("--n: expected 1, got 2; correct it"), "--n: expected 1, got 2; correct it"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), f"output: {FULL}"),
        (OSError(errno.EFBIG, "File too large", "a.bin"), f"a.bin: {FULL}"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), f"output: {FULL}"),
        (ZeroDivisionError("division"), "division"),
    ],
)
def test_expected_error_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("x.py", fail(error), others=(ZeroDivisionError,)) == COULD_NOT_RUN
    assert capsys.readouterr().err == f"x.py: error: {line}\n"


def test_first_line_of_an_error_says_something() -> None:
    said = [first_line(ValueError(text)) for text in ("one\ntwo", "\n  one\ntwo", "", "\n")]
    assert said == ["one", "one", "ValueError", "ValueError"]


def test_fault_of_our_own_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        run_command("x.py", fail(KeyError("a")))


def test_status_of_the_body_is_the_commands() -> None:
    assert run_command("x.py", lambda: FELL_SHORT) == FELL_SHORT


def test_load_of_others_is_warned_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """10 s on 4 processors, of which this command used 8 s: the rest is others'."""
    now, busy, own = [100.0], [1000.0], [50.0]
    monkeypatch.setattr(environment.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(environment, "read_busy_s", lambda: busy[0])
    monkeypatch.setattr(environment, "read_own_s", lambda: own[0])

    def work(others_s: float) -> int:
        now[0], own[0], busy[0] = now[0] + 10, own[0] + 8, busy[0] + 8 + others_s
        return FELL_SHORT

    assert run_command("x.py", lambda: work(4.0), measures=True) == FELL_SHORT
    assert capsys.readouterr().err == ""
    assert run_command("x.py", lambda: work(4.4), measures=True) == FELL_SHORT
    assert capsys.readouterr().err.startswith("x.py: warning: other processes took 11% of the processors' time")
    assert run_command("x.py", lambda: work(30.0)) == FELL_SHORT
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_own_children_are_not_others() -> None:
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    before = environment.read_own_s()
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert environment.read_own_s() - before >= 0.28


# Listens in a process that nobody here is the parent of, works 0.3 s for each connection, and ends after the third.
SERVER = """
import os, socket, time
listener = socket.create_server(("127.0.0.1", 0))
if os.fork():
    print(listener.getsockname()[1], flush=True)
    os._exit(0)
os.closerange(1, 3)
listener.settimeout(60)
for _ in range(3):
    connection, _ = listener.accept()
    end = time.process_time() + 0.3
    while time.process_time() < end: pass
    connection.close()
"""


@pytest.mark.slow
def test_servers_that_are_asked_by_url_are_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SERVERS", {})
    made = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True, check=True)
    port = int(made.stdout)

    def work() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            assert connection.recv(1) == b""

    work()
    environment.count_as_own(f"http://another.host:{port}/v1")
    assert environment.SERVERS == {}
    environment.count_as_own(f"http://127.0.0.1:{port}/v1")
    assert len(environment.SERVERS) == 1
    before = environment.read_own_s()
    work()
    assert 0.28 <= environment.read_own_s() - before < 0.58, "what it had worked before is not this command's"
    work()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_interrupts_though_the_shell_had_it_ignored(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(number, signal.SIG_IGN)

    def body() -> int:
        os.kill(os.getpid(), number)
        return FELL_SHORT

    assert run_command("x.py", body, interrupted="the same command continues") == INTERRUPTED
    assert capsys.readouterr().err == "x.py: interrupted; the same command continues\n"


def test_deferred_signal_waits_and_a_second_one_does_not() -> None:
    with defer_signals():
        check_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            check_signals()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with defer_signals():
        check_signals()  # those of before are over


def test_parser_says_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="scripts/x.py")
    parser.add_argument("--n", type=int, required=True)
    with pytest.raises(SystemExit) as ending:
        parser.parse_args(["--n", "many"])
    assert ending.value.code == COULD_NOT_RUN
    expected = "x.py: error: argument --n: invalid int value: 'many'; see `scripts/x.py --help`\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("terminal", "asked", "lines"), [(False, False, 3), (True, False, 2), (True, True, 3)])
def test_json_line_is_for_programs(
    terminal: bool, asked: bool, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    print_result("1.64×", {"speedup": 1.64}, Path("out"), always_json=asked)
    assert capsys.readouterr().out.splitlines() == ["1.64×", "files in out", '{"speedup": 1.64}'][:lines]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_file_that_is_written_anew_keeps_its_mode_and_owner(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root writes keys that the gateway's user is to read."""
    path = tmp_path / "keys.toml"
    path.write_text("old")
    path.chmod(mode)
    given: list[tuple[int, int]] = []

    def refuse(_path: object, uid: int, gid: int) -> None:
        given.append((uid, gid))
        raise OSError(errno.EINVAL, "a user that this namespace does not know")

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    write_text(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)
    assert given == [(path.stat().st_uid, path.stat().st_gid)]


def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def write_half(partial: Path) -> None:
        partial.write_text("aft")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError, match=r"a\.txt: expected to write it, got no space left; free some"):
        write_file(path, write_half)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, lambda partial: (partial.write_text("aft"), (_ for _ in ()).throw(KeyboardInterrupt))[1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.txt", "before")]


def test_a_full_disk_is_named_behind_what_a_library_says_of_it(tmp_path: Path) -> None:
    """Of a training state's last bytes torch says "unexpected pos 7791168 vs 7791060", in a traceback."""

    def write(partial: Path) -> None:
        try:
            raise OSError(errno.EFBIG, "File too large")
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904  # as the end of a `with` does

    with pytest.raises(WriteError, match=r"x.state: expected to write it, got no space left; free some and repeat"):
        write_file(tmp_path / "x.state", write)

    def fail(partial: Path) -> None:
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        write_file(tmp_path / "x.state", fail)


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]
    with pytest.raises(WriteError, match="Is a directory"):
        write_text(tmp_path, "text")


@pytest.mark.parametrize(
    ("call", "subject"),
    [
        ("write_text(path, 'a' * 100000)", "big.txt"),
        ("[Journal(path, str).append('a' * 1000) for _ in range(9)]", "big.txt"),
        ("path.open('w').write('a' * 100000)", "output"),
        ("write_file(path, lambda partial: save_file({'a': numpy.zeros(100000)}, partial))", "big.txt"),
    ],
    ids=["whole", "journal", "other", "safetensors"],
)
def test_file_that_the_system_refuses_is_an_error_in_one_line(tmp_path: Path, call: str, subject: str) -> None:
    """A limit on the size of files stands for a full disk."""
    code = (
        "import pathlib, sys, numpy\n"
        "from safetensors.numpy import save_file\n"
        "from laguna_serve.serving.kit.files import write_file, write_text\n"
        "from laguna_serve.serving.kit.journal import Journal\n"
        "from laguna_serve.serving.kit.cli import run_command\n"
        f"path = pathlib.Path(sys.argv[1])\nsys.exit(run_command('x.py', lambda: {call}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big.txt")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == COULD_NOT_RUN
    assert done.stderr.count("\n") == 1
    assert f"{subject}: expected to write it, got no space left; free some" in done.stderr
    assert call[:5] != "write" or not list(tmp_path.iterdir())


def test_progress_off_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress()
    shown.begin()
    for done in range(1, 26):
        now[0] += 1.0
        shown.step("baseline", done, 25, 400.0)
    assert capsys.readouterr().err.splitlines() == [
        "  baseline  10/25 · 400 tok/s · 15 s left",
        "  baseline  20/25 · 400 tok/s · 5 s left",
        "  baseline  25/25 · 400 tok/s · 0 s left",
    ]


def test_progress_through_items_is_a_step_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for _ in progress.Progress().track("decoded", "abc"):
        now[0] += 6.0
    assert capsys.readouterr().err.splitlines() == ["  decoded   2/3 · 6 s left", "  decoded   3/3 · 0 s left"]


def test_progress_on_a_terminal_is_redrawn_and_gives_the_cursor_back() -> None:
    code = (
        "from laguna_serve.serving.kit.progress import Progress\n"
        "p = Progress(); p.begin()\n"
        "p.step('baseline', 1, 3); p.say('a [line] between'); p.step('baseline', 3, 3)\n"
        "p.begin(); p.step('candidate', 1, 3)\n"
    )
    own, child = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=child, stdin=subprocess.DEVNULL, check=True, timeout=60)
    os.close(child)
    text = b""
    while True:
        try:
            text += (data := os.read(own, 65536))
        except OSError:  # what is left of a terminal whose other side is closed
            break
        if not data:
            break
    os.close(own)
    assert b"a [line] between" in text
    assert text.count(b"baseline  3/3") >= 1
    assert text.rfind(b"\x1b[?25h") > text.rfind(b"\x1b[?25l"), "the cursor is shown again"


def test_the_environment_says_where_and_with_what() -> None:
    found = environment.read_environment(["python", "bench/ab.py", "--out", "a folder"])
    assert found.command == "python bench/ab.py --out 'a folder'"
    assert found.cores is not None
    assert found.cores >= 1
    assert found.memory_gib is not None
    assert found.memory_gib > 0
    assert {"laguna-serve", "numpy", "aiohttp"} <= found.versions.keys()
    assert msgspec.json.decode(msgspec.json.encode(found), type=environment.Environment) == found


def test_the_environment_has_rates_where_engines_use_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(bfloat16={"1": 0.5, "8": 3.0}, float32={"1": 1.0, "8": 2.5}, kernel={"1": 0.5, "8": 1.0}, path="avx2")
    kinds = iter(("cpu", "gpu"))
    monkeypatch.setattr(environment, "find_rates", lambda: rates)
    monkeypatch.setattr(environment, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(environment, "find_device", lambda _: Device(next(kinds), "x", 1, 1))  # type: ignore[arg-type]
    on_cpu, on_gpu = (environment.read_environment(["x"]) for _ in range(2))
    assert on_cpu.rates == rates
    assert on_cpu.arithmetic == describe_rates(rates, bf16=False)
    assert msgspec.json.decode(msgspec.json.encode(on_cpu), type=environment.Environment) == on_cpu
    assert any("float32 1.00 / 2.50" in line for line in environment.list_environment(on_cpu))
    assert on_gpu.rates is on_gpu.arithmetic is None


def test_older_results_have_no_rates() -> None:
    found = msgspec.json.decode(b'{"date": "2026-01-01", "command": "x"}', type=environment.Environment)
    assert found.rates is None
    assert not any("rates" in line for line in environment.list_environment(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--example"],
        [
            sys.executable,
            "-c",
            "from laguna_serve.serving.kit.cli import run_command;"
            "raise SystemExit(run_command('x', lambda: print('y' * 1_000_000) or 0))",
        ],
    ],
    ids=["laguna", "run_command"],
)
def test_reader_that_leaves_is_no_error(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_stdout_on_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--example"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (COULD_NOT_RUN, f"laguna: error: output: {FULL}\n")


@pytest.mark.parametrize("abstract", [False, True])
def test_service_manager_that_waits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"{'@' if abstract else ''}{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        tell_ready()
        assert manager.recv(100) == b"READY=1"
        assert "NOTIFY_SOCKET" not in os.environ  # it is not for engines
    tell_ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    tell_ready()


def test_lines_end_where_a_text_says_so_and_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y\x85"}\r\n  \n\n{"b": 1}'.encode())
    assert list(number_lines(path)) == [(1, '{"a": "x\u2028y\x85"}'), (4, '{"b": 1}')]
    path.write_bytes(b"fine\n\xff\n")
    with pytest.raises(UnicodeDecodeError):
        list(number_lines(path))
