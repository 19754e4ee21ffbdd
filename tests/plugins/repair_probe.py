"""Put the cases of plugins/repairs to vLLM's sampling and print what comes out, as JSON.

    python repair_probe.py stock|repaired

In a process of its own, as repairs are for good.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import vllm._custom_ops  # noqa: F401
from vllm.platforms import current_platform

current_platform.import_kernels()
current_platform.register_triton_kernel_overrides()

from torch import distributed  # noqa: E402
from torch._dispatch.python import enable_python_dispatcher  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import has_torch_function_unary  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm._custom_ops import CPUDNNLGEMMHandler  # noqa: E402
from vllm.compilation import caching, decorators  # noqa: E402
from vllm.config import SpeculativeConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.model_executor.parameter import BasevLLMParameter  # noqa: E402
from vllm.v1.sample import logits_processor  # noqa: E402
from vllm.v1.sample.logits_processor.state import BatchUpdate  # noqa: E402
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.rejection_sampler import RejectionSampler  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: E402

if sys.argv[1] == "repaired":
    from laguna_serve.plugins.repairs import repair_runner

    repair_runner()
    repair_runner()

VOCABULARY, STOP = 12, 7
CONFIG = SimpleNamespace(speculative_config=True, scheduler_config=SimpleNamespace(max_num_seqs=8))


def main() -> None:
    cases = (top_k_in_a_prefill, refused, processed, likeliest, min_tokens_behind_drafts, named_beside_drafts,
             named_and_likeliest, cut_prompt, seeded, stored_function, named_by_instruction_set,
             released_while_tracing, dropped_blocks, asked_of_python, gathered)  # fmt: skip
    print(json.dumps({case.__name__: case() for case in cases}))


def sampling(batch: int, params: list[SamplingParams] | None = None, **changes: Any) -> SamplingMetadata:
    """Metadata of a batch without any wish, with changes; the processors have seen `params`."""
    built = logits_processor.build_logitsprocs(CONFIG, torch.device("cpu"), False, False)
    if params is not None:
        added = [(row, wish, [1], []) for row, wish in enumerate(params)]
        for processor in built.all:
            processor.update_state(BatchUpdate(batch_size=batch, removed=[], added=added, moved=[]))
    plain = SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None, generators={},
        max_num_logprobs=None, no_penalties=True, prompt_token_ids=None, frequency_penalties=torch.zeros(batch),
        presence_penalties=torch.zeros(batch), repetition_penalties=torch.ones(batch),
        output_token_ids=[[] for _ in range(batch)], spec_token_ids=[[] for _ in range(batch)],
        allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=built,
    )  # fmt: skip
    return replace(plain, **changes)


def drafts(tokens: list[list[int]]) -> SpecDecodeMetadata:
    """Where the rows of requests with these drafts are: each request's own behind one another, its bonus row last."""
    counts = [len(own) for own in tokens]
    ends = torch.tensor(list(accumulate(count + 1 for count in counts)))
    rows = torch.arange(int(ends[-1]))
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor([token for own in tokens for token in own], dtype=torch.int32),
        num_draft_tokens=counts,
        cu_num_draft_tokens=torch.tensor(list(accumulate(counts)), dtype=torch.int32),
        cu_num_sampled_tokens=ends.int(),
        target_logits_indices=rows[~torch.isin(rows, ends - 1)],
        bonus_logits_indices=ends - 1,
        logits_indices=rows,
    )


def peaks(tokens: list[int]) -> torch.Tensor:
    """Logits whose likeliest token is given per row; the token before it comes next."""
    logits = torch.zeros(len(tokens), VOCABULARY)
    for row, token in enumerate(tokens):
        logits[row, token], logits[row, token - 1] = 5.0, 4.0
    return logits


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (RuntimeError, VLLMValidationError) as error:
        return f"{type(error).__name__}: {error}"


def top_k_in_a_prefill() -> Any:
    wish = sampling(1, temperature=torch.ones(1), all_greedy=False, all_random=True, top_k=torch.tensor([1]))
    return outcome(lambda: RejectionSampler(Sampler())(drafts([[]]), None, peaks([3]), wish).sampled_token_ids.tolist())


def refused() -> Any:
    wishes = [SamplingParams(logit_bias={3: 1.0}), SamplingParams(min_p=0.1)]
    return [outcome(lambda wish=wish: wish._validate_spec_decode(object())) for wish in wishes]


def processed() -> Any:
    """Tokens of a request whose bias makes 9 the likeliest everywhere, beside one without."""
    wish = sampling(2, [SamplingParams(temperature=0, logit_bias={9: 50.0}), SamplingParams(temperature=0)])
    logits = peaks([3, 4, 5, 3, 4, 5])
    return RejectionSampler(Sampler())(drafts([[9, 9], [3, 4]]), None, logits, wish).sampled_token_ids.tolist()


def likeliest() -> Any:
    """Greedy requests, as they are verified at once and by the way that processes logits; ties are among the rows."""
    generator = torch.Generator().manual_seed(0)
    differing = tokens = 0
    for round_ in range(40):
        counts = [(round_ + row) % 4 for row in range(3)]
        logits = torch.randint(0, 4, (sum(counts) + 3, VOCABULARY), generator=generator).to(torch.bfloat16)
        best = logits.float().argmax(dim=-1).tolist()
        own = [[best.pop(0) if (round_ + i) % 5 else 0 for i in range(count)] for count in counts]
        plain = RejectionSampler(Sampler())(drafts(own), None, logits.clone(), sampling(3)).sampled_token_ids
        # A request for log-probabilities is one that takes the other way.
        asked = sampling(3, max_num_logprobs=1)
        other = RejectionSampler(Sampler())(drafts(own), None, logits.clone(), asked).sampled_token_ids
        differing += plain.tolist() != other.tolist() or plain.dtype != other.dtype
        tokens += int((plain >= 0).sum())
    return {"differing": differing, "tokens": tokens}


def min_tokens_behind_drafts() -> Any:
    """Two tokens at least are wanted.

    With both drafts accepted the third may be a stop token, with no draft the first may not.
    """
    params = [SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[STOP]) for _ in range(2)]
    wish = sampling(2, params)
    logits = peaks([3, 4, STOP, STOP])
    return RejectionSampler(Sampler())(drafts([[3, 4], []]), None, logits, wish).sampled_token_ids.tolist()


def named_beside_drafts() -> Any:
    wish = sampling(2, logprob_token_ids={0: [1, 2]}, max_num_logprobs=1)
    logits = peaks([3, 9, 4, 5, 6])

    def run() -> Any:
        output = RejectionSampler(Sampler())(drafts([[3, 4], [5]]), None, logits, wish).logprobs_tensors
        # The second request's rows, and the first one's third, are behind what it got: see its tokens [3, 9].
        expected = logits.log_softmax(-1)[:2, [1, 2]]
        return [output.logprob_token_ids.tolist(), torch.equal(output.logprobs[:2, 1:], expected)]

    return outcome(run)


def named_and_likeliest() -> Any:
    """A request that names two tokens beside one that wants the three likeliest."""
    output = Sampler()(peaks([3, 5]), sampling(2, logprob_token_ids={0: [1, 2]}, max_num_logprobs=3))
    return [row[1:] for row in output.logprobs_tensors.logprob_token_ids.tolist()]


def cut_prompt() -> Any:
    """What the runner does to the generator of a request whose prompt goes on in the next step."""
    generator = torch.Generator("cpu").manual_seed(3)
    before = generator.get_state()
    batch = SimpleNamespace(num_reqs=1, generators={0: generator}, sampling_metadata=None)
    runner = SimpleNamespace(
        use_async_scheduling=False,
        input_batch=batch,
        discard_request_mask=SimpleNamespace(np=torch.tensor([True]).numpy()),
        sampler=lambda logits, sampling_metadata: torch.rand(1, generator=batch.generators.get(0)),
    )
    batch.update_async_output_token_ids = lambda: None
    GPUModelRunner._sample(runner, None, None)
    try:
        GPUModelRunner._bookkeeping_sync(runner, None, None, None, None, 0)
    except RuntimeError as error:
        return str(error)
    except AttributeError:  # of what the runner lacks behind the place in question
        return bool((generator.get_state() == before).all()) and batch.generators == {0: generator}


def seeded() -> Any:
    """Tokens of a seed without drafts, and with drafts that are right, wrong in the second place, and wrong at once."""
    torch.manual_seed(0)
    logits = torch.randn(4, VOCABULARY) / 2

    def wish() -> SamplingMetadata:
        generators = {0: torch.Generator().manual_seed(6)}
        return sampling(1, temperature=torch.ones(1), all_greedy=False, all_random=True, generators=generators)

    plain = wish()
    alone = [int(Sampler()(logits[row : row + 1], plain).sampled_token_ids) for row in range(4)]
    runs = []
    for accepted in (3, 1, 0):
        guess = [token if row < accepted else (token + 1) % VOCABULARY for row, token in enumerate(alone[:3])]
        drafted = wish()
        output = RejectionSampler(Sampler())(drafts([guess]), None, logits.clone(), drafted).sampled_token_ids[0]
        tokens = [token for token in output.tolist() if token >= 0]
        # What comes next is drawn with the generator as it was left.
        while len(tokens) < 4:
            tokens.append(int(Sampler()(logits[len(tokens) : len(tokens) + 1], drafted).sampled_token_ids))
        runs.append(tokens)
    return [alone, runs]


def stored_function() -> Any:
    """What is computed by a compiled function that was stored without vLLM's backend; None where it is not loaded.

    The samplers of the cases above have applied the repair.
    """
    config = VllmConfig()
    model = SimpleNamespace(
        vllm_config=config, compilation_config=config.compilation_config, forward=double, _is_encoder=False
    )
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        path = f"{folder}/model"
        torch.compile(double, backend="aot_eager", fullgraph=True).aot_compile(
            ((torch.ones(2),), {})
        ).save_compiled_function(path)
        loaded = decorators._try_load_aot_compiled_fn(model, path)
        return None if loaded is None else loaded(torch.ones(2)).tolist()


def double(numbers: torch.Tensor) -> torch.Tensor:
    return numbers * 2


def named_by_instruction_set() -> Any:
    """Whether the name of what is stored says which instructions it may use."""
    names = []
    for limit in ("avx2", "default"):
        os.environ["ATEN_CPU_CAPABILITY"] = limit
        names.append(caching.aot_compile_hash_factors(VllmConfig()))
    return names[0] != names[1]


def released_while_tracing() -> Any:
    """Which handles are given back when a prepared matrix is collected while a model is traced."""
    released: list[int] = []
    handler = CPUDNNLGEMMHandler()
    handler.handler_tensor = torch.tensor(7)
    handler.dtor = released.append
    with FakeTensorMode() as mode, enable_python_dispatcher():
        mode.from_tensor(torch.ones(2)) + 1
        try:
            handler.__del__()
        except Exception as error:
            return type(error).__name__
    handler.handler_tensor = None
    return released


def asked_of_python() -> list[bool]:
    """Whether torch hands operations on a weight to Python: vLLM's, and torch's own for comparison."""
    weight = BasevLLMParameter.__new__(BasevLLMParameter, torch.ones(2))
    return [has_torch_function_unary(weight), has_torch_function_unary(torch.nn.Parameter(torch.ones(2)))]


def dropped_blocks() -> dict[str, bool]:
    """Whether the last matched block is computed again, by the drafter's method."""
    dropped = {}
    for method in ("dflash", "eagle3"):
        config = object.__new__(SpeculativeConfig)
        config.method, config.disable_eagle_block_drop = method, False
        dropped[method] = config.use_eagle_block_drop()
    return dropped


def gathered() -> Any:
    """What a CPU's ranks gather of rows of which each rank has another number: shapes of the whole and of the sum."""
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        ranks: Any = SimpleNamespace(world_size=1, rank_in_group=0, device_group=distributed.group.WORLD)
        try:
            whole = CpuCommunicator.all_gatherv(ranks, [torch.ones(3, 2), torch.ones(3)], 0, [3])
            return [list(part.shape) for part in (*whole, CpuCommunicator.reduce_scatterv(ranks, whole[0], 0, [3]))]
        except NotImplementedError:
            return None
        finally:
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
