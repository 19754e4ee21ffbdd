"""Standard suites: the configuration of suites.py, their runs, and the table of their results."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import aiohttp
import msgspec

from laguna_serve.evals.harnesses.code_suites import check_suite, grade_samples, name_run, run_code_suite
from laguna_serve.evals.harnesses.lm_eval import MAX_THINKING_TOKENS, Target, find_harness, run_lm_eval
from laguna_serve.evals.harnesses.results import NOTE, Note, read_scores
from laguna_serve.evals.harnesses.settings import Suite, SuiteError, choose_suites, load_suites
from laguna_serve.evals.harnesses.table import SuitesResult, merge, render_markdown
from laguna_serve.evals.problems import load_problems
from laguna_serve.evals.problems.template import TemplateFields, Thinking, make_template
from laguna_serve.serving.client.completions import find_root, open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import JsonObject, write_result
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint, hold_folder, make_out

JOBS = ("list", "suites", "samples", "merge")
NEEDED = {"suites": ("base_url", "out"), "samples": ("problems", "model", "out"), "merge": ("out",)}


@dataclass(frozen=True, kw_only=True)
class SuitesConfig:
    """One of four jobs (`list`, `suites`, `samples`, `merge`), and what it needs."""

    list: Annotated[
        bool, Flag("show the suites: settings, sources, and where their data are to be had", group="one of")
    ] = False
    suites: Annotated[str | None, Flag("run these against --base-url; of MBPP's NAME:SPLIT", metavar="NAME,…")] = None
    samples: Annotated[Path | None, Flag("grade evalplus's samples (JSONL) against --problems", metavar="FILE")] = None
    merge: Annotated[
        tuple[Path, ...], Flag("one table of the results in these folders", metavar="DIR", several=True)
    ] = ()
    base_url: Annotated[
        str | None, Flag("the endpoint, such as http://127.0.0.1:8000", metavar="URL", group="how it is done")
    ] = None
    model: Annotated[str | None, Flag("as the endpoint calls it (default: its first one)", metavar="NAME")] = None
    chat: Annotated[bool, Flag("ask /v1/chat/completions; generating suites only")] = False
    thinking: Thinking = None
    chat_template_kwargs: TemplateFields = None
    max_tokens: Annotated[
        int | None,
        Flag(
            "of an answer, thoughts included (default: the suite's own number; with --thinking on half of the context,"
            f" at most {MAX_THINKING_TOKENS})",
            metavar="N",
            at_least=1,
        ),
    ] = None
    data: Annotated[Path | None, Flag("read the data sets from here and fetch nothing", metavar="DIR")] = None
    tokenizer: Annotated[
        str | None,
        Flag(
            "for log-likelihoods: folder or hub id (default: what the endpoint names as the model's root)", metavar="T"
        ),
    ] = None
    max_length: Annotated[
        int | None,
        Flag(
            "tokens that prompt and answer may have together (default: what the endpoint says)", metavar="N", at_least=1
        ),
    ] = None
    limit: Annotated[int | None, Flag("only the first N questions of every task", metavar="N", at_least=1)] = None
    concurrency: Annotated[int, Flag("requests in flight (default: 16)", metavar="N", at_least=1)] = 16
    problems: Annotated[
        Path | None, Flag("of --samples: HumanEvalPlus.jsonl.gz, MbppPlus.jsonl.gz, …", metavar="FILE")
    ] = None
    out: Annotated[Path | None, Flag("results go here", metavar="DIR")] = None

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        given = [job for job in JOBS if getattr(self, job)]
        if len(given) != 1:
            got = " and ".join(f"--{job}" for job in given) or "none"
            raise FlagError(f"expected one of {', '.join(f'--{job}' for job in JOBS)}, got {got}")
        for name in NEEDED.get(given[0], ()):
            if not getattr(self, name):
                raise FlagError(f"--{given[0]}: expected --{name.replace('_', '-')} with it, got none; add it")

    @property
    def template(self) -> JsonObject:
        """Fields for the chat template."""
        return make_template(self.thinking, self.chat_template_kwargs)


class _Model(msgspec.Struct, frozen=True):
    """One entry of an endpoint's /v1/models."""

    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


def run_suites(config: SuitesConfig) -> SuitesResult:
    """Do the job, unless it is `list`; then write the table of what is there, and return it.

    The table goes to `config.out` as suites.json and suites.md.

    Raises:
        SuiteError: bad input (before anything is sent), a harness failed, or there is no result.
        ProblemsError, JailError, EndpointError: no problems, no walls around programs, no endpoint.
    """
    assert config.out is not None
    suites = load_suites()
    make_out(config.out)
    if config.suites:
        run_missing(config, choose_suites(config.suites, suites), config.out, Progress())
    elif config.samples is not None:
        assert config.problems is not None
        assert config.model is not None
        grade_samples(config.samples, load_problems(config.problems), config.model, config.out, Progress())
    known = list(suites.values())
    scores = {folder: read_scores(folder, known) for folder in config.merge or (config.out,)}
    result = merge(scores, known, read_environment(current_argv()))
    write_result(config.out / "suites.json", result)
    write_text(config.out / "suites.md", render_markdown(result))
    return result


def run_missing(config: SuitesConfig, suites: Sequence[Suite], out: Path, progress: Progress) -> None:
    """Run those of the suites that have no result in `out` yet.

    Raises:
        SuiteError: bad input (before anything is sent), or a harness failed.
    """
    likelihoods = [suite.name for suite in suites if suite.run == "loglikelihood"]
    if config.chat and likelihoods:
        raise SuiteError(f"--chat: expected suites that generate, got {', '.join(likelihoods)}; run those without it")
    if any(suite.run != "code" for suite in suites):
        find_harness()
    if config.template and not config.chat:
        raise SuiteError("--thinking: expected --chat with it, got none: a raw prompt has no chat template; add it")
    target, root = asyncio.run(describe_target(config))
    if target.tokenizer is None and likelihoods:
        expected = f"expected the model's folder or hub id for {', '.join(likelihoods)}, got none"
        raise SuiteError(f"--tokenizer: {expected}, and the endpoint names none; give it")
    for suite in suites:
        if suite.run == "code":
            check_suite(suite, target, config.data)
    for suite in suites:
        run_suite(suite, target, root, config.data, out, progress)


def run_suite(suite: Suite, target: Target, root: str, data: Path | None, out: Path, progress: Progress) -> None:
    """Run one suite into a folder of `out`, if it has no result there yet. Raises SuiteError, RunDirError."""
    name = name_run(suite, target) if suite.run == "code" else suite.name
    folder = out / re.sub("[:, ]+", "-", name)
    with hold_folder(folder):
        claim_folder(folder, list_settings(suite, target, root, data))
        if (folder / NOTE).exists():
            progress.say(f"{name}: has its result in {folder}")
            return
        cut = 0
        if suite.run == "code":
            run_code_suite(suite, target, data, folder, progress)
        else:
            cut = run_lm_eval(suite, target, data, folder, progress)
        note = Note(suite=name, model=target.model, root=root, cut_prompts=cut)
        write_json(folder / NOTE, msgspec.to_builtins(note))


async def describe_target(config: SuitesConfig) -> tuple[Target, str]:
    """Describe what the endpoint says of its model, and where the model came from ("" if it does not say).

    Raises:
        EndpointError: no OpenAI-compatible server answers there.
        SuiteError: it serves no model of that name, or does not say how long a prompt may be.
    """
    assert config.base_url is not None
    base_url = find_root(config.base_url)
    models = await _list_models(base_url)
    name = config.model or next(iter(models), None)
    if name is None or name not in models:
        raise SuiteError(f"--model: expected one of {', '.join(models) or 'no models'}, got {name}; choose one of them")
    length = config.max_length or models[name].max_model_len
    if length is None:
        raise SuiteError(f"{base_url}: expected max_model_len of {name}, got none; give --max-length")
    root = models[name].root or ""
    target = Target(
        base_url=base_url,
        model=name,
        max_length=length,
        tokenizer=config.tokenizer or root or None,
        chat=config.chat,
        concurrency=config.concurrency,
        limit=config.limit,
        template=config.template,
        max_tokens=config.max_tokens,
    )
    return target, root


async def _list_models(base_url: str) -> dict[str, _Model]:
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with open_session() as session, session.get(f"{base_url}/v1/models", headers=headers) as response:
            response.raise_for_status()
            found = msgspec.json.decode(await response.read(), type=_Models)
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
        expected = f"expected a list of models, got {type(error).__name__}: {error}"
        raise EndpointError(f"{base_url}/v1/models: {expected}; is the engine up?") from error
    return {model.id: model for model in found.data}


def list_settings(suite: Suite, target: Target, root: str, data: Path | None) -> dict[str, object]:
    """List what decides about a suite's answers; the endpoint's address does not."""
    most = target.max_tokens if suite.run == "code" else target.answer_tokens
    files = sorted(data.glob(f"{suite.data.replace('{subject}', '*')}/*")) if data is not None else []
    return {
        "suite": [suite.task, suite.shots, suite.seed, suite.split],
        "model": [target.model, root, fingerprint(root) if root else ""],
        "asked": [
            target.max_length,
            target.tokenizer,
            target.chat,
            target.limit,
            target.template,
            most,
        ],
        "data": [[str(file.relative_to(data)), fingerprint(str(file))] for file in files] if data else [],
    }
