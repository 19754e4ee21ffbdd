"""The frame of a command: exit statuses, an argument parser with one-line errors, and errors that become statuses."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from laguna_serve.serving.kit.environment import OtherLoad
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import explain_write, is_disk_full
from laguna_serve.serving.kit.signals import interrupt_on_signals

# It held; it ran and what it checks did not hold; it could not run; it was interrupted.
HELD, FELL_SHORT, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130
# As a process that SIGPIPE ends.
READER_GONE = 141
CONTINUES = "the same command continues with what is missing"


def open_closed_streams() -> None:
    """Open /dev/null in the place of each standard stream that the caller has closed.

    Python has None for it, and the next file that is opened would get its number, and with it what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


class Parser(argparse.ArgumentParser):
    """Keeps the line breaks of its description and examples; an error is one line, without the usage.

    `elsewhere` says where flags belong that it does not know.
    """

    def __init__(self, *, elsewhere: str | None = None, **options: Any) -> None:
        open_closed_streams()
        self._elsewhere = elsewhere
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with COULD_NOT_RUN."""
        name = self.prog.partition(" ")[0].rpartition("/")[2]
        if self._elsewhere is not None and message.startswith("unrecognized arguments: -"):
            message = f"{message}; {self._elsewhere}"
        self.exit(COULD_NOT_RUN, f"{name}: error: {message}; see `{self.prog} --help`\n")


def choose_command(parser: Parser, commands: Mapping[str, str], argv: Sequence[str] | None) -> tuple[str, list[str]]:
    """Read which command is meant, of those with what each does; what stands behind its name is for it to read."""
    given = list(sys.argv[1:] if argv is None else argv)
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="COMMAND")
    for name, text in commands.items():
        choices.add_parser(name, help=text, add_help=False)
    return str(parser.parse_args(given[:1]).COMMAND), given[1:]


def run_command(
    name: str,
    body: Callable[[], int],
    *,
    others: tuple[type[Exception], ...] = (),
    interrupted: str = "nothing was written",
    measures: bool = False,
) -> int:
    """Run a command's body; its exit status.

    Args:
        name: as the user typed it (`ab.py`, `laguna`), in front of every message.
        others: what ends it with COULD_NOT_RUN and one line, besides CommandError and OSError.
        interrupted: what becomes of the work after Ctrl-C or SIGTERM, for the one line that is then printed.
        measures: it times something; where other processes used the processors meanwhile, a warning says so.
    """
    interrupt_on_signals()
    expected: tuple[type[Exception], ...] = (CommandError, OSError, *others)
    load = OtherLoad() if measures else None
    try:
        status = body()
        sys.stdout.flush()
        if load is not None and (warning := load.describe()) is not None:
            print(f"{name}: warning: {warning}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return end_unread()
    except Exception as error:
        if not isinstance(error, expected) and not is_disk_full(error):  # as safetensors says it
            raise
        print(f"{name}: error: {explain(error)}", file=sys.stderr)
        return COULD_NOT_RUN


def end_unread() -> int:
    """Return the exit status where nobody reads stdout any more, as in `laguna doctor | head -1`.

    Nothing more is written.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
    return READER_GONE


def add_json_flag(parser: argparse._ActionsContainer) -> None:
    """Add --json, which `print_result` gets as `always_json`."""
    parser.add_argument("--json", action="store_true", help="print the JSON line on a terminal, too")


def print_result(text: str, line: Mapping[str, object], out: Path | None, *, always_json: bool) -> None:
    """Print a command's table and the folder of its files, then, for programs, one JSON object.

    That is the last line of stdout, where stdout is no terminal, or with `always_json`.
    """
    print(text)
    if out is not None:
        print(f"files in {out}")
    if always_json or not sys.stdout.isatty():
        print_line(line)


def print_line(line: Mapping[str, object]) -> None:
    """Print the JSON object for programs, of a command that ends in it on a terminal, too."""
    print(json.dumps(line, ensure_ascii=False, allow_nan=False))


def explain(error: Exception) -> str:
    """One line. Of the system's errors, which file and what was wrong with it, without the number."""
    if (isinstance(error, OSError) or not isinstance(error, CommandError)) and is_disk_full(error):
        path = getattr(error, "filename", None)
        return str(explain_write(None if path is None else Path(path), error))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error) or type(error).__name__
