"""Run by .venv-rl's Python: what prime-rl's evaluation command does with a configuration, as far as it is verifiers'.

    env_server_probe.py CONFIG.toml BASE_URL MODEL WORKERS [FIELD=JSON …]

For every `[[source]]` its `env` block goes to an env server in a process of its own (`serve_env`, as prime-rl's
`env-server` calls it), the tasks are loaded here, and each one's data is sent there to be run. FIELD: of the taskset.
Prints one JSON object for each episode. Modelled on prime-rl's src/prime_rl/entrypoints/{eval,env_server}.py and
orchestrator/envs.py of September 2026; prime-rl itself wants a GPU's stack.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import tomllib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.serve import EnvClient, env_config_data, serve_env


async def run_source(source: dict[str, Any], config: dict[str, Any], client: Any, address: str) -> list[Any]:
    """Every episode of one source, `max_inflight` at a time."""
    env = EnvClient(address=address)
    await env.wait_for_server_startup(timeout=120)
    tasks = list(vf.load_taskset(vf.resolve_env_config(source["env"]).taskset))
    slots = asyncio.Semaphore(config["concurrency"]["max_inflight"])
    sampling = vf.SamplingConfig(**config["sampling"], **source.get("sampling", {}))

    async def run(task: Any) -> Any:
        async with slots:
            data = task.data.model_dump(mode="json")
            return await env.run(client=client, model=config["model"], sampling=sampling, task_data=data)

    return await asyncio.gather(*(run(task) for task in tasks for _ in range(config["group_size"])))


def main() -> None:
    path, base_url, model, workers, *fields = sys.argv[1:]
    config = tomllib.loads(Path(path).read_text())
    config["model"] = model
    client = vf.EvalClientConfig(**{**config["client"], "base_url": base_url})
    context = multiprocessing.get_context("fork")  # nothing has been started yet, and importing verifiers takes long
    for source in config["source"]:
        for field in fields:
            name, _, value = field.partition("=")
            source["env"]["taskset"][name] = json.loads(value)
        pool = vf.StaticPoolConfig(num_workers=int(workers))
        addresses = context.Queue()
        alive: tuple[Connection, Connection] = context.Pipe()
        server = context.Process(
            target=serve_env,
            kwargs={
                **vf.pool_serve_kwargs(pool),
                "address": "tcp://127.0.0.1:*",
                "address_queue": addresses,
                "death_pipe": alive[1],
                "config_data": env_config_data(vf.resolve_env_config(source["env"])),
                "max_concurrent": None,
            },
        )
        server.start()
        try:
            episodes = asyncio.run(run_source(source, config, client, addresses.get(timeout=120)))
        finally:
            server.terminate()
            server.join(60)
        assert server.exitcode == 0, server.exitcode
        for episode in episodes:
            print(json.dumps({"name": source["name"], "traces": [t.model_dump(mode="json") for t in episode.traces]}))


if __name__ == "__main__":
    main()
