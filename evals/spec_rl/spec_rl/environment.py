"""One agent, one answer, on this machine: verifiers' own single-agent environment with other defaults.

Its default runtime is a rented sandbox in the cloud. Nothing of a rollout runs in the runtime here (the harness asks
from this process, the model's code runs in laguna_serve's own sandbox), so it is this machine's.
"""

from __future__ import annotations

import asyncio

import verifiers.v1 as vf

from laguna_serve.evals.codegen import choose_walls
from spec_rl.taskset import SpecRlConfig


class SpecRlEnvConfig(vf.SingleAgentEnvConfig):
    """Settings of the environment: verifiers' own."""

    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig(), max_turns=1)


class SpecRlEnv(vf.Env[SpecRlEnvConfig]):
    """Every episode is one problem and one answer to it."""

    async def start(self) -> None:
        """Make sure, before anything is asked, that answers can be graded.

        Raises:
            JailError: there is no sandbox on this system, and the configuration does not say to do without.
        """
        settings = self.taskset.config
        if isinstance(settings, SpecRlConfig):
            await asyncio.to_thread(choose_walls, settings.task.walls)

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        """Ask for the answer; verifiers scores it."""
        await agents.agent.run(task)
