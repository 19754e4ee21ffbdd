"""The engine's metrics, under the names that vLLM gives them, so that what reads vLLM's reads these.

A draft is a request's visit to a pass of the target, a draft token a state that was proposed for it, and an accepted
token a proposed state that the decode came by: 1 + accepted ÷ drafts is then the steps that a pass brings.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from laguna_serve.plugins.diffusion.engine.batch import Totals
from laguna_serve.plugins.diffusion.engine.requests import Reason

LABELS = ("model_name", "engine")
REASONS: tuple[Reason, ...] = ("stop", "length", "abort", "error")
TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
REQUEST_BUCKETS_S = (0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class EngineMetrics:
    """Counters, gauges and histograms of one engine in a registry of their own."""

    def __init__(self, model_name: str, *, speculates: bool) -> None:
        self.registry = CollectorRegistry()
        values = (model_name, "0")

        def count(name: str, help_: str) -> Counter:
            return Counter(f"vllm:{name}", help_, LABELS, registry=self.registry).labels(*values)

        def gauge(name: str, help_: str) -> Gauge:
            return Gauge(f"vllm:{name}", help_, LABELS, registry=self.registry).labels(*values)

        def time(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}_seconds", help_, LABELS, buckets=buckets, registry=self.registry)
            return made.labels(*values)

        self._running = gauge("num_requests_running", "Requests that share passes.")
        self._waiting = gauge("num_requests_waiting", "Requests that wait to be admitted.")
        self._prompt = count("prompt_tokens", "Tokens of prompts that were admitted.")
        self._generation = count("generation_tokens", "Tokens of answers, as they were given out.")
        self._steps = count("diffusion_num_denoising_steps", "Steps of the requests' references.")
        self._positions = count("diffusion_num_canvas_positions", "Positions that the target evaluated.")
        self._committed = count("diffusion_num_committed_tokens", "Tokens committed, behind a gap or not.")
        self._first = time("time_to_first_token", "From the request to its first tokens.", TOKEN_BUCKETS_S)
        self._between = time("inter_token_latency", "Between two deliveries of tokens.", TOKEN_BUCKETS_S)
        self._whole = time("e2e_request_latency", "From the request to its end.", REQUEST_BUCKETS_S)
        ends = Counter("vllm:request_success", "Requests by how they ended.", (*LABELS, "finished_reason"),
                       registry=self.registry)  # fmt: skip
        self._ends = {reason: ends.labels(*values, reason) for reason in REASONS}
        self._drafts = self._proposed = self._accepted = None
        if speculates:
            self._drafts = count("spec_decode_num_drafts", "Visits of requests to passes of the target.")
            self._proposed = count("spec_decode_num_draft_tokens", "States that were proposed.")
            self._accepted = count("spec_decode_num_accepted_tokens", "Proposed states that decodes came by.")

    def show_load(self, running: int, waiting: int) -> None:
        """Show how many requests run and wait now."""
        self._running.set(running)
        self._waiting.set(waiting)

    def count_prompt(self, tokens: int) -> None:
        """Count a prompt that was admitted."""
        self._prompt.inc(tokens)

    def count_pass(self, before: Totals, after: Totals) -> None:
        """Count what a pass has done."""
        self._steps.inc(after.steps - before.steps)
        self._positions.inc(after.positions - before.positions)
        self._committed.inc(after.committed - before.committed)
        if self._drafts is not None and self._proposed is not None and self._accepted is not None:
            self._drafts.inc(after.visits - before.visits)
            self._proposed.inc(after.proposed - before.proposed)
            self._accepted.inc(after.accepted - before.accepted)

    def count_tokens(self, tokens: int, submitted_s: float, last_s: float | None, now_s: float) -> None:
        """Count tokens that are given out; `last_s`: when some of the request were before."""
        self._generation.inc(tokens)
        if last_s is None:
            self._first.observe(now_s - submitted_s)
        else:
            self._between.observe(now_s - last_s)

    def count_end(self, reason: Reason, submitted_s: float, now_s: float) -> None:
        """Count a request's end."""
        self._ends[reason].inc()
        self._whole.observe(now_s - submitted_s)

    def render(self) -> bytes:
        """Write them as Prometheus reads them."""
        return generate_latest(self.registry)
