"""serving/kit/command: what a command prints, with which exit status, and what its line leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from laguna_serve.serving.kit.cli import COULD_NOT_RUN, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.environment import OtherLoad
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.flags import Flag


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    count: Annotated[int, Flag("how many", metavar="N")] = 3
    out: Annotated[Path | None, Flag("folder", metavar="DIR")] = None


class Load(msgspec.Struct, frozen=True, kw_only=True):
    items: list[int]
    notes: list[str]


class CountResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.count/1"):
    loads: list[Load]
    arms: dict[str, Load]


COMMAND = Command("bench/count.py", CountConfig, "Count.", "examples: none")


def count(config: CountConfig) -> CountResult:
    if config.count < 0:
        raise CommandError("--count: expected at least 0, got less")
    load = Load(items=list(range(config.count)), notes=["a", "b"])
    return CountResult(loads=[load, load], arms={"baseline": load})


def show(result: CountResult) -> str:
    return f"{len(result.loads)} loads"


def test_table_folder_and_line_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.run(["--out", "there"], count, show=show) == HELD
    table, folder, line = capsys.readouterr().out.splitlines()
    assert (table, folder) == ("2 loads", "files in there")
    assert json.loads(line)["schema"] == "laguna_serve.count/1"


def test_without_a_table_the_line_is_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.run(["--count", "1", "--out", "there"], count) == HELD
    assert json.loads(capsys.readouterr().out)["arms"] == {"baseline": {"items": [0], "notes": ["a", "b"]}}


def test_without_a_table_there_is_no_json_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        COMMAND.run(["--json"], count)
    assert exit_.value.code == COULD_NOT_RUN
    assert "count.py: error: unrecognized arguments: --json" in capsys.readouterr().err


def test_what_a_result_stands_for_is_the_exit_status() -> None:
    assert COMMAND.run([], count, show=show, judge=lambda result: FELL_SHORT if result.loads else HELD) == FELL_SHORT


def test_only_runs_that_measure_warn_of_other_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plan of bench/moe_tuning, which times nothing."""
    monkeypatch.setattr(OtherLoad, "find_share", lambda _: 0.9)
    command = Command("bench/count.py", CountConfig, "Count.", "", measures=lambda config: config.count > 3)
    warned = []
    for number in ("3", "4"):
        assert command.run(["--count", number], count) == HELD
        warned.append("other processes took 90%" in capsys.readouterr().err)
    assert warned == [False, True]


def test_an_error_is_one_line_under_the_command_s_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.run(["--count", "-1"], count, show=show) == COULD_NOT_RUN
    assert capsys.readouterr() == ("", "count.py: error: --count: expected at least 0, got less\n")


def test_brief_names_fields_by_path() -> None:
    brief = Brief(without=("arms.baseline.items",), first={"loads.*.items": 2}, counted=("arms.*.notes",))
    load = {"items": [0, 1], "notes": ["a", "b"]}
    assert brief(count(CountConfig())) == {
        "schema": "laguna_serve.count/1",
        "loads": [load, load],
        "arms": {"baseline": {"notes": 2}},
    }


def test_brief_of_a_field_that_is_not_there_is_a_mistake_in_the_code() -> None:
    with pytest.raises(KeyError, match="baselines"):
        Brief(without=("arms.baselines.items",))(count(CountConfig()))


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_command_whose_caller_has_closed_a_stream_runs(closed: str, tmp_path: Path) -> None:
    program = (
        "import sys; from laguna_serve.serving.kit.cli import Parser; Parser(prog='x').parse_args([]);"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('said'); print('said', file=sys.stderr);"
        "sys.stdout.flush(); sys.exit(file.fileno() < 3)"
    )
    command = ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""
