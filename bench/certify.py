"""A parity certificate: whether a candidate gives the baseline's greedy tokens, and if not, whether a bug is why.

Every prompt goes through the baseline twice (the second time in another order), through a row-matched control and
through the candidate, at every concurrency, each answer with the log-probabilities of the forward passes that chose its
tokens. Where tokens part, a third path (float32, teacher-forced) says which one the exact model prefers. Engines run
one after the other; answers are kept in DIR/passes, and the same command continues after an interruption. DIR gets
certificate.json, certificate.md and certificate.html; the last stdout line is one JSON object (schema
laguna_serve.certificate/1). What counts as a defect: certificate/verdict.py.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec import structs

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, ArmSpec, check_specs
from laguna_serve.bench.arms.diffusion import NO_REPLAY, NO_ROW_MATCHED
from laguna_serve.bench.arms.options import ENGINE_FLAGS, ArmsConfig, find_dtype, make_spec
from laguna_serve.bench.certificate import check
from laguna_serve.bench.certificate.check import CertificateCheck, CheckConfig, check_certificate, render_check
from laguna_serve.bench.certificate.locating import DEFAULT_ROWS
from laguna_serve.bench.certificate.report import render_html, render_markdown, render_text
from laguna_serve.bench.certificate.result import LINE, Certificate
from laguna_serve.bench.certificate.row_matched import write_blank_drafter
from laguna_serve.bench.certificate.runner import REFERENCE, Job, run_job
from laguna_serve.bench.certificate.subject import digest_lasting, find_gamma, find_identity
from laguna_serve.bench.certificate.verdict import DEFECT, ROW_MATCHED
from laguna_serve.bench.harness.prompts import PromptsConfig, PromptsError, fingerprint_prompts
from laguna_serve.serving.checkpoint import find_folder
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, FlagError, Quick, parse_numbers
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, fingerprint, hold_out, is_begun
from laguna_serve.serving.speculation.drafting import format_speculation, open_drafter, resolve_gamma

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
  does a certificate apply to this machine? (0 yes, 1 no: what differs, 2 not known; its flags: --check --help)
    python bench/certify.py --check out/certificate/certificate.json

exit status:
  0    certified: identical, or different only where rounding decides a tie
  1    defect: the reasons are printed
  2    could not run: bad input, an engine did not start or died, or a request failed; the same command continues
  130  interrupted: the same command continues
"""


@dataclass(frozen=True, kw_only=True)
class CertifyConfig(PromptsConfig, ArmsConfig):
    """What to certify, against which controls; the files go to `out`."""

    num_prompts: Annotated[
        int | None, Flag(f"the first N (default: at most {DEFAULT_PROMPTS})", metavar="N", at_least=1)
    ] = None
    max_tokens: Annotated[int, Flag("output tokens per prompt (default: 128)", metavar="N", at_least=1)] = 128
    concurrency: Annotated[
        tuple[int, ...], Flag("requests in flight (default: 1,4,16)", metavar="N,…", parse=parse_numbers)
    ] = (1, 4, 16)
    identical: Annotated[
        bool,
        Flag(
            "no difference is allowed, not even a tie: for engines that promise bits (--exact both; masked diffusion, "
            "where it is on by itself)"
        ),
    ] = False
    temperature: Annotated[
        float,
        Flag(
            "tokens are drawn at it, with --seed in every request, and have to be identical (default: 0)",
            metavar="T",
            at_least=0,
            at_most=2,
        ),
    ] = 0.0
    row_matched: Annotated[
        Literal["random", "synthetic", "none"],
        Flag(
            "drafter with random weights, or vLLM's synthetic acceptance at length 1.0 (GPU; default: random)",
            group="controls and third path",
        ),
    ] = "random"
    row_matched_url: Annotated[str | None, Flag("an endpoint that is that control", metavar="U")] = None
    replay: Annotated[bool, Flag("leave the third path out: in float32 it takes twice a 16-bit model's memory")] = True
    reference_url: Annotated[str | None, Flag("an endpoint of the exact model, for the replay", metavar="U")] = None
    locate: Annotated[
        bool | None,
        Flag(
            "name the first operation that differs between one row and γ + 1 rows (default: where something differs)",
            either_way=True,
        ),
    ] = None
    out: Annotated[Path, Flag("folder for the certificate", metavar="DIR")]

    QUICK: ClassVar = Quick(
        "32 prompts × 48 tokens at 1,4", {"num_prompts": 32, "max_tokens": 48, "concurrency": (1, 4)}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.partition("=")[0] == "--check" for argument in argv):
        return _check(argv)
    command = Command("bench/certify.py", CertifyConfig, __doc__, EXAMPLES, measures=True, interrupted=CONTINUES)
    return command.run(argv, certify, show=render_text, line=LINE, judge=judge)


def judge(certificate: Certificate) -> int:
    """Return the exit status that a verdict stands for."""
    return FELL_SHORT if certificate.verdict == DEFECT else HELD


def _check(argv: Sequence[str]) -> int:
    """Run the command line with `--check`."""
    command = Command("bench/certify.py --check", CheckConfig, check.__doc__, check.EXAMPLES)

    def act(config: CheckConfig) -> CertificateCheck:
        return check_certificate(config, read_environment(current_argv()))

    if not {"-h", "--help"}.isdisjoint(argv):
        argv = ["--help"]  # `--check` alone wants its file first
    return command.run(argv, act, show=render_check, judge=lambda found: found.status)


@hold_out
def certify(config: CertifyConfig, environment: Environment | None = None) -> Certificate:
    """Make the passes that are missing in `config.out`, judge them, and write the certificate there.

    Raises:
        PromptsError, CheckpointError, EngineError: as `make_job`.
        EngineError, EndpointError, OSError: a pass could not be made; what was answered is kept.
    """
    environment = environment or read_environment(current_argv())
    job = make_job(config, environment)
    load = OtherLoad()
    certificate = run_job(job, environment, Progress())
    certificate = structs.replace(certificate, environment=load.note(environment), identity=job.identity)
    write_result(job.out / "certificate.json", certificate)
    write_text(job.out / "certificate.md", render_markdown(certificate))
    write_text(job.out / "certificate.html", render_html(certificate))
    return certificate


def list_own_specs(config: CertifyConfig) -> list[ArmSpec]:
    """List the arms that a certificate beside an A/B starts besides the A/B's, as far as they can be checked before."""
    reference = _make_reference(config, {BASELINE: make_spec(config, BASELINE)}, config.out)
    return [reference] if isinstance(reference, ArmSpec) else []


def make_job(config: CertifyConfig, environment: Environment) -> Job:
    """Everything that can be refused before an engine starts.

    Raises:
        PromptsError, CheckpointError: an input cannot be used.
        RunDirError: the folder holds another certificate's passes, or of other code, another machine or its variables.
        EngineError: an engine could not be started.
        IdentityError, OSError: what computes here could not be found out.
    """
    check_out(config.out)
    prompts = config.load_prompts()
    if config.num_prompts is not None and config.num_prompts > len(prompts):
        expected = f"expected at most {len(prompts)}, got {config.num_prompts}"
        raise PromptsError(f"--num-prompts: {expected}; the file has no more prompts")
    prompts = prompts[: config.num_prompts or DEFAULT_PROMPTS]
    out = config.out
    specs = {BASELINE: make_spec(config, BASELINE), CANDIDATE: make_spec(config, CANDIDATE)}
    begun = is_begun(out / "passes")
    if not begun:
        check_specs(specs.values(), config.max_tokens)
    diffusion = config.starts_diffusion
    if config.temperature and not (config.identical or diffusion):
        raise FlagError("--temperature: expected --identical beside it, as draws are not held against noise")
    decisive = (*ENGINE_FLAGS, "prefix_caching", "baseline_url", "candidate_url", "max_tokens", "seed", "row_matched")
    given = {name: value for name in ("temperature", "row_matched_url") if (value := getattr(config, name))}
    identity = find_identity(config, specs, environment)
    checkpoints = {name: fingerprint(path) for name in ENGINE_FLAGS[:3] if (path := getattr(config, name))}
    claim_folder(
        out / "passes",
        {name: getattr(config, name) for name in decisive}
        | {
            "prompts": fingerprint_prompts(prompts),
            "concurrency": list(config.concurrency),
            "checkpoints": checkpoints,
            "identity": None if identity is None else digest_lasting(identity),
        }
        | given
        | {"versions": environment.versions, "device": environment.device.name if environment.device else None},
    )
    missing: dict[str, str] = {}
    for name, make in ((ROW_MATCHED, _make_row_matched), (REFERENCE, _make_reference)):
        spec = make(config, specs, out)
        if isinstance(spec, ArmSpec):
            specs[name] = spec
        else:
            missing[name] = spec
    if not begun:
        own = [spec for name, spec in specs.items() if name in (ROW_MATCHED, REFERENCE)]
        check_specs(own, config.max_tokens)
    return Job(
        specs=specs,
        identity=identity,
        missing=missing,
        prompts=prompts,
        max_tokens=config.max_tokens,
        concurrencies=config.concurrency,
        dtype=find_dtype(config),
        seed=config.seed,
        out=out,
        rows=(find_gamma(config) or DEFAULT_ROWS - 1) + 1,
        locate=False if diffusion else config.locate,
        identical=config.identical or diffusion,
        temperature=config.temperature,
    )


def _make_row_matched(config: CertifyConfig, specs: Mapping[str, ArmSpec], out: Path) -> ArmSpec | str:
    """Make the control's arm, or say why there is none.

    Its target is the baseline's: a wrong candidate must not excuse itself.

    vLLM's synthetic acceptance at length 1.0 should emit the target's first choice and nothing else: that each of its
    tokens is its own step's best, and that nothing was accepted, is checked as for every arm and shown.
    """
    if config.row_matched_url is not None:
        return ArmSpec(
            ROW_MATCHED, f"running at {config.row_matched_url}", url=config.row_matched_url, model_name=config.model
        )
    engine = specs[CANDIDATE].config
    if config.row_matched == "none":
        return "not asked for"
    if config.starts_diffusion:
        return NO_ROW_MATCHED
    if engine is None or config.draft is None:
        return "there is no drafter here to take the rows of"
    folder = find_folder(config.draft)
    if folder is None:
        return f"{config.draft} is not on this machine"
    gamma = resolve_gamma(config.fixed_gamma, open_drafter(folder, config.draft), beyond_block=config.beyond_block)
    eager = "; eager" if config.eager else ""
    assert config.model is not None
    base = replace(
        engine, model=config.model, gamma=gamma, adaptive=False, extra_args=tuple(shlex.split(config.baseline_args))
    )
    if config.row_matched == "synthetic":
        speculation = format_speculation(config.draft, gamma) | {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": 1.0,
        }
        extra = (*base.extra_args, "--speculative-config", json.dumps(speculation))
        label = f"{config.model}; drafter {config.draft}, γ {gamma}, synthetic acceptance of length 1.0{eager}"
        return ArmSpec(ROW_MATCHED, label, config=replace(base, extra_args=extra))
    blank = out / "passes" / "random-drafter"
    write_blank_drafter(folder, blank, config.seed)
    label = f"{config.model}; a drafter with random weights, γ {gamma}{eager}"
    return ArmSpec(ROW_MATCHED, label, config=replace(base, draft=str(blank)))


def _make_reference(config: CertifyConfig, specs: Mapping[str, ArmSpec], _out: Path) -> ArmSpec | str:
    """Make the third path's arm, or say why there is none."""
    if config.reference_url is not None:
        return ArmSpec(
            REFERENCE, f"running at {config.reference_url}", url=config.reference_url, model_name=config.model
        )
    engine = specs[BASELINE].config
    if not config.replay:
        return "not asked for"
    if engine is None:
        return "the arms were given by URL, and no --reference-url"
    if config.starts_diffusion:
        return NO_REPLAY
    exact = replace(engine, dtype="float32", enforce_eager=True, prefix_caching=False, exact=False)
    return ArmSpec(REFERENCE, f"{config.model}; float32, eager, no drafter", config=exact)


if __name__ == "__main__":
    raise SystemExit(main())
