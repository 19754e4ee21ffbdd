"""A diffusion server in a thread of this process, and what it should say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from random import Random

import httpx
import uvicorn
from openai import OpenAI
from tiny_llada import MASK

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.engine.loop import Engine
from laguna_serve.plugins.diffusion.engine.metrics import EngineMetrics
from laguna_serve.plugins.diffusion.engine.requests import Limits
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.server.access import add_access
from laguna_serve.plugins.diffusion.server.app import Service, make_app
from laguna_serve.plugins.diffusion.server.choices import Defaults
from laguna_serve.plugins.diffusion.server.loading import Served
from laguna_serve.plugins.diffusion.speculation import Decoder

TIMEOUT_S = 60.0


class Running:
    """A server in a thread of this process."""

    def __init__(
        self, served: Served, *, running: int = 8, waiting: int = 64, key: str | None = None, seed: int = 0
    ) -> None:
        self.served = served
        metrics = EngineMetrics("toy", speculates=served.decoder.speculation is not None)
        limits = Limits(sequence=served.max_model_len, vocabulary=served.vocab_size, running=running, waiting=waiting)
        self.engine = Engine(served.decoder, metrics, limits)
        app = make_app(Service(self.engine, served, Defaults(32, 8, Random(seed)), "toy", "toy-folder"))
        add_access(app, key, '["https://page.example"]')
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run)
        self.url = ""

    def __enter__(self) -> Running:
        self.engine.start()
        self._thread.start()
        deadline = time.monotonic() + TIMEOUT_S
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=TIMEOUT_S, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._server.should_exit = True
        self.engine.stop()
        self._thread.join(TIMEOUT_S)
        assert self.engine.join(TIMEOUT_S)

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", http_client=self.http, max_retries=0)

    def read(self, name: str) -> float:
        value = self.engine.metrics.registry.get_sample_value(f"vllm:{name}", {"model_name": "toy", "engine": "0"})
        assert value is not None
        return value

    def wait(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def decode(self, prompt: list[int], length: int, reference: Reference, block: int = 8) -> list[int]:
        """The offline reference's answer, up to its end."""
        decoder = Decoder(Predictor(self.served.decoder.predictor.model), reference, self.served.stop)
        (run,) = decoder.decode([Canvas(tuple(prompt), length, block, MASK)])
        return list(run.read_answer())

    def say(self, ids: list[int]) -> str:
        return self.served.texts.decode([token for token in ids if token not in self.served.stop])
