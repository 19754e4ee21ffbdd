"""The distance between references: what is refused before an engine starts, and the result of what was measured."""

from __future__ import annotations

import hashlib
import json
import os

from laguna_serve.bench.arms.arms import BASELINE, check_specs
from laguna_serve.bench.harness.prompts import PromptsError, fingerprint_prompts
from laguna_serve.evals.codegen.syntax_reward import reward_syntax
from laguna_serve.evals.distance.comparison import compare_tokens, list_scored, score, summarise_speed
from laguna_serve.evals.distance.judging import count_shortened
from laguna_serve.evals.distance.kept import Answer
from laguna_serve.evals.distance.options import (
    ReferencesConfig,
    check_vocabularies,
    find_canvas,
    find_context,
    make_judge,
    make_specs,
)
from laguna_serve.evals.distance.report import render_markdown
from laguna_serve.evals.distance.result import (
    ComparedPrompt,
    Judge,
    MeasuredReference,
    ReferencesResult,
    Workload,
)
from laguna_serve.evals.distance.runner import Job, Kept, run
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.kit.environment import Environment, OtherLoad, current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, fingerprint, hold_out, is_begun


@hold_out
def measure_references(config: ReferencesConfig) -> ReferencesResult:
    """Get what `config.out` lacks, compare, and write references.json and references.md there.

    Raises:
        PromptsError, CheckpointError, RunDirError: an input cannot be used, or the folder holds other answers.
        EngineError, EndpointError: an engine cannot be had, or died, or a request failed; what was answered is kept.
    """
    environment = read_environment(current_argv())
    job = make_job(config, environment)
    load = OtherLoad()
    kept = run(job, Progress())
    result = assemble(config, job, load.note(environment), kept)
    write_result(config.out / "references.json", result)
    write_text(config.out / "references.md", render_markdown(result))
    return result


def make_job(config: ReferencesConfig, environment: Environment) -> Job:
    """Everything that can be refused before an engine starts.

    Raises:
        PromptsError, CheckpointError, RunDirError: an input cannot be used, or the folder holds other answers.
        EngineError, EndpointError: an engine could not be started, or an endpoint does not answer.
    """
    check_out(config.out)
    prompts = config.load_prompts(lengths=False)
    if config.num_prompts is not None and config.num_prompts > len(prompts):
        expected = f"expected at most {len(prompts)}, got {config.num_prompts}"
        raise PromptsError(f"--num-prompts: {expected}; the file has no more prompts")
    prompts = prompts[: config.num_prompts]
    specs, judge, folder = make_specs(config), make_judge(config), config.out / "answers"
    if not config.by_url:
        check_vocabularies(config.model, config.judge)
    job = Job(
        specs=specs,
        judge=judge,
        prompts=prompts,
        prompt_tokens=config.prompt_tokens,
        max_tokens=config.max_tokens,
        canvas=find_canvas(config.max_tokens, config.list_flags()),
        context=find_context(config.list_flags()),
        concurrency=config.concurrency,
        folder=folder,
        judge_key=name_judge(config),
    )
    if not all(is_begun(job.find_folder(name)) for name in specs):
        check_specs([*specs.values(), judge], config.max_tokens)
    claim_folder(folder, list_settings(config, prompts, environment))
    for name, spec in specs.items():
        flags = None if spec.config is None else list(spec.config.extra_args)
        claim_folder(job.find_folder(name), {"flags": flags, "url": spec.url})
    return job


def list_settings(config: ReferencesConfig, prompts: list[Prompt], environment: Environment) -> dict[str, object]:
    """List what decides about the answers of all references."""
    decisive = ("model", "dtype", "baseline_args", "baseline_url", "max_tokens", "prompt_tokens", "seed")
    return {name: getattr(config, name) for name in decisive} | {
        "prompts": fingerprint_prompts(prompts),
        "checkpoint": None if config.model is None or config.by_url else fingerprint(config.model),
        "versions": environment.versions,
        "device": None if environment.device is None else environment.device.name,
    }


def name_judge(config: ReferencesConfig) -> str:
    """Name a judge by what decides about its losses, in a few characters."""
    checkpoint = None if config.judge is None else fingerprint(config.judge)
    decisive = [config.judge, config.judge_url, config.judge_args, config.judge_dtype, checkpoint]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]


def assemble(config: ReferencesConfig, job: Job, environment: Environment, kept: Kept) -> ReferencesResult:
    """Assemble the result of answers and losses that are all there."""
    ids = [prompt.id for prompt in job.prompts]
    read = [kept.prompts.by_key[prompt] for prompt in ids]
    tokens = {name: [kept.answers[name].by_key[prompt].token_ids for prompt in ids] for name in job.specs}
    scored = list_scored(tokens)
    losses = {
        name: [loss.nats / loss.tokens for loss in (kept.losses[name].by_key[ids[number]] for number in scored)]
        for name in job.specs
    }
    lines = {
        name: [reward_lines(prompt, kept.answers[name].by_key[prompt.id]) for prompt in job.prompts]
        for name in job.specs
    }
    references = {}
    for name, spec in job.specs.items():
        other = name != BASELINE
        references[name] = MeasuredReference(
            label=spec.label,
            tokens_per_answer=sum(map(len, tokens[name])) / len(ids),
            distance=compare_tokens(tokens[BASELINE], tokens[name]) if other else None,
            loss=score(losses[name], losses[BASELINE] if other else None, config.seed) if scored else None,
            python_lines=score(lines[name], lines[BASELINE] if other else None, config.seed),
            speed=summarise_speed(kept.answers[name].stretches),
        )
    return ReferencesResult(
        environment=environment,
        workload=Workload(
            prompts_file=os.path.relpath(config.prompts),
            prompts=len(ids),
            cut=sum(prompt.is_cut for prompt in read),
            longest=max(len(prompt.prompt_ids) for prompt in read),
            max_tokens=job.max_tokens,
            concurrency=job.concurrency,
            seed=config.seed,
        ),
        judge=Judge(
            label=job.judge.label, shortened=count_shortened(read, kept.losses), unscored=len(ids) - len(scored)
        ),
        references=references,
        prompts=[
            ComparedPrompt(
                id=prompt.id,
                prompt_tokens=len(prompt.prompt_ids),
                tokens={name: len(found[number]) for name, found in tokens.items()},
                nats={
                    name: losses.by_key[prompt.id].nats
                    for name, losses in kept.losses.items()
                    if prompt.id in losses.by_key
                },
                python_lines={name: found[number] for name, found in lines.items()},
            )
            for number, prompt in enumerate(read)
        ],
    )


def reward_lines(prompt: Prompt, answer: Answer) -> float:
    """Share of an answer's lines that are Python; one to a conversation begins a line of its own.

    The last line of an answer that ended by itself is whole; of one that was cut off it is left out.
    """
    is_open = answer.ended and not answer.text.endswith("\n")
    return reward_syntax(prompt.text if prompt.chat is None else "", answer.text + "\n" * is_open)
