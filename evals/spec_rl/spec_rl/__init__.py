"""Executable code problems for reinforcement learning, as a `verifiers` environment (README.md beside pyproject.toml).

verifiers finds the taskset, the harness and the environment by this module's `__all__`, under the id `spec_rl`.
"""

from __future__ import annotations

from typing import Any

import verifiers.v1 as vf

from spec_rl.environment import SpecRlEnv
from spec_rl.harness import OneAnswerHarness
from spec_rl.taskset import SpecRlTaskset

__all__ = ["OneAnswerHarness", "SpecRlEnv", "SpecRlTaskset", "load_environment"]


def load_environment(**taskset: Any) -> vf.Env[Any]:
    """Load the environment for Python callers, with the settings of `SpecRlConfig` by name.

        env = load_environment(split="held_out", held_out_share=0.2, task={"wall_s": 5})

    Raises:
        pydantic.ValidationError: an unknown setting, a value out of range, problems that cannot be read.
    """
    return vf.load_environment(vf.resolve_env_config({"taskset": {**taskset, "id": "spec_rl"}}))
