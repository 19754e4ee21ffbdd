"""A parity certificate: does a candidate give the baseline's greedy tokens, and if not, is it arithmetic or a bug?

Every prompt goes through the baseline twice (the second time in another order), through a row-matched control and
through the candidate, at every concurrency, each answer with the log-probabilities of the forward passes that chose its
tokens. Where tokens part, a third path (float32, teacher-forced) says which one the exact model prefers. Engines run
one after the other; answers are kept in DIR/passes, and the same command continues after an interruption. DIR gets
certificate.json, certificate.md and certificate.html; the last stdout line is one JSON object (schema
laguna_serve.certificate/1). What counts as a defect: certificate.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laguna_serve.bench.arm_flags import add_arm_flags, check_arm_flags, find_dtype, make_spec, parse_numbers
from laguna_serve.bench.arms import Arm, ArmSpec, open_arm
from laguna_serve.bench.certificate import AGAIN, DEFECT, ROW_MATCHED, Load, find_verdict, judge_load, judge_streams
from laguna_serve.bench.certificate_report import render_html, render_markdown, render_text
from laguna_serve.bench.client import Client, EndpointError, find_model_name, open_session
from laguna_serve.bench.endings import COULD_NOT_RUN, FELL_SHORT, HELD, INTERRUPTED, stop_on_signals
from laguna_serve.bench.folder import claim_folder, fingerprint
from laguna_serve.bench.metrics import scrape_counters, summarise_acceptance
from laguna_serve.bench.passes import Journal, run_pass
from laguna_serve.bench.plan import BASELINE, CANDIDATE
from laguna_serve.bench.progress import Progress
from laguna_serve.bench.prompts import Prompt, PromptsError, load_prompts
from laguna_serve.bench.record import current_argv, describe_environment, write_json, write_text
from laguna_serve.bench.records import Record
from laguna_serve.bench.replay import ask, attach, list_questions, summarise
from laguna_serve.bench.row_matched import write_blank_drafter
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.engine import EngineError
from laguna_serve.serving.speculation import describe, open_drafter, resolve_gamma

SCHEMA = "laguna_serve.certificate/1"
REFERENCE = "reference"
# Prompts that are also streamed without log-probabilities, as users send them.
STREAMED = 16
DEFAULT_PROMPTS = 500
# A dying engine is seen dead a moment after its connections broke.
DEATH_S = 2.0
EXAMPLES = """
examples:
  speculation against plain decoding:
    python bench/certify.py --model tests/toy/teacher --draft tests/toy/dflash \\
        --prompts tests/toy/prompts.jsonl --out out/certificate
  the same in under five minutes:
    python bench/certify.py --model tests/toy/teacher --draft tests/toy/dflash --quick \\
        --prompts tests/toy/prompts.jsonl --out out/certificate-quick
  in float32, where rounding is small and a wrong weight stands out:
    python bench/certify.py --model tests/toy/teacher --draft tests/toy/dflash --dtype float32 \\
        --prompts tests/toy/prompts.jsonl --out out/certificate-fp32
  another checkpoint, or servers that already run (vLLM, without prefix caching):
    python bench/certify.py --model M --candidate-model N --prompts FILE --out DIR
    python bench/certify.py --baseline-url U --candidate-url U --reference-url U --prompts FILE --out DIR

exit status:
  0    certified: identical, or different only where rounding decides a tie
  1    defect: the reasons are printed
  2    could not run: bad input, an engine did not start or died, or a request failed; the same command continues
  130  interrupted: the same command continues
"""


@dataclass(frozen=True, slots=True)
class Job:
    """What is certified. `missing` says of a control or path that cannot be had why (its name → the reason)."""

    specs: Mapping[str, ArmSpec]
    missing: Mapping[str, str]
    prompts: Sequence[Prompt]
    max_tokens: int
    concurrencies: Sequence[int]
    dtype: str
    seed: int
    out: Path

    @property
    def passes(self) -> Path:
        """Where answers are kept."""
        return self.out / "passes"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    stop_on_signals()
    progress = Progress()
    try:
        environment = describe_environment(current_argv())
        job = make_job(args, environment)
        result = certify(job, environment, progress)
    except KeyboardInterrupt:
        print("certify.py: interrupted; the same command continues with what is missing", file=sys.stderr)
        return INTERRUPTED
    except (PromptsError, CheckpointError, EngineError, EndpointError, OSError) as error:
        print(f"certify.py: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    publish(result, job.out)
    print(render_text(result))
    print(f"files in {job.out}: certificate.html, certificate.md, certificate.json")
    print(json.dumps(shorten(result), ensure_ascii=False, allow_nan=False))
    return FELL_SHORT if result["verdict"] == DEFECT else HELD


def certify(job: Job, environment: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Make the passes that are missing, judge them, and replay what differs.

    Raises:
        EngineError, EndpointError, OSError: a pass could not be made; what was answered is kept.
    """
    arms = {
        name: _run_arm(job, name, job.specs[name], progress)
        for name in (BASELINE, ROW_MATCHED, CANDIDATE)
        if name in job.specs
    }
    baseline = [_read(job, BASELINE, concurrency) for concurrency in job.concurrencies]
    loads = []
    for concurrency, ours in zip(job.concurrencies, baseline, strict=True):
        controls = {AGAIN: _read(job, AGAIN, concurrency)}
        if ROW_MATCHED in arms:
            controls[ROW_MATCHED] = _read(job, ROW_MATCHED, concurrency)
        loads.append(
            judge_load(Load(concurrency, ours, _read(job, CANDIDATE, concurrency), controls), job.dtype, job.seed)
        )
    replay = _replay(job, loads, baseline, progress)
    streams, reasons = _judge_streams(job, loads, baseline, arms)
    verdict, reasons = find_verdict(loads, reasons)
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "reasons": reasons,
        "environment": environment,
        "workload": {
            "prompts": len(job.prompts),
            "max_tokens": job.max_tokens,
            "concurrency": list(job.concurrencies),
            "dtype": job.dtype,
            "temperature": 0,
            "ignore_eos": True,
            "seed": job.seed,
        },
        "arms": {name: {"label": job.specs[name].label, **found["about"]} for name, found in arms.items()},
        "missing": dict(job.missing) | ({REFERENCE: replay} if isinstance(replay, str) else {}),
        "streams": streams,
        "replay": None if isinstance(replay, str) else replay,
        "loads": loads,
    }


def publish(result: dict[str, Any], out: Path) -> None:
    """Write the three files."""
    write_json(out / "certificate.json", result)
    write_text(out / "certificate.md", render_markdown(result))
    write_text(out / "certificate.html", render_html(result))


def shorten(result: dict[str, Any]) -> dict[str, Any]:
    """The result without the long lists, for one line; counts tell what they hold."""

    def cut(found: Mapping[str, Any]) -> dict[str, Any]:
        return {**found, "divergences": found["divergences"][:3], "not_own_best": len(found["not_own_best"])}

    loads = [
        {
            **load,
            "candidate": cut(load["candidate"]),
            "controls": {name: cut(found) for name, found in load["controls"].items()},
        }
        for load in result["loads"]
    ]
    return {**result, "loads": loads}


def _run_arm(job: Job, name: str, spec: ArmSpec, progress: Progress) -> dict[str, Any]:
    """Make an arm's passes, unless all are there. Returns what is known of it, and its streamed answers."""
    done = job.passes / f"{name}.json"
    if done.exists():
        progress.say(f"{name}: all passes are there")
    else:
        with open_arm(spec, job.passes, progress.say) as arm:
            found = asyncio.run(_make_passes(job, arm, progress))
        write_json(done, found)
    found = json.loads(done.read_text(encoding="utf-8"))
    return {"about": found["about"], "streamed": [Record(**record) for record in found["streamed"]]}


async def _make_passes(job: Job, arm: Arm, progress: Progress) -> dict[str, Any]:
    async with open_session() as session:
        model_name = arm.model_name or await find_model_name(session, arm.base_url)
        client = Client(session, arm.base_url, model_name, job.max_tokens)
        before = await scrape_counters(session, arm.base_url)
        for concurrency in job.concurrencies:
            for kind in (arm.name, AGAIN) if arm.name == BASELINE else (arm.name,):
                await _make_pass(job, client, arm, kind, concurrency, progress)
        acceptance = summarise_acceptance((await scrape_counters(session, arm.base_url)).since(before))
        streamed: list[Record] = []
        if arm.name != ROW_MATCHED:
            progress.say(f"{arm.name}: {min(STREAMED, len(job.prompts))} prompts streamed, as users send them")
            streamed = await client.run_closed_loop(job.prompts[:STREAMED], job.concurrencies[0])
            if failed := next((record for record in streamed if record.error is not None), None):
                arm.check()
                raise EndpointError(f"{arm.name}: prompt {failed.prompt_id}: {failed.error}")
    about = {"command": arm.command, "acceptance": None if acceptance is None else acceptance["length"]}
    fields = ("prompt_id", "started_ns", "ended_ns", "token_ids", "text")
    return {"about": about, "streamed": [{name: getattr(record, name) for name in fields} for record in streamed]}


async def _make_pass(job: Job, client: Client, arm: Arm, kind: str, concurrency: int, progress: Progress) -> None:
    journal = Journal(_journal_path(job, kind, concurrency))
    prompts = list(job.prompts)
    if kind == AGAIN:
        random.Random(job.seed).shuffle(prompts)  # other prompts share a batch than did the first time
    missing = len(prompts) - len(journal.answers)
    if missing:
        progress.say(f"{kind}: {missing} prompts, {concurrency} at once")
    progress.begin()
    try:
        await run_pass(client, prompts, concurrency, journal, lambda done: progress.step(kind, done, missing))
    except EndpointError as error:
        await asyncio.sleep(DEATH_S)
        arm.check()
        raise EndpointError(f"{arm.name}: {error}") from error


def _replay(
    job: Job, loads: Sequence[dict[str, Any]], baseline: Sequence[Mapping[str, Any]], progress: Progress
) -> dict[str, Any] | str:
    """Ask the third path about every divergence. Returns the summary, or why there is none."""
    prefixes = list(list_questions(loads, baseline))
    if not prefixes:
        return "nothing differs"
    if REFERENCE not in job.specs:
        return job.missing[REFERENCE]
    try:
        with open_arm(job.specs[REFERENCE], job.passes, progress.say) as arm:
            progress.say(f"replaying {len(prefixes)} prefixes")
            progress.begin()
            steps = asyncio.run(_ask(arm, prefixes, progress))
    except (EngineError, EndpointError) as error:
        progress.say(f"the replay failed, the certificate goes on without it: {error}")
        return str(error)
    attach(loads, baseline, steps)
    return summarise([d for load in loads for d in load["candidate"]["divergences"]])


async def _ask(
    arm: Arm, prefixes: list[tuple[int, ...]], progress: Progress
) -> dict[tuple[int, ...], dict[int, float]]:
    async with open_session() as session:
        model_name = arm.model_name or await find_model_name(session, arm.base_url)
        client = Client(session, arm.base_url, model_name, 1)
        return await ask(client, prefixes, lambda done: progress.step(arm.name, done, len(prefixes)))


def _judge_streams(
    job: Job, loads: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], arms: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    noise, reasons, streams = loads[0]["noise"], [], {}
    observed = {BASELINE: baseline[0], CANDIDATE: _read(job, CANDIDATE, job.concurrencies[0])}
    for name, answers in observed.items():
        streams[name] = judge_streams(answers, arms[name]["streamed"], noise)
        if count := streams[name]["beyond_noise"]:
            reasons.append(
                f"the {name} streams other tokens, beyond rounding, than it gives with log-probabilities on {count} of "
                f"{streams[name]['prompts']} prompts"
            )
    return streams, reasons


def _read(job: Job, kind: str, concurrency: int) -> dict[str, Any]:
    answers = Journal(_journal_path(job, kind, concurrency)).answers
    return {prompt.id: answers[prompt.id] for prompt in job.prompts}


def _journal_path(job: Job, kind: str, concurrency: int) -> Path:
    return job.passes / f"{kind}-c{concurrency}.jsonl"


def make_job(args: argparse.Namespace, environment: Mapping[str, Any]) -> Job:
    """Everything that can be refused before an engine starts.

    Raises:
        PromptsError, CheckpointError: an input cannot be used, or the folder holds another certificate's passes.
    """
    prompts = load_prompts(Path(args.prompts))
    if args.num_prompts is not None and args.num_prompts > len(prompts):
        expected = f"expected at most {len(prompts)}, got {args.num_prompts}"
        raise PromptsError(f"--num-prompts: {expected}; the file has no more prompts")
    prompts = prompts[: args.num_prompts or DEFAULT_PROMPTS]
    out = Path(args.out)
    engines = ("model", "candidate_model", "draft", "gamma", "baseline_args", "candidate_args", "dtype", "eager")
    decisive = (*engines, "prefix_caching", "baseline_url", "candidate_url", "max_tokens", "seed", "row_matched")
    checkpoints = {
        name: fingerprint(path) for name in ("model", "candidate_model", "draft") if (path := vars(args)[name])
    }
    claim_folder(
        out / "passes",
        {name: vars(args)[name] for name in decisive}
        | {"prompts": [prompt.text for prompt in prompts], "concurrency": args.concurrency, "checkpoints": checkpoints}
        | {"versions": environment["versions"], "device": (environment["device"] or {}).get("name")},
    )
    specs = {BASELINE: make_spec(args, BASELINE), CANDIDATE: make_spec(args, CANDIDATE)}
    missing: dict[str, str] = {}
    for name, make in ((ROW_MATCHED, _make_row_matched), (REFERENCE, _make_reference)):
        spec = make(args, specs, out)
        if isinstance(spec, ArmSpec):
            specs[name] = spec
        else:
            missing[name] = spec
    return Job(
        specs=specs,
        missing=missing,
        prompts=prompts,
        max_tokens=args.max_tokens,
        concurrencies=args.concurrency,
        dtype=find_dtype(args),
        seed=args.seed,
        out=out,
    )


def _make_row_matched(args: argparse.Namespace, specs: Mapping[str, ArmSpec], out: Path) -> ArmSpec | str:
    """The control's arm, or why there is none. Its target is the baseline's: a wrong candidate must not excuse itself.

    vLLM's synthetic acceptance at length 1.0 should emit the target's first choice and nothing else: that each of its
    tokens is its own step's best, and that nothing was accepted, is checked as for every arm and shown.
    """
    if args.row_matched_url is not None:
        return ArmSpec(
            ROW_MATCHED, f"running at {args.row_matched_url}", url=args.row_matched_url, model_name=args.model
        )
    config = specs[CANDIDATE].config
    if args.row_matched == "none":
        return "not asked for"
    if config is None or args.draft is None:
        return "there is no drafter here to take the rows of"
    folder = find_folder(args.draft)
    if folder is None:
        return f"{args.draft} is not on this machine"
    gamma = resolve_gamma(args.gamma, open_drafter(folder, args.draft))
    eager = "; eager" if args.eager else ""
    base = replace(config, model=args.model, gamma=gamma, extra_args=tuple(shlex.split(args.baseline_args)))
    if args.row_matched == "synthetic":
        speculation = describe(args.draft, gamma) | {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": 1.0,
        }
        extra = (*base.extra_args, "--speculative-config", json.dumps(speculation))
        label = f"{args.model}; drafter {args.draft}, γ {gamma}, synthetic acceptance of length 1.0{eager}"
        return ArmSpec(ROW_MATCHED, label, config=replace(base, extra_args=extra))
    blank = out / "passes" / "random-drafter"
    write_blank_drafter(folder, blank, args.seed)
    label = f"{args.model}; a drafter with random weights, γ {gamma}{eager}"
    return ArmSpec(ROW_MATCHED, label, config=replace(base, draft=str(blank)))


def _make_reference(args: argparse.Namespace, specs: Mapping[str, ArmSpec], _out: Path) -> ArmSpec | str:
    """The third path's arm, or why there is none."""
    if args.reference_url is not None:
        return ArmSpec(REFERENCE, f"running at {args.reference_url}", url=args.reference_url, model_name=args.model)
    config = specs[BASELINE].config
    if config is None:
        return "the arms were given by URL, and no --reference-url"
    exact = replace(config, dtype="float32", enforce_eager=True, prefix_caching=False)
    return ArmSpec(REFERENCE, f"{args.model}; float32, eager, no drafter", config=exact)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = argparse.ArgumentParser(
        prog="bench/certify.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arm_flags(parser)
    controls = parser.add_argument_group("controls and third path")
    rows = "drafter with random weights, or vLLM's synthetic acceptance at length 1.0 (GPU; default: random)"
    controls.add_argument("--row-matched", choices=("random", "synthetic", "none"), default="random", help=rows)
    controls.add_argument("--row-matched-url", metavar="U", help="an endpoint that is that control")
    controls.add_argument("--reference-url", metavar="U", help="an endpoint of the exact model, for the replay")
    work = parser.add_argument_group("what to certify")
    work.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    work.add_argument("--num-prompts", metavar="N", type=int, help=f"the first N (default: at most {DEFAULT_PROMPTS})")
    work.add_argument("--max-tokens", metavar="N", type=int, help="output tokens per prompt (default: 128)")
    work.add_argument("--concurrency", metavar="N,…", type=parse_numbers, help="requests in flight (default: 1,4,16)")
    work.add_argument("--seed", type=int, default=0, help="order of the repeat, random drafter, bootstrap, engines")
    work.add_argument("--quick", action="store_true", help="32 prompts × 48 tokens at 1,4, unless given")
    work.add_argument("--out", metavar="DIR", required=True, help="folder for the certificate")
    args = parser.parse_args(argv)
    check_arm_flags(parser, args)
    defaults = {
        "num_prompts": 32 if args.quick else None,
        "max_tokens": 48 if args.quick else 128,
        "concurrency": [1, 4] if args.quick else [1, 4, 16],
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("num_prompts", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
