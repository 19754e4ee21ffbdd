"""Start an engine with its drafter, ask it as any OpenAI client would, and see how many tokens a step brought.

python examples/serve_and_ask.py [MODEL DRAFTER]
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from openai import OpenAI

from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.counters import scrape_counters, summarise_acceptance
from laguna_serve.serving.engine import Engine, EngineConfig

if len(sys.argv) not in (1, 3):
    sys.exit(f"serve_and_ask.py: error: expected MODEL and DRAFTER, or neither, got {len(sys.argv) - 1} arguments")
MODEL, DRAFTER = sys.argv[1:] or ("tests/toy/teacher", "tests/toy/dflash")
OUT = Path("out/examples")


async def read_acceptance(base_url: str) -> float:
    """Tokens per verification step since the engine started."""
    async with open_session() as session:
        acceptance = summarise_acceptance(await scrape_counters(session, base_url))
    return acceptance.length if acceptance is not None else 1.0


def main() -> None:
    """Stream one answer."""
    OUT.mkdir(parents=True, exist_ok=True)
    config = EngineConfig(model=MODEL, draft=DRAFTER, enforce_eager=True)
    with Engine(config, log_path=OUT / "engine.log", announce=print) as engine:
        client = OpenAI(base_url=f"{engine.base_url}/v1", api_key="none")
        prompt = "def fibonacci(n):\n    "
        stream = client.completions.create(
            model=engine.model_name, prompt=prompt, max_tokens=64, temperature=0, stream=True
        )
        print(prompt, end="")
        for chunk in stream:
            print(chunk.choices[0].text, end="", flush=True)
        print(f"\n{asyncio.run(read_acceptance(engine.base_url)):.2f} tokens per step")


if __name__ == "__main__":
    main()
