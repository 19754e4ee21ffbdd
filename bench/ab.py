"""A/B of two vLLM engines: whether the candidate is faster, by how much, and whether it gives the same tokens.

Prints a table, then one JSON line (schema laguna_serve.ab/1); progress goes to stderr; DIR gets ab.json, ab.md, ab.png
and the engines' logs. How each figure is defined stands in the module that computes it (stats/intervals.py,
stats/parity.py), and why one may be withheld in harness/validity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import structs

from laguna_serve.bench.arms.arms import BASELINE, CANDIDATE, ArmSpec, check_specs
from laguna_serve.bench.arms.drafters import Sequential
from laguna_serve.bench.arms.options import ArmsConfig, find_dtype, make_spec
from laguna_serve.bench.certificate.report import summarise
from laguna_serve.bench.certificate.verdict import DEFECT
from laguna_serve.bench.certify import CertifyConfig, certify, list_own_specs
from laguna_serve.bench.harness.assemble import assemble
from laguna_serve.bench.harness.order import Load, choose_order
from laguna_serve.bench.harness.prompts import PromptsConfig, split_prompts
from laguna_serve.bench.harness.report import render_markdown, render_text
from laguna_serve.bench.harness.result import INTERRUPTED as INTERRUPTION
from laguna_serve.bench.harness.result import LINE, AbResult, CertificateSummary
from laguna_serve.bench.harness.runner import run_plan
from laguna_serve.bench.harness.schedule import NumWarmups, Plan, Waves, count_warmups, make_plan
from laguna_serve.serving.kit.cli import COULD_NOT_RUN, FELL_SHORT, HELD, INTERRUPTED
from laguna_serve.serving.kit.command import Command
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import Flag, Quick
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, hold_out

DESCRIPTION = "Measure a baseline and a candidate vLLM engine on the same prompts, paired: speed and equality."

EXAMPLES = """
examples:
  speculation against plain decoding, engines started and stopped here:
    python bench/ab.py --model tests/toy/teacher --draft tests/toy/dflash --gamma 7 \\
        --prompts tests/toy/prompts.jsonl --out out/ab --certify
  two settings of one engine (extra vLLM flags for one arm; here there is no drafter):
    python bench/ab.py --model tests/toy/teacher --candidate-args="--max-num-batched-tokens 512" \\
        --prompts tests/toy/prompts.jsonl --out out/flags
  a pruned checkpoint against the one it stands for:
    python bench/ab.py --model out/zeroed --candidate-model out/compact --dtype float32 \\
        --prompts tests/toy/prompts.jsonl --out out/pruned
  as users ask: through the chat template, answers end by themselves:
    python bench/ab.py --model tests/toy/teacher --draft tests/toy/dflash --chat --stop-at-eos \\
        --prompts tests/toy/prompts.jsonl --out out/chat
  two servers that already run (vLLM, started without prefix caching):
    python bench/ab.py --baseline-url http://127.0.0.1:8000 --candidate-url http://127.0.0.1:8001 \\
        --prompts tests/toy/prompts.jsonl --out out/urls

exit status:
  0    held: every figure could be reported and no divergence is a defect
  1    fell short: a divergence is a defect, or a figure was withheld (the reasons are printed)
  2    could not run: bad input, or an engine did not start
  130  interrupted: what was measured is reported and marked partial

Both engines are up and take turns where both fit, by the sizes of weights, buffers and KV cache. Where they do not, one
runs at a time, the baseline first and last: its two passes show how much the machine drifted, and the interval of the
speed-up allows for that.
"""


@dataclass(frozen=True, kw_only=True)
class AbConfig(PromptsConfig, ArmsConfig):
    """What to measure of two arms; the result files and the engines' logs go to `out`."""

    num_prompts: Annotated[int | None, Flag("the first N prompts (default: all)", metavar="N", at_least=1)] = None
    max_tokens: Annotated[int, Flag("output tokens per prompt (default: 128)", metavar="N", at_least=1)] = 128
    stop_at_eos: Annotated[
        bool,
        Flag(
            "let answers end by themselves, as users' do; the candidate's acceptance past the end is counted apart, "
            "untimed (default: every answer has N tokens)"
        ),
    ] = False
    concurrency: Annotated[int, Flag("prompts under way (default: 1)", metavar="N", at_least=1)] = 1
    waves: Waves = 1
    num_warmups: NumWarmups = None
    sequential: Sequential = None
    control: Annotated[
        int,
        Flag(
            "prompts the baseline runs twice (default: 16; 0: none; one engine at a time: all, as it runs last, too)",
            metavar="N",
            at_least=0,
        ),
    ] = 16
    certify: Annotated[
        bool,
        Flag("then certify parity on the same prompts (bench/certify.py), with one page in DIR/certificate"),
    ] = False
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]
    # Where num_prompts is not given: so many, or all if the file has fewer.
    at_most: int | None = None

    QUICK: ClassVar = Quick("16 prompts × 64 tokens, 4 controls", {"at_most": 16, "max_tokens": 64, "control": 4})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "bench/ab.py",
        AbConfig,
        DESCRIPTION,
        EXAMPLES,
        measures=True,
        interrupted="what was measured by then, if anything, is in --out",
    )
    return command.run(argv, compare, show=render_text, line=LINE, judge=judge)


@hold_out
def compare(config: AbConfig) -> AbResult:
    """Run both arms, write ab.json, ab.md and ab.png to `config.out`, and return the result.

    Raises:
        PromptsError: the prompts file cannot be used.
        EngineError, EndpointError, KeyboardInterrupt: it ended before anything was measured. Later, the result says
            that it is partial, and why.
    """
    plan, specs = prepare(config)
    environment = read_environment(current_argv())
    load = OtherLoad()
    progress = Progress()
    load_at_once = Load.of(plan.prompts, config.max_tokens, config.concurrency)
    order = choose_order(specs, config.sequential, load_at_once, progress.say)
    run = run_plan(plan, [order.apply(spec) for spec in specs], config.out, order, progress)
    result = assemble(
        run,
        plan,
        load.note(environment),
        dtype=find_dtype(config),
        drafting=config.draft is not None,
        prompts_file=str(config.prompts),
    )
    if config.certify and not run.stopped:
        write_result(config.out / "ab.json", result)  # whatever becomes of the certificate
        result = structs.replace(result, certificate=certify_arms(config, len(plan.prompts), environment))
    publish(result, config.out)
    return result


def judge(result: AbResult) -> int:
    """Return the exit status that a result stands for."""
    certificate = result.certificate or None
    if result.interrupted or (certificate is not None and certificate.reasons == [INTERRUPTION]):
        return INTERRUPTED
    if certificate is not None and certificate.verdict is None:
        return COULD_NOT_RUN
    defect = certificate is not None and certificate.verdict == DEFECT
    return FELL_SHORT if defect or result.parity.defects or result.refused or result.partial else HELD


def certify_arms(config: AbConfig, prompts: int, environment: Environment) -> CertificateSummary:
    """Certify the same arms in DIR/certificate; return the certificate in short."""
    try:
        certificate = certify(beside(config, prompts), environment)
    except KeyboardInterrupt:
        return CertificateSummary(verdict=None, reasons=[INTERRUPTION])
    except (CommandError, OSError) as error:
        return CertificateSummary(verdict=None, reasons=[str(error)])
    return CertificateSummary(verdict=certificate.verdict, summary=summarise(certificate), reasons=certificate.reasons)


def beside(config: AbConfig, prompts: int | None) -> CertifyConfig:
    """Configure the certificate of an A/B's arms, prompts, tokens and concurrency."""
    arms = {field.name: getattr(config, field.name) for field in fields(ArmsConfig)}
    return CertifyConfig(
        **arms,
        prompts=config.prompts,
        chat=config.chat,
        thinking=config.thinking,
        num_prompts=prompts,
        max_tokens=config.max_tokens,
        concurrency=(config.concurrency,),
        out=config.out / "certificate",
    )


def publish(result: AbResult, out: Path) -> None:
    """Write ab.json, ab.md and ab.png to `out`."""
    write_result(out / "ab.json", result)
    write_text(out / "ab.md", render_markdown(result))
    from laguna_serve.bench.harness.plot import draw  # takes a second to import

    draw(result, out / "ab.png")


def prepare(config: AbConfig) -> tuple[Plan, tuple[ArmSpec, ArmSpec]]:
    """Everything that can be refused before an engine starts.

    Raises:
        RunDirError: `out` cannot be a folder.
        PromptsError: the prompts file cannot be used.
        EngineError: an arm could not be started; with `certify` also the certificate's own.
    """
    check_out(config.out)
    prompts = config.load_prompts()
    count = config.num_prompts
    if count is None and config.at_most is not None:
        count = min(config.at_most, len(prompts))
    timed, warmup = split_prompts(prompts, count, count_warmups(config.num_warmups, config.concurrency))
    plan = make_plan(
        timed,
        warmup,
        max_tokens=config.max_tokens,
        concurrency=config.concurrency,
        control=config.control,
        seed=config.seed,
        stop_at_eos=config.stop_at_eos,
        waves=config.waves,
    )
    specs = make_spec(config, BASELINE), make_spec(config, CANDIDATE)
    own = list_own_specs(beside(config, None)) if config.certify else []
    check_specs([*specs, *own], config.max_tokens)
    return plan, specs


if __name__ == "__main__":
    raise SystemExit(main())
