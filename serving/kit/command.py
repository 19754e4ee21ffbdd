"""A command that ends in a result: its flags become a configuration, which a function turns into the result.

    def main(argv: Sequence[str] | None = None) -> int:
        command = Command("evals/loss.py", LossConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
        return command.run(argv, measure_loss, show=render_text)

What a Python caller calls is the function, with a configuration made by hand; the frame adds what only a person at a
terminal needs: the table, the line for programs, and an exit status.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from laguna_serve.serving.kit.cli import HELD, Parser, add_json_flag, print_line, print_result, run_command
from laguna_serve.serving.kit.flags.command_line import add_flags, make_config
from laguna_serve.serving.kit.flags.declaration import Config
from laguna_serve.serving.kit.results import JsonObject, to_json

C = TypeVar("C", bound=Config)
R = TypeVar("R", bound=msgspec.Struct)


@dataclass(frozen=True)
class Brief:
    """What the line for programs leaves out of a result, whose file has everything.

    Fields are named by their path in the JSON, as in "arms.baseline.requests"; `*` stands for every item of a list and
    every value of an object.

    Attributes:
        without: fields that it has not.
        first: lists of which it has the first so many items.
        counted: lists of which it has the number of items.
    """

    without: tuple[str, ...] = ()
    first: Mapping[str, int] = field(default_factory=dict)
    counted: tuple[str, ...] = ()

    def __call__(self, result: msgspec.Struct) -> JsonObject:
        """Make the shortened result."""
        line = to_json(result)
        for path in self.without:
            for owner, name in _find(line, path):
                del owner[name]
        for path, most in self.first.items():
            for owner, name in _find(line, path):
                owner[name] = owner[name][:most]
        for path in self.counted:
            for owner, name in _find(line, path):
                owner[name] = len(owner[name])
        return line


@dataclass(frozen=True)
class Command(Generic[C]):
    """What a command is besides the function that does its work.

    Attributes:
        prog: as a user types it ("bench/ab.py"); its messages begin with the last part.
        examples: what `--help` ends in, with the exit statuses.
        others, interrupted, measures: as in `run_command`; where not every run measures, a function of its flags.
    """

    prog: str
    config: type[C]
    description: str | None
    examples: str
    others: tuple[type[Exception], ...] = ()
    interrupted: str = "nothing was written"
    measures: bool | Callable[[C], bool] = False

    def run(
        self,
        argv: Sequence[str] | None,
        act: Callable[[C], R],
        *,
        show: Callable[[R], str] | None = None,
        line: Callable[[R], JsonObject] = to_json,
        judge: Callable[[R], int] = lambda _: HELD,
    ) -> int:
        """Read the flags, act, print. Returns the exit status.

        Args:
            show: the table; without one, stdout is the line alone, on a terminal too, and there is no `--json`.
            line: the JSON object for programs.
            judge: the exit status that a result stands for.
        """
        parser = Parser(prog=self.prog, description=self.description, epilog=self.examples)
        add_flags(parser, self.config)
        if show is not None:
            add_json_flag(parser)
        given = parser.parse_args(argv)
        config = make_config(parser, self.config, given)

        def body() -> int:
            result = act(config)
            if show is None:
                print_line(line(result))
            else:
                print_result(show(result), line(result), getattr(config, "out", None), always_json=given.json)
            return judge(result)

        measures = self.measures(config) if callable(self.measures) else self.measures
        return run_command(self.name, body, others=self.others, interrupted=self.interrupted, measures=measures)

    @property
    def name(self) -> str:
        """What messages begin with."""
        return self.prog.partition(" ")[0].rpartition("/")[2]


def _find(line: JsonObject, path: str) -> Iterator[tuple[JsonObject, str]]:
    """Find the objects that have a field of this path, and the field's name."""
    *parts, name = path.split(".")
    owners: list[Any] = [line]
    for part in parts:
        owners = [item for owner in owners for item in (_list_items(owner) if part == "*" else [owner[part]])]
    yield from ((owner, name) for owner in owners)


def _list_items(owner: list[Any] | JsonObject) -> list[Any]:
    return list(owner.values()) if isinstance(owner, dict) else owner
