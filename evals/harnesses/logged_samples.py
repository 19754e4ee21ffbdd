"""What became of single questions: the samples that lm-evaluation-harness leaves beside its results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from laguna_serve.evals.harnesses.settings import SuiteError
from laguna_serve.serving.kit.files import number_lines

# Of the samples of each question the share that was right, by a name that no other question of the suite has.
Outcomes = Mapping[str, float]


def read_logged(path: Path, tasks: Sequence[str], metric: str, name: str, sign: int) -> Outcomes:
    """Read what a run with --log_samples left beside its results: a question is known by its text's hash.

    Nothing where it left nothing, or where a question has no such number of its own. `sign`: -1 where less is better.

    Raises:
        SuiteError: a file of samples is not whole.
    """
    found: dict[str, float] = {}
    for task in tasks:
        log = path.with_name(f"samples_{task}_{path.stem.removeprefix('results_')}.jsonl")
        if not log.is_file():
            return {}
        for _, line in number_lines(log):
            try:
                logged = json.loads(line)  # NaN may be in it
                if logged["filter"] != name:
                    continue
                question, value = f"{task} {logged['doc_id']} {logged['doc_hash']}", logged.get(metric)
            except (ValueError, LookupError, TypeError) as error:
                expected = f"expected a sample a line, got {type(error).__name__}: {error}"
                raise SuiteError(f"{log}: {expected}; remove the file or run its suite again") from None
            if not isinstance(value, bool | int | float) or not math.isfinite(value):
                return {}
            found[question] = sign * float(value)
    return found
