"""Run by .venv-rl's Python: what `load_environment` makes of the settings on stdin, as one JSON object each."""

from __future__ import annotations

import json
import sys

import spec_rl

for settings in json.load(sys.stdin):
    try:
        env = spec_rl.load_environment(**settings)
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
    else:
        tasks = [{"key": task.key, "prompt": task.data.prompt, "kind": task.data.problem.kind} for task in env.taskset]
        print(json.dumps({"tasks": tasks, "runtime": env.config.agent.runtime.type}))
