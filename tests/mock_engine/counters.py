"""vLLM's counters at /metrics, as far as this project reads them."""

from __future__ import annotations

LABELS = '{engine="0",model_name="fake"}'


class Counters:
    """Counts chunks and requests; draft counters are shown where `gamma` is not 0, `position` by position."""

    def __init__(self, gamma: int) -> None:
        self.gamma = gamma
        self.generation = self.prompt = self.hits = self.requests = 0
        self.drafts = self.draft_tokens = self.accepted = 0
        self.accepted_per_position = [0] * gamma

    def count_chunk(self, number: int, size: int, *, drafted: bool = True) -> None:
        """The chunk of an answer with so many tokens. The first token is the prefill's, which no draft is for."""
        self.generation += size
        if self.gamma and drafted and number > 0:
            self.drafts += 1
            self.draft_tokens += self.gamma
            self.accepted += size - 1
            for position in range(size - 1):
                self.accepted_per_position[position] += 1

    def count_drafts(self, drafts: int) -> None:
        """Of an answer, all at once: every draft but its last token is accepted."""
        self.drafts += drafts
        self.draft_tokens += self.gamma * drafts
        for position in range(self.gamma - 1):
            self.accepted += drafts
            self.accepted_per_position[position] += drafts

    def count_request(self, prompt_tokens: int, *, hits: int = 0, foreign: int = 0) -> None:
        """A request that has ended, and what was in the counters beside it."""
        self.requests += 1
        self.prompt += prompt_tokens
        self.hits += hits
        self.generation += foreign

    def render(self) -> str:
        """The text of /metrics."""
        lines = [
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.",
            f"vllm:generation_tokens_total{LABELS} {float(self.generation)}",
            f"vllm:generation_tokens_created{LABELS} 1.7e+09",
            f"vllm:prompt_tokens_total{LABELS} {float(self.prompt)}",
            f"vllm:prefix_cache_hits_total{LABELS} {float(self.hits)}",
            f'vllm:request_success_total{{engine="0",finished_reason="length"}} {float(self.requests)}',
            'vllm:request_success_total{engine="0",finished_reason="stop"} 0.0',
        ]
        if self.gamma:
            counts = {"drafts": self.drafts, "draft_tokens": self.draft_tokens, "accepted_tokens": self.accepted}
            lines += [f"vllm:spec_decode_num_{name}_total{LABELS} {float(count)}" for name, count in counts.items()]
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines += [
                f'{name}{{engine="0",position="{position}"}} {float(accepted)}'
                for position, accepted in enumerate(self.accepted_per_position)
            ]
        return "\n".join(lines) + "\n"
