"""The campaign's steps at full size: XS.2's published shape with random weights, then its published weights.

Random weights (plugins/random_weights.py) cost what real ones cost to read and multiply; acceptance means nothing with
them, so it is prescribed to vLLM (`rejection_sample_method: synthetic`), and every such figure is labelled synthetic.
"""

from __future__ import annotations

import json

from laguna_serve.bench.experiments.step import (
    DENSE_CONFIG,
    DENSE_RANDOM,
    OUT,
    PROMPTS,
    PYTHON,
    SMALL_ENGINE,
    XS2,
    XS2_DRAFT,
    XS2_DRAFT_RANDOM,
    XS2_FP8_PRUNED_RANDOM,
    XS2_FP8_RANDOM,
    XS2_PRUNED,
    XS2_PRUNED_RANDOM,
    XS2_RANDOM,
    Step,
)

INTO = ("--out", OUT)
LOAD = "--load-format laguna-random"
BOTH_LOAD = (f"--baseline-args={LOAD}", f"--candidate-args={LOAD}")
CONFIGS = ("tests/fixtures/releases", "tests/toy/teacher", "tests/toy/prompts.jsonl")
FEW = ("--num-prompts", "16", "--max-tokens", "128", "--control", "0")
TINY = ("--num-prompts", "8", "--max-tokens", "8", "--control", "0", *SMALL_ENGINE)
# The dense student as vLLM's own class serves it, padding and all.
STOCK_BASELINE = """--baseline-args=--hf-overrides '{"architectures":["LagunaForCausalLM"]}'"""
PUBLISHED_PAIR = ("--model", XS2, "--draft", XS2_DRAFT)
COST = "the cost of a γ + 1-row step: 1.1–1.5 plain steps (arithmetic; random drafts repeat, so that fewer experts are"
COST += " read than by real ones)"


def prescribe(gamma: int, length: float) -> str:
    """vLLM's flag for a drafter of γ tokens of which so many are emitted per step, whatever they are."""
    config = {
        "method": "dflash",
        "model": XS2_DRAFT_RANDOM,
        "num_speculative_tokens": gamma,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_length": length,
    }
    return f"{LOAD} --speculative-config '{json.dumps(config)}'"


def compare_synthetic(gamma: int, length: float, *size: str) -> tuple[str, ...]:
    """Plain decoding against prescribed acceptance, both at full size with random weights."""
    return (
        *(PYTHON, "bench/ab.py", "--model", XS2_RANDOM, "--sequential", "--prompts", PROMPTS, *size),
        *("--draft", XS2_DRAFT_RANDOM, "--gamma", str(gamma)),
        *(f"--baseline-args={LOAD}", f"--candidate-args={prescribe(gamma, length)}", *INTO),
    )


def compare_checkpoints(model: str, candidate: str, *size: str) -> tuple[str, ...]:
    """A/B of two checkpoints of full size, of which one fits at a time."""
    return (
        *(PYTHON, "bench/ab.py", "--model", model, "--candidate-model", candidate, "--sequential"),
        *("--prompts", PROMPTS, *size, *INTO),
    )


def make_synthetic_step(gamma: int, length: float, *, first: bool = False) -> Step:
    """Rows 3 and 4 of the list: the baseline's speed is the plain arm's, the step's cost is both arms'."""
    return Step(
        name=f"xs2-synthetic-{gamma}-{length:g}",
        part="full-size",
        row=3 if first else 4,
        command=compare_synthetic(gamma, length, *FEW),
        # A CPU's rejection sampler does not know the setting: the drafter alone is rehearsed.
        rehearsal=(
            *(PYTHON, "bench/ab.py", "--model", XS2_RANDOM, "--sequential", "--prompts", PROMPTS, *TINY),
            *("--draft", XS2_DRAFT_RANDOM, "--gamma", "3", *BOTH_LOAD),
            *INTO,
        )
        if first
        else (),
        result="ab.json",
        expected=f"plain: 200–400 tok/s on an H200 (arithmetic: about 6 GB are read per token, 1.4 ms at 4.3 TB/s, and"
        f" launches cost as much again); with γ {gamma} at a prescribed {length:g} tokens per step: {COST}; answers"
        " differ, as prescribed ones do"
        if first
        else f"with γ {gamma} at a prescribed {length:g} tokens per step: {COST}",
        why="the tuned baseline that every later claim is measured against, and what speculation costs at full size,"
        " free of acceptance"
        if first
        else "what speculation costs at full size, free of acceptance",
        starts=3,
        work_s=50,
        full_size=True,
        synthetic=True,
        falls_short=True,
        needs=CONFIGS,
    )


FULL_SIZE = (
    make_synthetic_step(7, 3, first=True),
    Step(
        name="xs2-pruned-memory",
        part="full-size",
        row=7,
        command=compare_checkpoints(XS2_RANDOM, XS2_PRUNED_RANDOM, *FEW, *BOTH_LOAD),
        rehearsal=compare_checkpoints(XS2_RANDOM, XS2_PRUNED_RANDOM, *TINY, *BOTH_LOAD),
        result="ab.json",
        expected="weights 5.850 GiB smaller at 10% (arithmetic); answers differ, as the weights do",
        falls_short=True,
        why="memory read from the device",
        starts=3,
        work_s=60,
        full_size=True,
        needs=CONFIGS,
    ),
    Step(
        name="xs2-fp8-pruned",
        part="full-size",
        row=27,
        command=(
            *(PYTHON, "bench/ab.py", "--model", XS2_FP8_RANDOM, "--candidate-model", XS2_FP8_PRUNED_RANDOM),
            *("--sequential", "--prompts", PROMPTS, *FEW, f"--baseline-args={LOAD}", f"--candidate-args={LOAD}", *INTO),
        ),
        # On a CPU vLLM has no kernel for whole experts in FP8: the pruned one in bf16 stands for it.
        rehearsal=(
            *(PYTHON, "bench/ab.py", "--model", XS2_PRUNED_RANDOM, "--candidate-model", XS2_FP8_PRUNED_RANDOM),
            *("--sequential", "--prompts", PROMPTS, *TINY, *INTO),
            *(f"--baseline-args={LOAD}", f"--candidate-args={LOAD}"),
        ),
        result="ab.json",
        expected="weights 32.9 GiB whole by vLLM's FP8 layers, 30.8 GiB at 10% by sentinel_moe, whose atoms have scales"
        " of their own (arithmetic); answers differ, as the weights do",
        falls_short=True,
        why="whether FP8 blocks beat vLLM's own FP8 experts, and by how much of the bytes; then `laguna compact"
        " poolside/Laguna-XS.2-FP8` with the published masks, and tokens against the zeroed form",
        starts=3,
        work_s=60,
        full_size=True,
        needs=CONFIGS,
    ),
    make_synthetic_step(3, 2),
    make_synthetic_step(5, 3),
    make_synthetic_step(7, 4),
    Step(
        name="dense-generate",
        part="full-size",
        row=9,
        command=(PYTHON, "scripts/generate_dense.py", DENSE_CONFIG, "--width", "1-39=4608", "--out", DENSE_RANDOM),
        rehearsal=(PYTHON, "scripts/generate_dense.py", DENSE_CONFIG, "--width", "1-5=64", "--out", DENSE_RANDOM),
        expected="7.7 GB of weights, zero-padded as the published student's",
        why="what dense-ab serves",
        work_s=90,
        needs=CONFIGS,
    ),
    Step(
        name="dense-ab",
        part="full-size",
        row=9,
        command=compare_checkpoints(
            DENSE_RANDOM, DENSE_RANDOM, "--num-prompts", "32", "--control", "4", STOCK_BASELINE
        ),
        rehearsal=compare_checkpoints(DENSE_RANDOM, DENSE_RANDOM, *TINY, STOCK_BASELINE),
        result="ab.json",
        expected="≥ 1.25× at 1 (7.30 → 5.58 GB are read per token: at most 1.31×), ≥ 1.7 GB less resident, tokens equal"
        ' or near ties; the log\'s "Looked for padding" under 5 s',
        why="the dense student at full size; then with `--concurrency` 8 and 64",
        starts=3,
        work_s=60,
        full_size=True,
        needs=(DENSE_RANDOM, *CONFIGS),
    ),
)

PUBLISHED = (
    Step(
        name="xs2-plan",
        part="published",
        row=19,
        command=(PYTHON, "-m", "laguna_serve.serving.cli", "doctor", XS2, "--draft", XS2_DRAFT, "--json"),
        expected='weights equal to the log\'s "Model loading took" to 0.1 GiB, the fitted context within 5%; XS.2 in'
        " bf16 on 80 GB: about 180,000 tokens, 95,000 with its drafter; FP8, too",
        why="activations and graphs in `serving/planning` are estimates; everything else there is arithmetic",
        work_s=30,
        needs=(XS2, XS2_DRAFT),
    ),
    Step(
        name="xs2-acceptance",
        part="published",
        row=26,
        command=(
            *(PYTHON, "bench/acceptance", *PUBLISHED_PAIR, "--gammas", "3,5,7", "--sequential"),
            *("--prompts", "bench/prompts/mixed.jsonl", "--num-prompts", "14", "--max-tokens", "512", *INTO),
        ),
        result="acceptance.json",
        expected="τ of 3–4 at γ 7 without thinking, other with it (the source document's are not of these prompts)",
        why="XS.2's acceptance by γ and position, thinking on and off, in a file that others can use"
        " (docs/speculation.md)",
        starts=10,
        work_s=300,
        full_size=True,
        needs=(XS2, XS2_DRAFT),
    ),
    Step(
        name="xs2-sweep",
        part="published",
        row=12,
        command=(
            *(PYTHON, "bench/gamma_sweep.py", *PUBLISHED_PAIR, "--sequential", "--concurrency", "1,8,32", "--chat"),
            *("--prompts", PROMPTS, "--gammas", "1,3,5,7", "--num-prompts", "256", *INTO),
        ),
        result="sweep.json",
        expected="γ* ≤ 7 on XS.2, falling with concurrency; 0 mismatches or near ties",
        why="the schedule of the real model, and what a step costs there",
        starts=6,
        work_s=600,
        full_size=True,
        needs=(XS2, XS2_DRAFT),
    ),
    Step(
        name="xs2-pruned-ab",
        part="published",
        row=8,
        command=compare_checkpoints(XS2, XS2_PRUNED, "--num-prompts", "32"),
        result="ab.json",
        expected="up to 1.03× at concurrency 1 (routed experts are a third of the bytes); answers differ",
        falls_short=True,
        why="what 10% pruning buys end to end",
        starts=3,
        work_s=90,
        full_size=True,
        needs=(XS2, XS2_PRUNED),
    ),
    Step(
        name="xs2-prefix-cache",
        part="published",
        row=10,
        command=(
            *(PYTHON, "bench/prefix_cache.py", *PUBLISHED_PAIR, "--compiled", "--characters", "4000"),
            *("--prompts", PROMPTS, "--quick", *INTO),
        ),
        result="prefix_cache.json",
        expected='"holds" everywhere; if warm falls, it is vllm#47930 in the V2 model runner',
        why="whether prefix caching and DFlash go together on the real model",
        starts=5,
        work_s=120,
        full_size=True,
        needs=(XS2, XS2_DRAFT),
    ),
    Step(
        name="dense-drafter",
        part="published",
        row=11,
        by_hand="`laguna serve XS2-dense --draft XS2-drafter --gamma max`",
        expected="one warning that the drafter is the teacher's, then a line with the acceptance",
        why="what the teacher's drafter is worth to the real student",
    ),
    Step(
        name="xs21-theta",
        part="published",
        row=21,
        by_hand="XS-2.1 with its drafter, γ 15, GSM8K in chat form, with the plugin and with `VLLM_PLUGINS=''`",
        expected="τ about 3.05 in vLLM's own CI, which has older transformers; without the plugin lower, as sliding"
        " layers rotate with theta 10,000",
        why="what the restored `rope_theta` is worth, and a public τ reproduced",
    ),
    Step(
        name="fp8-variables",
        part="published",
        row=22,
        by_hand="XS.2 FP8 with its drafter: `VLLM_USE_DEEP_GEMM` 0 (our default) and 1,"
        " `VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER` 0 and 1",
        expected="the recipes forbid 1; if all four hold parity on 0.32, the defaults can go for that version. The only"
        " drafter of XS.2 is the bf16 model's, whose hidden states are not rotated as FP8's are: expect about 1 token a"
        " step of it, and no speed (XS-2.1's FP8 release has one of its own)",
        why="which vLLM still needs the vendor's variables",
    ),
    Step(
        name="xs2-scores",
        part="published",
        row=31,
        by_hand="`python scripts/score_experts.py MODEL --score heapr --device cuda --dtype bfloat16 --out DIR` for the"
        " toy teacher (and with `--device cpu`), then for poolside/Laguna-XS.2-FP8 with `--text chunks.npy` of 128 rows"
        " of 2,048 tokens; `python scripts/frontier --model MODEL --device cuda --dtype bfloat16 --out DIR` likewise",
        expected="toy: ranks of the CPU's (Spearman above 0.999, as of its own bf16 with fp32: 0.99997); XS.2: at most"
        " 6.5 GiB of memory, 41.4 GiB of disk, 64 GiB read, by arithmetic",
        why="scores have been computed on CPUs alone; then which score prunes the real model best",
    ),
    Step(
        name="dense-hours",
        part="published",
        row=32,
        by_hand="`python scripts/distill_dense.py tests/fixtures/releases/Laguna-XS.2 --length 2048 --rows 16"
        " --accumulate 16 --layerwise --store logits --weights bfloat16 --checkpointing --logit-chunk 1024"
        " --out student --dry-run --measure` (from a config alone, with some 10 GB of random weights)",
        expected="about a third of the peak in stage 2 (torchtitan's Llama 3.1 8B on H100s), a fifth in the sparse"
        " teacher; docs/dense.md says 8.9 hours on one H100 by these",
        why="what distilling XS.2 takes, by what this code reaches",
    ),
)
