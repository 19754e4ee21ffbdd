"""A mock of .venv-evals: its python notes how it was called and leaves a result file, or fails as its settings say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# What STUB in the environment says: ok, fail, unreached (no network), nothing (ends well without a result), or cut (a
# prompt was too long).
PYTHON = """#!{python}
import json, os, pathlib, sys
arguments = sys.argv[1:]
here = pathlib.Path(__file__).parent
with open(here / "calls.jsonl", "a") as calls:
    offline = os.environ.get("HF_DATASETS_OFFLINE")
    calls.write(json.dumps({{"arguments": arguments, "offline": offline}}) + "\\n")
how = os.environ["STUB"]
if how == "fail":
    sys.exit("ValueError: out of luck")
if how == "unreached":
    sys.exit("ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)")
if how == "cut":
    print("Context length (90) + continuation length (3) > max_length (64). Left truncating context.")
if how != "nothing":
    folder = pathlib.Path(arguments[arguments.index("--output_path") + 1]) / "fake"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results_2026-11-21T10-00-00.000000.json").write_text((here / "result.json").read_text())
"""
DEFINITIONS = {
    "arc/arc_challenge.yaml": "task: arc_challenge\n",
    "mmlu/default/mmlu_anatomy.yaml": '"tag": "mmlu_stem_tasks"\n"task": "mmlu_anatomy"\n',
    "mmlu_pro/mmlu_pro_biology.yaml": "task: mmlu_pro_biology\n",
    "mmlu_pro/mmlu_pro_law.yaml": "task: mmlu_pro_law\n",
    "mmlu/default/mmlu_world_religions.yaml": '"tag": "mmlu_humanities_tasks"\n"task": "mmlu_world_religions"\n',
}


class StubHarness:
    """`folder` is the environment; `calls` what its python was asked."""

    def __init__(self, folder: Path, result: dict[str, Any]) -> None:
        self.folder = folder
        self.tasks = folder / "lib" / "python3.11" / "site-packages" / "lm_eval" / "tasks"
        for name, text in DEFINITIONS.items():
            (self.tasks / name).parent.mkdir(parents=True, exist_ok=True)
            (self.tasks / name).write_text(text)
        self._bin = folder / "bin"
        self._bin.mkdir()
        (self._bin / "python").write_text(PYTHON.format(python=sys.executable))
        (self._bin / "python").chmod(0o755)
        (self._bin / "result.json").write_text(json.dumps(result))
        (folder / ".stamp").write_text("made")

    @property
    def calls(self) -> list[dict[str, Any]]:
        path = self._bin / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
