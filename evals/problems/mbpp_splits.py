"""MBPP's splits, which are ranges of its task ids (Austin et al. 2021, arXiv:2108.07732; the same on the hub).

A figure without its split says little: the test split has 500 problems and the train split 374, and "n 374, test" has
been written of one that only the 500 can give (42.60% is 213 of 500; no whole number of 374 is).
"""

from __future__ import annotations

from typing import Literal

from laguna_serve.evals.problems.problem import ProblemsError
from laguna_serve.serving.kit.results import JsonObject

Split = Literal["prompt", "test", "validation", "train", "all"]
# First and last task id.
SPLITS: dict[str, tuple[int, int]] = {
    "prompt": (1, 10),
    "test": (11, 510),
    "validation": (511, 600),
    "train": (601, 974),
    "all": (1, 974),
}
Row = tuple[str, JsonObject]


def choose_split(rows: list[Row], split: str, form: str, name: str) -> list[Row]:
    """Choose the rows of one split, in order.

    Raises:
        ProblemsError: no such split, a file that has none, or one without a row of it.
    """
    if not form.startswith("mbpp"):
        raise ProblemsError(f"--split: expected a file of MBPP with it, got {name} in the form {form}; leave it out")
    if split not in SPLITS:
        raise ProblemsError(f"--split: expected one of {', '.join(SPLITS)}, got {split}; choose one of them")
    first, last = SPLITS[split]
    found = [(where, row) for where, row in rows if first <= find_number(where, row) <= last]
    if not found:
        raise ProblemsError(
            f"{name}: expected task ids {first} to {last} (the {split} split), got none; check the file"
        )
    return found


def find_number(where: str, row: JsonObject) -> int:
    """Find a row's task id as a number, 1 to 974.

    Raises:
        ProblemsError: it has none.
    """
    try:
        return int(str(row["task_id"]).rpartition("/")[2])
    except (KeyError, ValueError):
        raise ProblemsError(f'{where}: expected a number as "task_id", got {row.get("task_id")!r}; fix it') from None


def describe_split(split: str) -> str:
    """Describe a split in words, as "test (task ids 11 to 510)"."""
    first, last = SPLITS[split]
    return f"{split} (task ids {first} to {last})"
