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
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laguna_serve.bench.certificate.report import render_html, render_markdown, render_text
from laguna_serve.bench.certificate.row_matched import write_blank_drafter
from laguna_serve.bench.certificate.runner import REFERENCE, Job, certify
from laguna_serve.bench.certificate.verdict import DEFECT, ROW_MATCHED
from laguna_serve.bench.harness.arm_options import (
    ENGINE_FLAGS,
    add_arm_flags,
    check_arm_flags,
    find_dtype,
    make_spec,
    parse_numbers,
)
from laguna_serve.bench.harness.arms import ArmSpec, check_specs
from laguna_serve.bench.harness.prompts import PromptsError, load_prompts
from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE
from laguna_serve.serving.checkpoint import find_folder
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, Parser, add_json_flag, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, is_begun
from laguna_serve.serving.speculation import describe, open_drafter, resolve_gamma

DEFAULT_PROMPTS = 500
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("certify.py", lambda: measure(args), measures=True, interrupted=CONTINUES)


def measure(args: argparse.Namespace) -> int:
    """Certify, write the certificate and print it. Returns the exit status."""
    environment = describe_environment(current_argv())
    job = make_job(args, environment)
    result = certify(job, environment, Progress())
    publish(result, job.out)
    print_result(render_text(result), shorten(result), job.out, always_json=args.json)
    return FELL_SHORT if result["verdict"] == DEFECT else HELD


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


def certify_beside(args: argparse.Namespace, prompts: int, environment: dict[str, Any]) -> dict[str, Any]:
    """The certificate of an A/B's arms, from its command line: its prompts, tokens and concurrency, in DIR/certificate.

    Raises:
        CheckpointError, EngineError, EndpointError, OSError: as `certify` and `make_job`.
    """
    given = vars(args) | {"num_prompts": prompts, "concurrency": [args.concurrency], "out": f"{args.out}/certificate"}
    given |= {"row_matched": "random", "row_matched_url": None, "reference_url": None, "no_replay": False}
    job = make_job(argparse.Namespace(**given), environment)
    result = certify(job, environment, Progress())
    publish(result, job.out)
    return result


def list_own_specs(args: argparse.Namespace) -> list[ArmSpec]:
    """The arms that a certificate beside an A/B starts besides the A/B's, as far as they can be checked before."""
    reference = _make_reference(
        argparse.Namespace(**vars(args) | {"reference_url": None, "no_replay": False}),
        {BASELINE: make_spec(args, BASELINE)},
        Path(args.out),
    )
    return [reference] if isinstance(reference, ArmSpec) else []


def make_job(args: argparse.Namespace, environment: Mapping[str, Any]) -> Job:
    """Everything that can be refused before an engine starts.

    Raises:
        PromptsError, CheckpointError: an input cannot be used, or the folder holds another certificate's passes.
        EngineError: an engine could not be started.
    """
    prompts = load_prompts(Path(args.prompts))
    if args.num_prompts is not None and args.num_prompts > len(prompts):
        expected = f"expected at most {len(prompts)}, got {args.num_prompts}"
        raise PromptsError(f"--num-prompts: {expected}; the file has no more prompts")
    prompts = prompts[: args.num_prompts or DEFAULT_PROMPTS]
    out = Path(args.out)
    specs = {BASELINE: make_spec(args, BASELINE), CANDIDATE: make_spec(args, CANDIDATE)}
    begun = is_begun(out / "passes")
    if not begun:
        check_specs(specs.values())
    decisive = (*ENGINE_FLAGS, "prefix_caching", "baseline_url", "candidate_url", "max_tokens", "seed", "row_matched")
    checkpoints = {name: fingerprint(path) for name in ENGINE_FLAGS[:3] if (path := vars(args)[name])}
    claim_folder(
        out / "passes",
        {name: vars(args)[name] for name in decisive}
        | {"prompts": [prompt.text for prompt in prompts], "concurrency": args.concurrency, "checkpoints": checkpoints}
        | {"versions": environment["versions"], "device": (environment["device"] or {}).get("name")},
    )
    missing: dict[str, str] = {}
    for name, make in ((ROW_MATCHED, _make_row_matched), (REFERENCE, _make_reference)):
        spec = make(args, specs, out)
        if isinstance(spec, ArmSpec):
            specs[name] = spec
        else:
            missing[name] = spec
    if not begun:
        check_specs(spec for name, spec in specs.items() if name in (ROW_MATCHED, REFERENCE))
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
    if args.no_replay:
        return "not asked for"
    if config is None:
        return "the arms were given by URL, and no --reference-url"
    exact = replace(config, dtype="float32", enforce_eager=True, prefix_caching=False, exact=False)
    return ArmSpec(REFERENCE, f"{args.model}; float32, eager, no drafter", config=exact)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="bench/certify.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    add_arm_flags(parser)
    controls = parser.add_argument_group("controls and third path")
    rows = "drafter with random weights, or vLLM's synthetic acceptance at length 1.0 (GPU; default: random)"
    controls.add_argument("--row-matched", choices=("random", "synthetic", "none"), default="random", help=rows)
    controls.add_argument("--row-matched-url", metavar="U", help="an endpoint that is that control")
    replay = "leave the third path out: in float32 it takes twice a 16-bit model's memory"
    controls.add_argument("--no-replay", action="store_true", help=replay)
    controls.add_argument("--reference-url", metavar="U", help="an endpoint of the exact model, for the replay")
    work = parser.add_argument_group("what to certify")
    work.add_argument("--prompts", metavar="FILE", required=True, help='JSONL, one {"prompt": "…"} per line')
    work.add_argument("--num-prompts", metavar="N", type=int, help=f"the first N (default: at most {DEFAULT_PROMPTS})")
    work.add_argument("--max-tokens", metavar="N", type=int, help="output tokens per prompt (default: 128)")
    work.add_argument("--concurrency", metavar="N,…", type=parse_numbers, help="requests in flight (default: 1,4,16)")
    work.add_argument("--seed", type=int, default=0, help="order of the repeat, random drafter, bootstrap, engines")
    work.add_argument("--quick", action="store_true", help="32 prompts × 48 tokens at 1,4, unless given")
    work.add_argument("--out", metavar="DIR", required=True, help="folder for the certificate")
    add_json_flag(work)
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
