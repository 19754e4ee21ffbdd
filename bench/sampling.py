"""Under temperature, does speculation preserve the distribution? A two-sample test on many short completions.

Every prompt is completed many times by the baseline, by the baseline again (the control) and by the candidate at every
γ. Each pair of sets is tested prompt by prompt and as a whole (two_sample.py), corrected for prompts and for the number
of γ. The power is simulated on what the baseline said: how large a share of completions would a bug have to turn into
the likeliest one to be found? DIR gets sampling.json and sampling.md, and keeps the completions, so that the same
command continues; the last stdout line is one JSON object (schema laguna_serve.sampling/1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laguna_serve.bench.harness.arm_options import parse_numbers
from laguna_serve.bench.harness.arms import Arm, ArmSpec, check_specs, open_arm
from laguna_serve.bench.harness.prompts import PromptsError, load_prompts
from laguna_serve.bench.harness.schedule import BASELINE
from laguna_serve.bench.stats.two_sample import Comparison, Completion, compare, find_power
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.client.completions import Client, find_model_name, open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, is_begun
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING, add_draft_sampling, open_drafter

SCHEMA = "laguna_serve.sampling/1"
AGAIN = "baseline again"
DEFAULT_GAMMAS = (1, 3, 7)
# Completions asked for in one request: vLLM runs them as so many sequences.
BATCH = 50
PERMUTATIONS = 20_000
# Of the simulation of power: arms simulated per share, and permutations in each of their tests.
TRIALS, TRIAL_PERMUTATIONS = 40, 2_000
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
WANTED_POWER = 0.8
Sets = Mapping[str, list[list[Completion]]]
EXAMPLES = """
examples:
  python bench/sampling.py --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --out out/sampling
  python bench/sampling.py --model M --draft D --gammas 7 --temperature 0.7 --quick --prompts FILE --out DIR

exit status:
  0    held: no γ can be told from the baseline
  1    fell short: some γ samples from another distribution, or the control fails
  2    could not run: bad input, or an engine did not start or died
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("sampling.py", lambda: measure(args), interrupted=CONTINUES)


def measure(args: argparse.Namespace) -> int:
    """Draw what is missing, compare, write the result and print it. Returns the exit status."""
    out = Path(args.out)
    environment = describe_environment(current_argv())
    prompts = choose_prompts(args)
    args.gammas = choose_gammas(args)
    if not is_begun(out / "samples"):
        check_specs(make_spec(args, gamma, args.seed) for gamma in (None, *args.gammas))
    claim_folder(out / "samples", list_settings(args, prompts, environment))
    sets = draw(args, prompts, out / "samples", Progress())
    result = judge(args, environment, sets)
    write_json(out / "sampling.json", result)
    write_text(out / "sampling.md", render_markdown(result))
    line = {**result, "comparisons": [shorten(comparison) for comparison in result["comparisons"]]}
    print_result(render_text(result), line, out, always_json=args.json)
    return FELL_SHORT if any(comparison["differs"] for comparison in result["comparisons"]) else HELD


def choose_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The first prompts of the file. Raises PromptsError when there are too few."""
    prompts = load_prompts(Path(args.prompts))
    if args.num_prompts > len(prompts):
        expected = f"expected at most {len(prompts)}, got {args.num_prompts}"
        raise PromptsError(f"--num-prompts: {expected}; the file has no more prompts")
    return prompts[: args.num_prompts]


def choose_gammas(args: argparse.Namespace) -> list[int]:
    """The γ to test: those given, else 1, 3 and 7 as far as the drafter goes, and in a quick run its most.

    Raises:
        CheckpointError: the drafter cannot be read, or was not trained for one of them.
    """
    folder = find_folder(args.draft)
    if folder is None:
        return list(args.gammas or DEFAULT_GAMMAS)
    most = open_drafter(folder, args.draft).max_gamma
    default = [most] if args.quick else sorted({min(gamma, most) for gamma in DEFAULT_GAMMAS})
    gammas = list(args.gammas or default)
    if max(gammas) > most:
        expected = f"expected at most {most}, the drafter's block − 1, got {max(gammas)}"
        raise CheckpointError(f"--gammas: {expected}; lower it")
    return gammas


def list_settings(args: argparse.Namespace, prompts: list[Prompt], environment: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about the completions."""
    names = ("model", "draft", "draft_sampling", "temperature", "completions", "tokens", "dtype", "eager", "seed")
    return {name: vars(args)[name] for name in names} | {
        "prompts": [prompt.text for prompt in prompts],
        "checkpoints": [fingerprint(args.model), fingerprint(args.draft)],
        "versions": environment["versions"],
    }


def draw(args: argparse.Namespace, prompts: list[Prompt], folder: Path, progress: Progress) -> Sets:
    """Every arm's completions by prompt; those that are in the folder are read."""
    sets: dict[str, list[list[Completion]]] = {}
    for index, gamma in enumerate([None, *args.gammas]):
        names = [BASELINE, AGAIN] if gamma is None else [name_gamma(gamma)]
        paths = {name: folder / f"{name.replace(' ', '-')}.json" for name in names}
        if not all(path.exists() for path in paths.values()):
            # Another seed for every engine, or their random numbers would be the same.
            with open_arm(make_spec(args, gamma, args.seed + index), folder, progress.say) as arm:
                for name, path in paths.items():
                    drawn = asyncio.run(_draw_arm(args, arm, name, prompts, progress))
                    write_text(path, json.dumps(drawn))
        for name, path in paths.items():
            stored = json.loads(path.read_text(encoding="utf-8"))
            sets[name] = [[tuple(completion) for completion in completions] for completions in stored]
    return sets


async def _draw_arm(
    args: argparse.Namespace, arm: Arm, name: str, prompts: list[Prompt], progress: Progress
) -> list[list[list[int]]]:
    progress.say(f"{name}: {len(prompts)} prompts × {args.completions} completions of {args.tokens} tokens")
    progress.begin()
    drawn = []
    async with open_session() as session:
        model_name = arm.model_name or await find_model_name(session, arm.base_url)
        client = Client(session, arm.base_url, model_name, args.tokens, {"temperature": args.temperature})
        for done, prompt in enumerate(prompts, start=1):
            completions: list[list[int]] = []
            while len(completions) < args.completions:
                try:
                    completions += await client.sample(prompt.text, min(BATCH, args.completions - len(completions)))
                except EndpointError:
                    arm.check()
                    raise
            drawn.append(completions)
            progress.step(name, done, len(prompts))
    return drawn


def judge(args: argparse.Namespace, environment: dict[str, Any], sets: Sets) -> dict[str, Any]:
    """Test the control and every γ against the baseline, and simulate the power."""
    rng = np.random.default_rng(args.seed)
    names = [AGAIN, *map(name_gamma, args.gammas)]
    # The level is shared by the γ; the control stands by itself.
    levels = {name: args.level if name == AGAIN else args.level / len(args.gammas) for name in names}
    level = args.level / len(args.gammas)
    # The least p-value that a test can give is 1 ÷ permutations: it must lie below the level after its corrections.
    permutations = max(PERMUTATIONS, round(4 * args.num_prompts / level))
    found = {name: compare(sets[BASELINE], sets[name], rng, permutations) for name in names}
    pool = [[*a, *b] for a, b in zip(sets[BASELINE], sets[AGAIN], strict=True)]
    trial = max(TRIAL_PERMUTATIONS, round(4 / level))
    power = {share: find_power(pool, share, level, rng, trials=TRIALS, permutations=trial) for share in SHARES}
    detectable = next((share for share in SHARES if power[share] >= WANTED_POWER), None)
    return {
        "schema": SCHEMA,
        "environment": environment,
        "model": args.model,
        "draft": args.draft,
        "draft_sampling": args.draft_sampling,
        "workload": {
            "prompts": args.num_prompts,
            "completions": args.completions,
            "tokens": args.tokens,
            "temperature": args.temperature,
        },
        "level": args.level,
        "comparisons": [describe(name, found[name], levels[name]) for name in names],
        "power": {str(share): value for share, value in power.items()},
        "detectable_share": detectable,
    }


def describe(name: str, comparison: Comparison, level: float) -> dict[str, Any]:
    """One comparison, JSON-ready."""
    return {
        "arm": name,
        "pooled_p": comparison.pooled_p,
        "least_adjusted_p": min(comparison.adjusted),
        "p": comparison.least,
        "level": level,
        "differs": comparison.least <= level,
        "p_values": comparison.p_values,
    }


def shorten(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison without the p-values of every prompt."""
    return {key: value for key, value in comparison.items() if key != "p_values"}


def render_text(result: Mapping[str, Any]) -> str:
    """In columns."""
    lines = [f"{'against the baseline':<22} {'all prompts':>12} {'least of one':>13}  verdict"]
    lines += [
        f"{row['arm']:<22} {_show(row['pooled_p']):>12} {_show(row['least_adjusted_p']):>13}  {_tell(row)}"
        for row in result["comparisons"]
    ]
    return "\n".join([*lines, "", _tell_power(result)])


def render_markdown(result: Mapping[str, Any]) -> str:
    """The same as a page."""
    work, environment = result["workload"], result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    scope = f"{work['prompts']} prompts × {work['completions']} completions of {work['tokens']} tokens at temperature"
    lines = [
        "# Does speculation preserve the distribution?",
        "",
        f"{result['model']}, drafter {result['draft']} ({result['draft_sampling']}); {scope} {work['temperature']}."
        " p-values of permutation tests; the least of one prompt is corrected for the number of prompts.",
        "",
        "| against the baseline | p, all prompts together | p, least of one prompt | verdict |",
        "|--|--|--|--|",
    ]
    lines += [
        f"| {row['arm']} | {_show(row['pooled_p'])} | {_show(row['least_adjusted_p'])} | {_tell(row)} |"
        for row in result["comparisons"]
    ]
    lines += ["", _tell_power(result), "", "| share turned into the likeliest | found |", "|--|--|"]
    lines += [f"| {float(share):.0%} | {value:.0%} |" for share, value in result["power"].items()]
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}"
    return "\n".join([*lines, "", f"`{environment['command']}` on {where}; {versions}."]) + "\n"


def _show(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else "<0.0001"


def _tell(row: Mapping[str, Any]) -> str:
    return f"another distribution (p {row['p']:.2g})" if row["differs"] else "not told apart"


def _tell_power(result: Mapping[str, Any]) -> str:
    share = result["detectable_share"]
    if share is None:
        return f"Power: below {WANTED_POWER:.0%} even for {SHARES[-1]:.0%} of completions; ask for more of them."
    return (
        f"Power: a bug that turns {share:.0%} of the completions into the likeliest one would be found in "
        f"{result['power'][str(share)]:.0%} of such runs ({TRIALS} simulated; level {result['level']:g} over all γ)."
    )


def name_gamma(gamma: int) -> str:
    """The candidate's name at a γ."""
    return f"γ {gamma}"


def make_spec(args: argparse.Namespace, gamma: int | None, seed: int) -> ArmSpec:
    """The baseline (None), or the candidate of a γ."""
    config = EngineConfig(
        model=args.model,
        draft=None if gamma is None else args.draft,
        gamma=gamma,
        draft_sampling=DRAFT_SAMPLING[0] if gamma is None else args.draft_sampling,
        dtype=args.dtype,
        enforce_eager=args.eager,
        prefix_caching=False,
        kv_cache_gib=args.kv_cache_gib,
        seed=seed,
    )
    if gamma is None:
        return ArmSpec(BASELINE, f"{args.model}; no drafter", config=config)
    return ArmSpec(f"gamma{gamma}", f"{args.model}; drafter {args.draft}, γ {gamma}", config=config)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="bench/sampling.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", metavar="M", required=True, help="target checkpoint, folder or hub id")
    parser.add_argument("--draft", metavar="D", required=True, help="DFlash drafter checkpoint")
    gammas = "γ to test (default: 1,3,7 as far as the drafter goes)"
    parser.add_argument("--gammas", metavar="N,…", type=parse_numbers, help=gammas)
    add_draft_sampling(parser)
    parser.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    parser.add_argument("--num-prompts", metavar="N", type=int, help="the first N prompts (default: 24)")
    parser.add_argument("--completions", metavar="N", type=int, help="per prompt and arm (default: 600)")
    parser.add_argument("--tokens", metavar="N", type=int, default=8, help="of a completion (default: 8)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="default: 1")
    level = "how often a sound drafter may be called wrong, over all γ together (default: 0.01)"
    parser.add_argument("--level", metavar="α", type=float, default=0.01, help=level)
    parser.add_argument("--dtype", default="auto", help="vLLM's --dtype for both (default: the checkpoint's)")
    parser.add_argument("--eager", action="store_true", help="no compilation: starts fast, runs slowly")
    parser.add_argument("--kv-cache-gib", metavar="G", type=float, help="KV cache per engine (default: by free memory)")
    parser.add_argument("--seed", type=int, default=0, help="engines and permutations (default: 0)")
    quick = "8 prompts × 200 completions, the drafter's largest γ, unless given"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    for name, value in {"num_prompts": 8 if args.quick else 24, "completions": 200 if args.quick else 600}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in {"num_prompts": 1, "completions": 20, "tokens": 2}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    if not args.temperature > 0:
        parser.error(f"--temperature: expected more than 0, got {args.temperature:g}; greedy parity: bench/certify.py")
    if not 0 < args.level < 1:
        parser.error(f"--level: expected a probability between 0 and 1, got {args.level:g}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
