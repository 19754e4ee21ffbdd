"""The campaign's steps beside engines of Lagunas: own tests, masked diffusion, what a person has to run on the host."""

from __future__ import annotations

from laguna_serve.bench.experiments.step import OUT, PROMPTS, PYTHON, TOY_FILES, Step


def run_tests(*arguments: str) -> tuple[str, ...]:
    """pytest in one process, with its counts in junit.xml."""
    return (
        PYTHON,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        f"--junitxml={OUT}/junit.xml",
        *arguments,
    )


KERNEL_TESTS = Step(
    name="kernel-tests",
    part="kernels",
    row=5,
    command=run_tests("-m", "gpu", "tests/kernels"),
    rehearsal=run_tests("tests/kernels/test_sentinel_moe.py", "-k", "float32"),
    result="junit.xml",
    expected="all pass, row bits equal for T = 1…64 in bf16 and over 8-bit weights too",
    why="nothing below counts before this",
    work_s=150,
    needs=("tests/kernels",),
)

SERVICE_TESTS = Step(
    name="service-tests",
    part="engine",
    row=23,
    command=run_tests("tests/serving/service/test_contract_vllm.py", "tests/serving/service/test_service_vllm.py"),
    result="junit.xml",
    expected="all pass",
    why="tool calls, thoughts and restarts where the engine has other processes",
    starts=6,
    work_s=120,
    needs=("tests/serving/service", *TOY_FILES),
)

WEIGHT_UPDATES = Step(
    name="weight-updates",
    part="engine",
    row=17,
    command=run_tests("tests/plugins/test_weight_folder.py"),
    result="junit.xml",
    expected="an update gives what a restart gives, with CUDA graphs on; a refused one changes nothing; memory"
    " after 100 updates as after one; on vLLM 0.26, against which the engine was only read, updates through the"
    " gateway go without a version, as `/weight_info` came with 0.29",
    why="new weights in place under graphs, and the room that the second copy takes; then `tests/toy/teacher`"
    " served by `laguna serve --weight-updates` and 100 updates in a row",
    starts=4,
    work_s=90,
    needs=("tests/plugins", *TOY_FILES),
)

SANDBOX = Step(
    name="sandbox",
    part="host",
    row=25,
    command=run_tests("tests/evals/sandbox/test_escapes.py"),
    result="junit.xml",
    expected="every attempt refused in each mode that the container allows; `laguna`'s commands say which walls"
    " were up",
    why="the walls have been run on one kernel (6.18); also as an ordinary user, and `python"
    " tests/evals/codegen/grading_speed.py`",
    work_s=120,
    needs=("tests/evals/sandbox",),
)

PRIME_RL = Step(
    name="prime-rl",
    part="host",
    row=24,
    by_hand="`uv run eval @ evals/spec_rl/prime_rl.toml` in a prime-rl checkout beside `laguna serve XS2 --draft"
    " XS2-drafter`",
    expected="a sample of every task with its reward; the same rewards as `evals/code_tasks.py` gives those answers",
    why="prime-rl wants a GPU stack: its `evals` of commit 559b447 was run without one (evals/spec_rl/README.md),"
    " the `eval` after it could not be had",
)

LLADA = ("tests/toy/llada", "tests/toy/llada-draft", "tests/toy/llada-proposals")
DIFFUSION = Step(
    name="toy-diffusion",
    part="engine",
    row=28,
    command=(
        *(PYTHON, "bench/diffusion", "--model", "tests/toy/llada", "--draft", "tests/toy/llada-draft"),
        *("--proposals", "tests/toy/llada-proposals", "--prompts", PROMPTS),
        *("--states", "8", "--device", "cuda", "--out", OUT),
    ),
    rehearsal=(
        *(PYTHON, "bench/diffusion", "--model", "tests/toy/llada", "--proposals", "tests/toy/llada-proposals"),
        *("--prompts", PROMPTS, "--num-prompts", "2", "--concurrency", "1", "--canvas", "32", "--states", "2"),
        *("--out", OUT),
    ),
    result="diffusion.json",
    expected="0 answers differ; steps per pass as on a CPU within its intervals (near ties may fall otherwise);"
    " speeds as found: every row set has products of its own, so that a pass is bound by launches",
    why="whether masked diffusion is exact on CUDA, where rows of one shape may still be computed otherwise, and"
    " what a pass costs before its products are joined",
    work_s=240,
    needs=(*TOY_FILES, *LLADA),
)

LLADA_8B = Step(
    name="llada-8b",
    part="published",
    row=30,
    by_hand="`python scripts/training/diffusion/calibrate.py LLADA --draft LLADA-draft --device cuda --first 64"
    " --out P`, `python bench/diffusion --model LLADA --draft LLADA-draft --proposals P --device cuda --states 8"
    " --draft-weights fp8,int8,int4 --out DIR`, then `python evals/references.py --model LLADA`",
    expected="0 answers differ; a pass of the draft costs 0.65 of the target's in bfloat16 and, where bytes bound"
    " products, 0.36 in FP8 and 0.22 in four bits; with 70% of the next states known the FP8 draft is worth 1.25 times,"
    " by arithmetic",
    why="GSAI-ML/LLaDA-8B-Instruct and jaygala223/llada-distilled-24L-v3 have not been run; int4 on a GPU wants mslk",
)

TWO_MODELS = ("--model", "tests/toy/teacher", "--model", "tests/toy/dense")
SWAP = Step(
    name="toy-swap",
    part="engine",
    row=29,
    command=(
        *(PYTHON, "bench/swap", *TWO_MODELS, "--kv-cache-gib", "2", "--sleep-level", "1", "--rounds", "2"),
        *("--out", OUT),
    ),
    rehearsal=(PYTHON, "bench/swap", *TWO_MODELS, "--quick", "--rest", "1", "--out", OUT),
    result="swap.json",
    expected="woken in a second or less; a rested swap in half of a restart or less; answers after sleep are right, or"
    " the gateway's first request of an engine fails and says so",
    why="sleep mode and the spare process, which no GPU has met; then level 2 with a drafter (`docs/gateway.md`)",
    starts=24,
    work_s=100,
    needs=(*TOY_FILES, "tests/toy/dense"),
)
