"""A command line from a command's configuration: a frozen, keyword-only dataclass whose fields tell their flags.

    @dataclass(frozen=True, kw_only=True)
    class LossConfig(BoundedConfig):
        prompts: Annotated[Path, Flag("JSONL, one prompt per line", metavar="FILE")]
        max_tokens: Annotated[int, Flag("output tokens per prompt", metavar="N", at_least=1)] = 128

    config = read_flags(LossConfig, argv, prog="evals/loss.py", description=__doc__, epilog=EXAMPLES)

A Python caller makes the same object by hand. What is checked is checked in the object, as it is made: `BoundedConfig`
does so for the flags' bounds, a `__post_init__` for whatever holds between fields. Both raise FlagError.

| a field's type | its flag |
|--|--|
| int, float, str, Path, or X \\| None | takes one value |
| Literal["a", "b"] | one of these |
| bool, default False | `--name` |
| bool, default True | `--no-name` |
| tuple[int, ...] and others | values separated by commas (`several`: by blanks; `repeated`: one each time) |

Ours, on argparse: builders that derive a command line from types (tyro, cyclopts, pydantic-settings) bring an own form
of help and of errors; here both are published, one line each, and tested.
"""

from laguna_serve.serving.kit.flags.command_line import parse_numbers, parse_words, read_flags, read_flags_and_json
from laguna_serve.serving.kit.flags.declaration import (
    ANY,
    MOST_COUNT,
    MOST_SEED,
    MOST_TEXT,
    MOST_THREADS,
    MOST_TOGETHER,
    BoundedConfig,
    Config,
    Flag,
    FlagError,
    Quick,
    check_bounds,
)

__all__ = [
    "ANY",
    "MOST_COUNT",
    "MOST_SEED",
    "MOST_TEXT",
    "MOST_THREADS",
    "MOST_TOGETHER",
    "BoundedConfig",
    "Config",
    "Flag",
    "FlagError",
    "Quick",
    "check_bounds",
    "parse_numbers",
    "parse_words",
    "read_flags",
    "read_flags_and_json",
]
