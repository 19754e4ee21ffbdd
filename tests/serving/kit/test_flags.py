"""serving/kit/flags: command lines from configurations, the same checks for both ways of making one."""

from __future__ import annotations

import re
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest

from laguna_serve.serving.kit.flags import (
    MOST_THREADS,
    Flag,
    FlagError,
    Quick,
    check_bounds,
    read_flags,
    read_flags_and_json,
)

FLAG = r": Annotated\[\s*int(?: \| None)?,\s*Flag\((.*?)\),?\s*\]"
FLAGS = {name: re.compile(rf"\b{name}{FLAG}", re.DOTALL) for name in ("threads", "seed")}


@dataclass(frozen=True, kw_only=True)
class EnginesConfig:
    model: Annotated[str, Flag("the checkpoint", metavar="M", group="engines")]
    dtype: Annotated[Literal["auto", "float32"], Flag("of the weights")] = "auto"


@dataclass(frozen=True, kw_only=True)
class SweepConfig(EnginesConfig):
    prompts: Annotated[Path, Flag("JSONL", metavar="FILE", group="work", old=("--questions",))]
    gammas: Annotated[tuple[int, ...], Flag("which", metavar="N,…", at_least=1)] = (1, 3)
    limit_s: Annotated[float | None, Flag("for all", metavar="S", at_least=0.5)] = None
    replay: Annotated[bool, Flag("leave the third path out")] = True
    eager: Annotated[bool, Flag("no compilation", old=("--uncompiled",))] = False
    walls: Annotated[Literal["auto", "none"], Flag(old_switches=(("--unwalled", "none"),))] = "auto"
    only: Annotated[tuple[str, ...], Flag("words", several=True)] = ()
    at_most: int | None = None

    QUICK: ClassVar = Quick("γ 1, at most 16 prompts", {"gammas": (1,), "at_most": 16})

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.eager and self.dtype == "float32":
            raise FlagError("--eager: expected another --dtype beside it, got float32")


def read(*argv: str) -> SweepConfig:
    return read_flags(SweepConfig, argv, prog="bench/sweep.py", description="Sweep.", epilog="examples:\n  none")


def test_defaults_are_the_dataclass_s() -> None:
    assert read("--model", "m", "--prompts", "p") == SweepConfig(model="m", prompts=Path("p"))


def test_every_kind_of_field() -> None:
    argv = "--model m --prompts p --gammas 7,1 --limit-s 2.5 --no-replay --eager --dtype auto"
    expected = SweepConfig(model="m", prompts=Path("p"), gammas=(7, 1), limit_s=2.5, replay=False, eager=True)
    assert read(*argv.split()) == expected


def test_values_may_be_words() -> None:
    config = read(*["--model", "m", "--prompts", "p", "--only", "a", "b", "--eager"])
    assert (config.only, config.eager) == (("a", "b"), True)


def test_quick_changes_what_was_not_given() -> None:
    quick = read("--model", "m", "--prompts", "p", "--quick")
    assert (quick.gammas, quick.at_most) == ((1,), 16)
    assert read("--model", "m", "--prompts", "p", "--quick", "--gammas", "5").gammas == (5,)


def test_several_values_are_separated_by_blanks() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Merge:
        folders: Annotated[tuple[Path, ...], Flag("which", name="--merge", metavar="DIR", several=True)] = ()
        limit: Annotated[int | None, Flag("how many")] = None

    argv = ("--merge", "a,b", "c", "--limit", "3")
    merge = read_flags(Merge, argv, prog="x", description=None)
    assert merge == Merge(folders=(Path("a,b"), Path("c")), limit=3)
    assert read_flags(Merge, (), prog="x", description=None).folders == ()


def test_json_flag_is_not_in_the_configuration() -> None:
    argv = ("--model", "m", "--prompts", "p", "--json")
    config, always_json = read_flags_and_json(SweepConfig, argv, prog="x", description=None)
    assert always_json
    assert config == read(*argv[:-1])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model m", "the following arguments are required: --prompts"),
        ("--prompts p", "the following arguments are required: --model"),
        ("--model m --prompts p --gammas 3,0", "--gammas: expected at least 1, got 0"),
        ("--model m --prompts p --gammas 3,x", "argument --gammas: expected values separated by commas, got '3,x'"),
        ("--model m --prompts p --limit-s nan", "argument --limit-s: expected a finite number, got 'nan'"),
        ("--model m --prompts p --limit-s 1e400", "argument --limit-s: expected a finite number, got '1e400'"),
        ("--model m --prompts p --limit-s x", "argument --limit-s: expected a finite number, got 'x'"),
        ("--model m --prompts p --limit-s 0.1", "--limit-s: expected at least 0.5, got 0.1"),
        ("--model m\udcff --prompts p", r"argument --model: expected UTF-8, got b'm\xff'"),
        ("--model m --prompts=", "argument --prompts: expected a path, got nothing"),
        ("--model m --prompts p --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--model m --prompts p --eager --dtype float32", "--eager: expected another --dtype beside it, got float32"),
    ],
)
def test_bad_command_line_is_one_line(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(*argv.split())
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"sweep.py: error: {message}")
    assert lines[0].endswith("see `bench/sweep.py --help`")


@pytest.mark.parametrize("name", ["threads", "seed"])
def test_every_number_of_threads_and_every_seed_has_bounds(name: str) -> None:
    """Of more threads than there can be libgomp and torch end the process, and NumPy's refusal is a traceback."""
    root = Path(__file__).resolve().parents[3]
    paths = [path for folder in ("bench", "evals", "scripts", "serving") for path in (root / folder).rglob("*.py")]
    found = [(path.name, flag) for path in paths for flag in FLAGS[name].findall(path.read_text(encoding="utf-8"))]
    assert len(found) > 10
    assert [flag for flag in found if "at_least=" not in flag[1] or f"at_most=MOST_{name.upper()}" not in flag[1]] == []


def test_the_largest_value_is_one_line() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Work:
        threads: Annotated[int, Flag("how many", at_least=1, at_most=MOST_THREADS)] = 1
        __post_init__ = check_bounds

    with pytest.raises(FlagError, match="--threads: expected at most 1024, got 1025"):
        Work(threads=1025)


@pytest.mark.parametrize(
    ("name", "most"),
    [("rounds", 100_000), ("concurrency", 65_535), ("max_tokens", 10_000_000), ("num_prompts", 10_000_000)],
)
def test_counts_that_say_no_bound_have_one(name: str, most: int) -> None:
    """A slip of the keyboard made lists of a thousand million, or went on for weeks."""
    kind = Annotated[int | None, Flag(at_least=1)]
    hints = {name: kind, "least": Annotated[int, Flag()], "share": Annotated[float, Flag()]}
    fields = [(field, hint, None) for field, hint in hints.items()]
    work = make_dataclass("Work", fields, namespace={"__post_init__": check_bounds}, frozen=True, kw_only=True)
    work(**{name: most, "least": -(10**12), "share": 1e12})
    for value in (most + 1, 10**12):
        with pytest.raises(FlagError, match=f"--{name.replace('_', '-')}: expected at most {most}, got {value}"):
            work(**{name: value})


def test_python_callers_get_the_same_checks() -> None:
    with pytest.raises(FlagError, match="--gammas: expected at least 1, got 0"):
        SweepConfig(model="m", prompts=Path("p"), gammas=(0,))
    with pytest.raises(FlagError, match="--dtype: expected one of auto, float32, got int8"):
        SweepConfig(model="m", prompts=Path("p"), dtype="int8")  # type: ignore[arg-type]


def test_old_names_work_and_say_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    config = read("--model", "m", "--questions", "p", "--uncompiled")
    assert (config.prompts, config.eager) == (Path("p"), True)
    assert capsys.readouterr().err.splitlines() == [
        f"bench/sweep.py: warning: {old} is now {new}; the old name goes with the next release"
        for old, new in (("--questions", "--prompts"), ("--uncompiled", "--eager"))
    ]


def test_old_switch_stands_for_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("--model", "m", "--prompts", "p", "--unwalled").walls == "none"
    assert "warning: --unwalled is now --walls none; the old name" in capsys.readouterr().err


def test_help_has_groups_and_no_old_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert "engines:\n  --model M" in text
    assert "--gammas N,…" in text
    assert "--quick" in text
    assert "γ 1, at most 16 prompts, unless given" in text
    assert "--questions" not in text
    assert "--at-most" not in text


def test_help_says_what_stands_for_a_number_or_text_that_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        rows: Annotated[int, Flag("of a step")] = 6
        seed: Annotated[int, Flag()] = 0
        lr: Annotated[float, Flag("peak (default: 2e-5)")] = 2e-5
        kind: Annotated[str, Flag("of the weights (bfloat16)")] = "bfloat16"
        out: Annotated[Path | None, Flag("a folder")] = None

    with pytest.raises(SystemExit):
        read_flags(Config, ["--help"], prog="x", description="X.", epilog="")
    lines = [line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert lines == [
        "of a step (default: 6)",
        "default: 0",
        "peak (default: 2e-5)",
        "of the weights (bfloat16)",
        "a folder",
    ]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    runs: Annotated[tuple[Path, ...], Flag("folders", metavar="DIR", positional=True, repeated=True)]
    key: Annotated[tuple[str, ...], Flag("a client's", repeated=True)] = ()
    restart: Annotated[bool, Flag("again", either_way=True)] = True


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["a"], ServerConfig(runs=(Path("a"),))),
        (
            ["a", "b", "--key", "x,y", "--key", "z", "--no-restart"],
            ServerConfig(runs=(Path("a"), Path("b")), key=("x,y", "z"), restart=False),
        ),
        (["a", "--no-restart", "--restart"], ServerConfig(runs=(Path("a"),))),
    ],
    ids=["neither", "repeated", "the-last-counts"],
)
def test_flags_that_are_given_again(argv: list[str], expected: ServerConfig) -> None:
    assert read_flags(ServerConfig, argv, prog="x", description=None) == expected
