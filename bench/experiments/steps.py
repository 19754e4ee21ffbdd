"""The campaign's steps on kernels and on the toy family, in order of worth; those at full size: full_size.py.

A number in `expected` that comes from arithmetic says so; none has been seen on a GPU.
"""

from __future__ import annotations

from laguna_serve.bench.experiments import suites
from laguna_serve.bench.experiments.full_size import FULL_SIZE, PUBLISHED
from laguna_serve.bench.experiments.step import DRAFT, OUT, PROMPTS, PYTHON, SMALL_ENGINE, TOY, TOY_FILES, Step

PAIR = ("--model", TOY, "--draft", DRAFT)
ASKED = ("--prompts", PROMPTS)
INTO = ("--out", OUT)
CACHE = ("--kv-cache-gib", "2")
SWEPT = ("--gammas", "1,3,5,7", "--num-prompts", "256")
SMALL_LAYER = ("--experts", "16", "--hidden", "160", "--intermediate", "128", "--block", "16", "--topk", "4")
TUNE = (PYTHON, "bench/moe_tuning")
SMALL_ROWS = ("--tokens", "1,8", "--pruning", "0,0.25", "--routing", "uniform", "--repeats", "3")
WHOLE_TABLE = (
    *("--tokens", "1,2,4,8,16,17,32,64,256,1024", "--pruning", "0,0.1,0.25,0.4"),
    *("--routing", "uniform,skewed"),
)


KERNELS = (
    Step(
        name="doctor",
        part="kernels",
        row=2,
        command=(PYTHON, "-m", "laguna_serve.serving.cli", "doctor", "--json"),
        rehearsal=(PYTHON, "-m", "laguna_serve.serving.cli", "doctor", "--json"),
        expected="LagunaForCausalLM (router bias loaded), LagunaDenseForCausalLM and LagunaSentinelForCausalLM resolve"
        " to ours, DFlashLagunaForCausalLM too, DFlashDraftModel to vLLM's own class; exit 0",
        why="what is overridden on a GPU",
        work_s=30,
    ),
    Step(
        name="moe-decode",
        part="kernels",
        row=6,
        command=(
            *(PYTHON, "bench/moe.py", "--tokens", "1,8,24", "--pruning", "0,0.4", "--weights", "full,fp8", *INTO),
        ),
        rehearsal=(PYTHON, "bench/moe.py", *SMALL_LAYER, *SMALL_ROWS, *INTO),
        result="moe.json",
        expected="floors at 0% by bytes (3.0 and 4.3 TB/s), bf16 and FP8: M = 1 16.8, 8.7 µs on an H100, 11.7, 6.0 on"
        " an H200; M = 8 120, 62 and 84, 43; M = 24 286, 148 and 200, 103. Expected within 1.35 of them at M = 1 (three"
        " launches, two dependent reads before the first weight) and 1.15 from 8 on; pruned time within 5% of the byte"
        " ratio",
        why="the kernel's first times (the timing of graphs in bench/moe_layer/timing.py was moved and has not run on a"
        " GPU since), against vLLM's H100 table on a Hopper card",
        work_s=150,
    ),
    Step(
        name="moe-window",
        part="kernels",
        row=6,
        command=(
            *(PYTHON, "bench/moe.py", "--tokens", "16,17,32,64,65,256,2048", "--pruning", "0"),
            *("--weights", "full", *INTO),
        ),
        rehearsal=(PYTHON, "bench/moe.py", *SMALL_LAYER, *SMALL_ROWS, *INTO),
        result="moe.json",
        expected="no step at 16 to 17; at 64 to 65 (members listed by a launch of their own) at most 5%; parity with"
        " vLLM's tuned kernel within 10% up to 256 tokens; what 2,048 take is not foreseen",
        why="the window of speculative serving, and prefill, which has no figure at all",
        work_s=200,
    ),
    Step(
        name="moe-tiles-bf16",
        part="kernels",
        row=6,
        command=(*TUNE, "--weights", "16-bit", "--path", "decode", "--most", "40", *INTO),
        rehearsal=(*TUNE, "--plan", "--capability", "90", "--path", "decode", "--most", "2", *INTO),
        result="tiles.json",
        expected="the shipped row, chosen from compiled resources, within 10% of the best of 40",
        why="tiles have never met a clock; the file goes to kernels/sentinel_moe/tables/",
        work_s=290,
    ),
    Step(
        name="moe-tiles-fp8",
        part="kernels",
        row=6,
        command=(*TUNE, "--weights", "fp8", "--path", "decode", "--most", "40", *INTO),
        rehearsal=(*TUNE, "--plan", "--capability", "90", "--path", "decode", "--most", "2", *INTO),
        result="tiles.json",
        expected="floors of 8-bit weights with their scales: M = 1 8.7 µs on an H100, 6.0 on an H200; M = 8 62, 43;"
        " M = 24 148, 103. Decoding takes 4 instructions a byte, half of what an H200 issues: more warps or larger"
        " tiles are expected to win there",
        why="FP8 is what XS.2 ships in",
        work_s=290,
    ),
)

ENGINE = (
    Step(
        name="toy-ab",
        part="engine",
        row=1,
        command=(PYTHON, "bench/ab.py", *PAIR, "--gamma", "7", *CACHE, *ASKED, "--num-prompts", "64", *INTO),
        rehearsal=(
            *(PYTHON, "bench/ab.py", *PAIR, "--gamma", "3", *SMALL_ENGINE, *ASKED),
            *("--num-prompts", "8", "--max-tokens", "16", "--control", "2", *INTO),
        ),
        result="ab.json",
        expected="τ as on a CPU (4.29 at γ 7) within 0.1; 0 mismatches or near ties only; speed-up reported as found"
        " (the toy is launch-bound)",
        why="the whole path on CUDA, as `bash scripts/demo.sh` takes it: plugin load, graphs, FlashAttention's"
        " non-causal draft",
        starts=2,
        work_s=40,
        needs=TOY_FILES,
    ),
    Step(
        name="toy-certificate",
        part="engine",
        row=13,
        command=(PYTHON, "bench/certify.py", *PAIR, *CACHE, *ASKED, "--quick", *INTO),
        rehearsal=(
            *(PYTHON, "bench/certify.py", *PAIR, *SMALL_ENGINE, *ASKED, "--no-replay"),
            *("--row-matched", "none", "--num-prompts", "8", "--max-tokens", "16", "--concurrency", "1", *INTO),
        ),
        result="certificate.json",
        expected="equal up to ties (other kernels for 1 and 8 rows round otherwise); noise of some 0.1 nats in bf16",
        why="the certificate where rounding is not bit for bit; with 512 prompts and `--row-matched synthetic`:"
        " toy-certificate-full",
        starts=4,
        work_s=60,
        needs=TOY_FILES,
    ),
    Step(
        name="toy-prefix-cache",
        part="engine",
        row=10,
        command=(PYTHON, "bench/prefix_cache.py", *PAIR, *ASKED, "--compiled", "--quick", *INTO),
        rehearsal=(
            *(PYTHON, "bench/prefix_cache.py", *PAIR, *ASKED, "--num-prompts", "4", "--max-tokens", "8", *INTO),
        ),
        result="prefix_cache.json",
        expected='"holds" everywhere; if warm falls, it is vllm#47930 in the V2 model runner, which a CPU cannot run',
        why="whether prefix caching and DFlash go together on a GPU; on XS.2 with its drafter: `xs2-prefix-cache`",
        starts=5,
        work_s=45,
        needs=TOY_FILES,
    ),
    Step(
        name="toy-fuzz",
        part="engine",
        row=20,
        command=(PYTHON, "bench/fuzz.py", *PAIR, "--minutes", "2", *INTO),
        rehearsal=(PYTHON, "bench/fuzz.py", *PAIR, "--minutes", "0.3", *INTO),
        result="fuzz.json",
        expected="no death; `logit_bias` and `min_p` beside a drafter answered with 400; what else V2's sampler does is"
        " not known",
        why="the repairs of sampling are for model runner V1; the front end's bounds have been run on a CPU only;"
        " then 20 minutes, and without the drafter",
        work_s=150,
        needs=TOY_FILES,
    ),
    Step(
        name="toy-sampling",
        part="engine",
        row=15,
        command=(PYTHON, "bench/sampling.py", *PAIR, *CACHE, *ASKED, "--gammas", "1,3,7", *INTO),
        rehearsal=(
            *(PYTHON, "bench/sampling.py", *PAIR, *SMALL_ENGINE, *ASKED, "--gammas", "3"),
            *("--num-prompts", "4", "--completions", "20", "--tokens", "4", *INTO),
        ),
        result="sampling.json",
        expected="no difference",
        why="Triton's own kernels do what the CPU runner's replacement did not",
        starts=5,
        work_s=120,
        needs=TOY_FILES,
    ),
    Step(
        name="toy-sweep",
        part="engine",
        row=12,
        command=(PYTHON, "bench/gamma_sweep.py", *PAIR, *CACHE, *ASKED, "--concurrency", "1,8,32", *SWEPT, *INTO),
        rehearsal=(
            *(PYTHON, "bench/gamma_sweep.py", *PAIR, *SMALL_ENGINE, *ASKED, "--gammas", "3"),
            *("--num-prompts", "8", "--max-tokens", "16", *INTO),
        ),
        result="sweep.json",
        expected="γ* falling with concurrency; 0 mismatches or near ties",
        why="the schedule, and what a step costs there",
        starts=5,
        work_s=150,
        needs=TOY_FILES,
    ),
    Step(
        name="acceptance-toy",
        part="engine",
        row=26,
        command=(PYTHON, "bench/acceptance", *PAIR, *CACHE, *ASKED, "--gammas", "3,7", *INTO),
        rehearsal=(
            *(PYTHON, "bench/acceptance", *PAIR, *SMALL_ENGINE, *ASKED),
            *("--gammas", "3", "--thinking", "off", "--num-prompts", "8", "--max-tokens", "16", *INTO),
        ),
        result="acceptance.json",
        expected="the toy's τ through its chat template, as on a CPU within 0.1",
        why="the file in which XS.2's acceptance is published (docs/speculation.md), on the whole path",
        starts=6,
        work_s=60,
        needs=TOY_FILES,
    ),
    Step(
        name="toy-rollouts",
        part="engine",
        row=18,
        command=(PYTHON, "bench/rollouts.py", *PAIR, *CACHE, "--gamma", "7", *ASKED, "--batch", "1,8,16,32,64", *INTO),
        rehearsal=(
            *(PYTHON, "bench/rollouts.py", *PAIR, *SMALL_ENGINE, *ASKED, "--batch", "2"),
            *("--group", "2", "--max-tokens", "8", "--rounds", "8", *INTO),
        ),
        result="rollouts.json",
        expected="below 1 at temperature 1 as on a CPU (the toy drafter knows greedy text only), with another"
        " break-even; device-seconds from wall time",
        falls_short=True,
        why="the cost of a rollout where the draft is cheap; then with `--gamma 1,2,3` one by one, `--draft-sampling"
        " probabilistic` and `--versions`",
        starts=2,
        work_s=180,
        needs=TOY_FILES,
    ),
)

# After what is at full size.
ENGINE_LATER = (
    Step(
        name="toy-certificate-exact",
        part="engine",
        row=14,
        command=(PYTHON, "bench/certify.py", *PAIR, *CACHE, *ASKED, "--quick", "--exact", "both", *INTO),
        result="certificate.json",
        expected="identical, or `laguna serve --exact` refuses: vLLM 0.32 promises batch invariance, not that γ + 1"
        " rows equal one",
        why="whether the GPU has parity by construction; then `bench/ab.py --exact candidate` for its cost",
        starts=4,
        work_s=60,
        needs=TOY_FILES,
    ),
    Step(
        name="toy-stack",
        part="engine",
        row=16,
        command=(
            *(PYTHON, "bench/gamma_sweep.py", *PAIR, *CACHE, *ASKED, "--concurrency", "1,8", "--gammas", "1,3,7"),
            *("--num-prompts", "64", "--mixed", "--stack", "fp8-kv", "prefix-caching", "chunked-prefill"),
            *("dense=tests/toy/dense", *INTO),
        ),
        result="sweep.json",
        expected="fp8 KV saves memory and changes some outputs; the schedule beats one γ where concurrency varies",
        why="what stacks, and what it costs",
        starts=14,
        work_s=200,
        needs=TOY_FILES,
    ),
    Step(
        name="moe-all",
        part="kernels",
        row=6,
        command=(PYTHON, "bench/moe.py", *WHOLE_TABLE, *INTO),
        result="moe.json",
        expected="as moe-decode; the crossover to the grouped path between 16 and 64 tokens",
        why="the whole table: 7 numbers of tokens × 4 shares × 2 routings",
        work_s=420,
    ),
    Step(
        name="toy-certificate-full",
        part="engine",
        row=13,
        command=(
            *(PYTHON, "bench/certify.py", *PAIR, *CACHE, *ASKED, "--num-prompts", "512"),
            *("--row-matched", "synthetic", *INTO),
        ),
        result="certificate.json",
        expected="as toy-certificate; the synthetic control shows 1.00 tokens per step and only first choices, or is"
        " left out and says why",
        why="a bound on the share of prompts that differ",
        starts=4,
        work_s=500,
        needs=TOY_FILES,
    ),
)

# In order of worth: a plan takes them from the front.
STEPS: tuple[Step, ...] = (
    KERNELS[0],
    suites.KERNEL_TESTS,
    *KERNELS[1:],
    *ENGINE[:4],
    FULL_SIZE[0],
    *ENGINE[4:],
    suites.SERVICE_TESTS,
    suites.WEIGHT_UPDATES,
    *FULL_SIZE[1:],
    suites.DIFFUSION,
    suites.SWAP,
    *ENGINE_LATER,
    *PUBLISHED,
    suites.SANDBOX,
    suites.PRIME_RL,
    suites.LLADA_8B,
)
