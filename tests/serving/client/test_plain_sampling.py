"""The fields that keep a request's sampling its own, against what vLLM takes from a generation_config.json."""

from __future__ import annotations

import json

import pytest
from warm import run_warm

from laguna_serve.serving.client.sampling import PLAIN_SAMPLING

pytestmark = pytest.mark.vllm

# Which fields vLLM takes over, and what becomes of a request beside a generation_config.json that sets all of them.
PROBE = """
import json, sys
from types import SimpleNamespace
from vllm.config import ModelConfig
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.sampling_params import SamplingParams

plain = json.loads(sys.argv[1])
odd = dict.fromkeys([*SamplingParams.__struct_fields__, "max_new_tokens"], 0.5) | {"top_k": 20, "max_new_tokens": 3}
stub = SimpleNamespace(generation_config="vllm", override_generation_config=odd)
taken = ModelConfig.get_diff_sampling_param(stub)
def sample(fields, defaults):
    return str(CompletionRequest(prompt="x", temperature=1.0, **fields).to_sampling_params(8, defaults))
print(json.dumps({
    "taken": sorted(taken),
    "inherits": sample({}, taken) != sample({}, {}),
    "plain": sample(plain, taken) == sample({}, {}),
}))
"""


def test_a_plain_request_takes_nothing_from_generation_config() -> None:
    done = run_warm(PROBE, json.dumps(PLAIN_SAMPLING))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["taken"]) == {"temperature", "max_tokens", *PLAIN_SAMPLING}
    assert found["inherits"]
    assert found["plain"]
