"""Data sets that lie in a folder instead of on the Hugging Face hub.

A task of lm-evaluation-harness is a YAML file. For local data another one is written for it: it includes the
harness's own, so that prompt, filters, metrics and version stay the pinned ones, and names other files to read. It
keeps the task's name, by which the harness puts it in the place of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

from laguna_serve.evals.harnesses.settings import Suite, SuiteError
from laguna_serve.serving.kit.results import JsonObject

# As `datasets` calls the builder that reads such a file.
BUILDERS = {".jsonl": "json", ".parquet": "parquet"}


def write_tasks(suite: Suite, data: Path, harness_tasks: Path, folder: Path) -> list[Path]:
    """Write into `folder` the task definitions that read a suite's questions from `data`; returns the files of data.

    Args:
        harness_tasks: the harness's own definitions, …/lm_eval/tasks.

    Raises:
        SuiteError: a file is missing in `data`; nothing is written then.
    """
    definitions = find_definitions(suite, harness_tasks)
    tasks: JsonObject = {}
    read: list[Path] = []
    for definition in definitions:
        # A pattern's definitions are named after their subjects: mmlu_anatomy.yaml reads …/anatomy/; MMLU-Pro's one
        # file, each the questions of its category.
        many = "*" in suite.file
        subject = definition.stem.removeprefix("mmlu_")
        files = {split: find_file(data / suite.data.format(subject=subject), split) for split in suite.splits}
        read += files.values()
        tasks[definition.stem] = {
            "include": str(definition),
            "task": definition.stem if many else suite.task,
            "dataset_path": BUILDERS[next(iter(files.values())).suffix],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
            "validation_split": "validation" if suite.splits[-1] == "validation" else None,
        }
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        # JSON is YAML, and no library is needed to write it.
        (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
    return read


def find_definitions(suite: Suite, harness_tasks: Path) -> list[Path]:
    """Find the harness's own files that define the suite.

    Raises:
        SuiteError: there is none, as in another release.
    """
    found = sorted(harness_tasks.glob(suite.file))
    if suite.tag:
        found = [path for path in found if f'"{suite.tag}"' in path.read_text(encoding="utf-8")]
    if not found:
        expected = f"expected {suite.file} in {harness_tasks}, got nothing"
        raise SuiteError(f"{suite.name}: {expected}; remove .venv-evals and run bash scripts/client_env.sh evals")
    return found


def find_file(folder: Path, split: str) -> Path:
    """SPLIT.jsonl or SPLIT.parquet, with the fields of the data set on the hub.

    Raises:
        SuiteError: there is neither.
    """
    for suffix in BUILDERS:
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return path.resolve()
    raise SuiteError(f"--data: expected {folder}/{split}.jsonl or .parquet, got neither; export that split there")
