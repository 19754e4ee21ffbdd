"""What does a rollout for RL cost, and does speculation make it cheaper? Groups of sampled completions, both arms up.

Groups of completions of one shared prompt (`n` in one request, token ids and log-probabilities returned) go to the
plain engine and to the speculating one in turn, at every batch size: tokens per second and per device-second, their
ratio with an interval, acceptance, and the acceptance at which speculation stops paying. `--versions` are checkpoints
of later policies: both running engines are given each, the drafter stays the old one. What was measured is kept in
DIR/points: the same command continues. DIR gets rollouts.json, rollouts.md and rollouts.png; the last stdout line is
one JSON object (schema laguna_serve.rollouts/1). How a round is run: rollouts_points.py; break-even: rollouts_model.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laguna_serve.bench.harness.arm_options import parse_numbers
from laguna_serve.bench.harness.arms import Arm, ArmSpec, check_specs, has_room_beside, open_arm
from laguna_serve.bench.harness.prompts import PromptsError, load_prompts
from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE
from laguna_serve.bench.harness.validity import MIN_PAIRS
from laguna_serve.bench.rollout.break_even import PAYS, PRICE, summarise_point
from laguna_serve.bench.rollout.points import Driver, Work, measure_point, plan_point
from laguna_serve.bench.rollout.report import render_markdown, render_text
from laguna_serve.bench.rollout.weights import give_version, open_versions
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.commands.serve import parse_gamma
from laguna_serve.serving.engine import EngineConfig, EngineError
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, is_begun
from laguna_serve.serving.planning.inspection import inspect
from laguna_serve.serving.speculation.drafting import DRAFT_SAMPLING, add_draft_sampling

SCHEMA = "laguna_serve.rollouts/1"
GROUP = 8
# Batches by default: one sequence alone, then so many groups.
GROUPS = (1, 2, 4, 8)
EXAMPLES = """
examples:
  python bench/rollouts.py --model tests/toy/teacher --draft tests/toy/dflash \\
      --prompts tests/toy/prompts.jsonl --out out/rollouts
  python bench/rollouts.py --model M --draft D --gamma 7 --prompts FILE --out DIR \\
      --versions run/step-100 run/step-200 run/step-400 --version-batch 32
  python bench/rollouts.py --model M --draft D --batch 8,64 --price-per-hour 3.50 --prompts FILE --out DIR

exit status:
  0    speculation pays at every batch and for every version: the ratio's interval lies above 1
  1    somewhere it does not pay, or that cannot be told
  2    could not run: bad input, an engine did not start, died, or refused a version
  130  interrupted: the same command continues
"""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be measured. `batches`: the model itself at each; `versions`: name → folder, at `version_batch`."""

    work: Work
    prompts: list[Prompt]
    gamma: int
    batches: list[int]
    versions: dict[str, Path]
    version_batch: int
    folder: Path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("rollouts.py", lambda: measure(args), measures=True, interrupted=CONTINUES)


def measure(args: argparse.Namespace) -> int:
    """Measure what is missing, write the result and print it. Returns the exit status."""
    environment = describe_environment(current_argv())
    job = prepare(args, environment)
    measure_missing(args, job, Progress())
    result = conclude(args, job, environment)
    publish(result, Path(args.out), always_json=args.json)
    points = [*result["points"], *result["versions"]]
    return HELD if all(point["verdict"] == PAYS for point in points) else FELL_SHORT


def prepare(args: argparse.Namespace, environment: dict[str, Any]) -> Job:
    """Check everything that can be checked before an engine starts, and claim the folder of finished points.

    Raises:
        PromptsError, CheckpointError: something does not fit.
        EngineError: an engine could not be started.
    """
    device = (environment["device"] or {}).get("kind", "cpu")
    work = Work(args.group, args.max_tokens, args.temperature, args.rounds, args.seed, device)
    gamma = inspect(make_config(args, drafting=True)).gamma
    assert gamma is not None, "there is a draft"
    if not is_begun(Path(args.out) / "points"):
        check_specs(make_specs(args, gamma))
    versions = open_versions(args.model, args.versions)
    batches = sorted({*args.batch, *([args.version_batch] if versions else [])})
    prompts = load_prompts(Path(args.prompts))
    needed, _ = work.split(max(batches))
    if needed * work.rounds > len(prompts):
        expected = f"expected {needed * work.rounds} of them, {work.rounds} rounds of {needed}, got {len(prompts)}"
        raise PromptsError(f"{args.prompts}: {expected}; add prompts, or lower --rounds or --batch")
    names = ("model", "draft", "draft_sampling", "dtype", "eager", "no_prefix_caching", "kv_cache_gib")
    settings = {name: vars(args)[name] for name in names} | {
        "gamma": gamma,
        "max_num_seqs": choose_max_num_seqs(args),
        "work": asdict(work),
        "prompts": [prompt.text for prompt in prompts],
        "checkpoints": [fingerprint(args.model), fingerprint(args.draft)],
        "packages": environment["versions"],
        "device": (environment["device"] or {}).get("name"),
    }
    folder = Path(args.out) / "points"
    claim_folder(folder, settings)
    return Job(work, prompts, gamma, batches, versions, args.version_batch, folder)


def make_specs(args: argparse.Namespace, gamma: int) -> tuple[ArmSpec, ArmSpec]:
    """The plain engine, and the one that drafts."""
    plain = ArmSpec(BASELINE, f"{args.model}; no drafter", config=make_config(args, drafting=False))
    label = f"{args.model}; drafter {args.draft}, γ {gamma}"
    return plain, ArmSpec(CANDIDATE, label, config=make_config(args, drafting=True))


def make_config(args: argparse.Namespace, *, drafting: bool) -> EngineConfig:
    """An engine that trainers would roll out with: a group shares its prompt, and new weights are taken."""
    return EngineConfig(
        model=args.model,
        draft=args.draft if drafting else None,
        gamma=args.gamma if drafting else None,
        draft_sampling=args.draft_sampling if drafting else DRAFT_SAMPLING[0],
        dtype=args.dtype,
        max_num_seqs=choose_max_num_seqs(args),
        enforce_eager=args.eager,
        prefix_caching=not args.no_prefix_caching,
        kv_cache_gib=args.kv_cache_gib,
        seed=args.seed + drafting,
        weight_updates=True,
    )


def choose_max_num_seqs(args: argparse.Namespace) -> int:
    """The engine's own default, or more where a batch is larger."""
    most: int = max(args.version_batch, *args.batch)
    return max(EngineConfig(args.model).max_num_seqs, most)


def measure_missing(args: argparse.Namespace, job: Job, progress: Progress) -> None:
    """Measure the points that the folder lacks. Starts no engine when it lacks none.

    Raises:
        CheckpointError: a version is not the one that was measured under its name.
        EngineError, EndpointError, MeasurementStoppedError: something could not be measured; finished points stay.
    """
    batches = [batch for batch in job.batches if read_point(job, batch, None) is None]
    versions = [name for name in job.versions if read_point(job, job.version_batch, name) is None]
    if not batches and not versions:
        return
    if len(batches) + len(versions) < len(job.batches) + len(job.versions):
        progress.say(f"continuing: {len(batches) + len(versions)} points are missing")
    plain, speculating = make_specs(args, job.gamma)
    with ExitStack() as stack:
        baseline = stack.enter_context(open_arm(plain, job.folder, progress.say))
        if not has_room_beside(baseline):
            raise EngineError("memory: expected room for two engines, got too little; pass a smaller --kv-cache-gib")
        candidate = stack.enter_context(open_arm(speculating, job.folder, progress.say))
        asyncio.run(_measure(job, (baseline, candidate), batches, versions, progress))


async def _measure(
    job: Job, arms: tuple[Arm, Arm], batches: list[int], versions: list[str], progress: Progress
) -> None:
    async with open_session() as session:
        drivers = {arm.name: Driver(session, arm, job.work) for arm in arms}
        for batch in batches:
            await _measure_one(job, batch, None, drivers, progress)
        for name in versions:
            for arm in arms:
                await give_version(session, arm, name, job.versions[name])
            await _measure_one(job, job.version_batch, name, drivers, progress)


async def _measure_one(
    job: Job, batch: int, version: str | None, drivers: dict[str, Driver], progress: Progress
) -> None:
    plan = plan_point(job.work, batch, job.prompts)
    what = "" if version is None else f"version {version}, "
    progress.say(f"{what}batch {batch}: {len(plan.rounds)} rounds of {batch} × {job.work.max_tokens} tokens per arm")
    entry = await measure_point(job.work, batch, job.prompts, drivers, progress)
    mark = "" if version is None else fingerprint(str(job.versions[version]))
    write_json(find_place(job, batch, version), {"version": version, "fingerprint": mark, **entry})


def find_place(job: Job, batch: int, version: str | None) -> Path:
    """The file of a point. Of a version the batch is in its name too: another --version-batch is another point."""
    return job.folder / (f"batch{batch}.json" if version is None else f"batch{batch}-version-{version}.json")


def read_point(job: Job, batch: int, version: str | None) -> dict[str, Any] | None:
    """A finished point, or None. Raises CheckpointError when it is of another version of that name."""
    place = find_place(job, batch, version)
    if not place.exists():
        return None
    entry: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    if version is not None and entry["fingerprint"] != fingerprint(str(job.versions[version])):
        expected = f"the version {version} that {place} was measured with, got another"
        raise CheckpointError(f"{job.versions[version]}: expected {expected}; rename it or remove the point")
    return entry


def conclude(args: argparse.Namespace, job: Job, environment: dict[str, Any]) -> dict[str, Any]:
    """The whole result, from the folder of finished points. The first version, null, is the model itself."""

    def summarise(batch: int, version: str | None) -> dict[str, Any]:
        entry = read_point(job, batch, version)
        assert entry is not None, "measured before"
        return summarise_point(entry, args.seed, args.price_per_hour)

    versions = [None, *job.versions] if job.versions else []
    return {
        "schema": SCHEMA,
        "environment": environment,
        "model": args.model,
        "draft": args.draft,
        "draft_sampling": args.draft_sampling,
        "gamma": job.gamma,
        "device": job.work.device,
        "workload": {**asdict(job.work), "prompts": args.prompts, "prefix_caching": not args.no_prefix_caching},
        "points": [summarise(batch, None) for batch in job.batches],
        "versions": [summarise(job.version_batch, name) for name in versions],
        "price": PRICE,
        "price_per_hour": args.price_per_hour,
    }


def publish(result: dict[str, Any], out: Path, *, always_json: bool) -> None:
    """Write the files, then print the tables and, last, the one-line object."""
    write_json(out / "rollouts.json", result)
    write_text(out / "rollouts.md", render_markdown(result))
    from laguna_serve.bench.rollout.plot import draw  # takes a second to import

    draw(result, out / "rollouts.png")
    print_result(render_text(result), result, out, always_json=always_json)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="bench/rollouts.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--model", metavar="M", required=True, help="the policy, as the drafter knows it: folder or hub id"
    )
    parser.add_argument("--draft", metavar="D", required=True, help="DFlash drafter checkpoint")
    gamma = "tokens drafted per step, N or max (default: the drafter's most)"
    parser.add_argument("--gamma", metavar="N", type=parse_gamma, help=gamma)
    add_draft_sampling(parser)
    parser.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    versions = "checkpoint folders of later policies, in order; the tensors are the model's"
    parser.add_argument("--versions", metavar="FOLDER", nargs="+", default=[], help=versions)
    parser.add_argument("--version-batch", metavar="N", type=int, help="batch for the versions (default: one group)")
    batch = "sequences in flight: multiples of the group, or less than one (default: 1 and 1, 2, 4, 8 groups)"
    parser.add_argument("--batch", metavar="N,…", type=parse_numbers, help=batch)
    parser.add_argument(
        "--group", metavar="N", type=int, default=GROUP, help=f"completions per prompt (default: {GROUP})"
    )
    parser.add_argument("--max-tokens", metavar="N", type=int, default=128, help="of a completion (default: 128)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="default: 1")
    rounds = f"of each arm at each point, at least {MIN_PAIRS} (default: 12)"
    parser.add_argument("--rounds", metavar="N", type=int, default=12, help=rounds)
    parser.add_argument("--dtype", default="auto", help="vLLM's --dtype for both (default: the checkpoint's)")
    parser.add_argument("--eager", action="store_true", help="no compilation: starts fast, runs slowly")
    caching = "a group's completions compute their prompt one by one (default: they share it)"
    parser.add_argument("--no-prefix-caching", action="store_true", help=caching)
    parser.add_argument("--kv-cache-gib", metavar="G", type=float, help="KV cache per engine (default: by free memory)")
    price = "of the device, in your currency: the price of a million tokens is worked out from it"
    parser.add_argument("--price-per-hour", metavar="X", type=float, help=price)
    parser.add_argument("--seed", type=int, default=0, help="engines, order of the arms, bootstrap (default: 0)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the result files")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what depends on other flags, and refuse what means nothing; argparse exits with status 2."""
    for name, least in {"group": 1, "max_tokens": 2, "rounds": MIN_PAIRS}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    args.batch = args.batch or sorted({1, *(groups * args.group for groups in GROUPS)})
    args.version_batch = args.group if args.version_batch is None else args.version_batch
    for flag, batch in [("--version-batch", args.version_batch), *(("--batch", batch) for batch in args.batch)]:
        if batch < 1 or (batch > args.group and batch % args.group):
            parser.error(f"{flag}: expected a multiple of the group of {args.group}, or less than it, got {batch}")
    if not args.temperature > 0:
        parser.error(f"--temperature: expected more than 0, got {args.temperature:g}; greedy decoding: bench/ab.py")
    if args.price_per_hour is not None and not args.price_per_hour > 0:
        parser.error(f"--price-per-hour: expected more than 0, got {args.price_per_hour:g}")


if __name__ == "__main__":
    raise SystemExit(main())
