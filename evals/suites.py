"""Standard suites against an OpenAI-compatible endpoint: lm-evaluation-harness's, and code problems in our sandbox.

GSM8K, MMLU, MMLU-Pro, ARC-Challenge, HellaSwag, HumanEval(+), MBPP(+) and CRUXEval-O with the settings that the
checkpoints' own pages used (evals/suites.toml; --list shows them, and for each its data: fields, file names, and the
public data set). lm-evaluation-harness runs as a command in .venv-evals, which scripts/client_env.sh makes (pinned
releases, no torch). Code is asked by the prompts and stop words of bigcode-evaluation-harness, of evalplus or of this
project, as the suite's name says, and runs in this project's sandbox only. DIR gets a folder per suite with its results
and log, and suites.json and suites.md with one table; --merge makes that table of several folders, also of runs made
by hand with lm-evaluation-harness and evalplus.

Log-likelihoods need an endpoint whose /v1/completions answers `echo` with `logprobs`, as vLLM's does, and the model's
own tokenizer: prompts are sent as token ids. OPENAI_API_KEY is sent if it is set. A prompt to be answered that does not
fit the context ends a suite; one to be scored is cut at its beginning, and the table says how many were.

Code is asked raw (/v1/completions), with --chat through the chat template, with --thinking on or off if that has
enable_thinking; a name in the table such as "humaneval-plus, chat, thinking" says which. Thoughts need --max-tokens or
room in the context, and an engine's reasoning parser or </think> before the answer.

Without --data lm-evaluation-harness fetches its data sets from the hub. With it nothing is fetched; the files have the
published fields. Code suites always read files (HumanEval's lies in .venv-evals).
The last stdout line is one JSON object (schema laguna_serve.suites/1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from laguna_serve.evals.codegen.flags import add_template_flags, read_template
from laguna_serve.evals.codegen.grading import JailError
from laguna_serve.evals.harnesses.code_suites import check_suite, grade_samples, name_run, run_code_suite
from laguna_serve.evals.harnesses.lm_eval import Target, find_harness, run_lm_eval
from laguna_serve.evals.harnesses.results import NOTE, read_scores
from laguna_serve.evals.harnesses.settings import Suite, SuiteError, choose_suites, load_suites, render_list
from laguna_serve.evals.harnesses.table import merge, render_markdown, render_text
from laguna_serve.evals.problems import load_problems
from laguna_serve.serving.client.completions import open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.kit.cli import CONTINUES, HELD, Parser, run_command
from laguna_serve.serving.kit.environment import current_argv, describe_environment
from laguna_serve.serving.kit.files import write_json, write_text
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.run_dir import claim_folder, fingerprint

SCHEMA = "laguna_serve.suites/1"
EXAMPLES = """
examples:
  python evals/suites.py --list
  python evals/suites.py --base-url http://127.0.0.1:8000 --suites gsm8k,mmlu-5,arc-challenge --out out/suites
  python evals/suites.py --base-url URL --suites gsm8k --chat --limit 100 --data DIR --out out/suites
  python evals/suites.py --base-url URL --suites humaneval-bigcode,mbpp-bigcode,mbpp-bigcode:train --data DIR --out OUT
  python evals/suites.py --base-url URL --suites humaneval-plus,mbpp-plus --chat --thinking off --data DIR --out OUT
  python evals/suites.py --samples evalplus.jsonl --problems HumanEvalPlus.jsonl.gz --model NAME --out out/plus
  python evals/suites.py --merge out/teacher out/pruned --out out/merged

exit status:
  0    every suite has its result (a table has no verdict: nothing here falls short)
  2    could not run: bad input, no environment, no endpoint, or a harness failed
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv)
    return run_command("suites.py", lambda: run(args), others=(JailError,), interrupted=CONTINUES)


def run(args: argparse.Namespace) -> int:
    """List the suites, run some, or grade samples; then the table. Returns the exit status."""
    suites = load_suites()
    if args.list:
        print(render_list(list(suites.values())))
        return HELD
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.suites:
        run_suites(args, choose_suites(args.suites, suites), out, Progress())
    elif args.samples:
        problems = load_problems(Path(args.problems))
        grade_samples(Path(args.samples), problems, args.model, out, Progress())
    report(args, list(suites.values()), out)
    return HELD


def run_suites(args: argparse.Namespace, suites: Sequence[Suite], out: Path, progress: Progress) -> None:
    """Run those of the suites that have no result in `out` yet.

    Raises:
        SuiteError: bad input (before anything is sent), or a harness failed.
    """
    likelihoods = [suite.name for suite in suites if suite.run == "loglikelihood"]
    if args.chat and likelihoods:
        raise SuiteError(f"--chat: expected suites that generate, got {', '.join(likelihoods)}; run those without it")
    if any(suite.run != "code" for suite in suites):
        find_harness()
    if args.template and not args.chat:
        raise SuiteError("--thinking: expected --chat with it, got none: a raw prompt has no chat template; add it")
    data = Path(args.data) if args.data else None
    target, root = asyncio.run(describe_target(args))
    if target.tokenizer is None and likelihoods:
        expected = f"expected the model's folder or hub id for {', '.join(likelihoods)}, got none"
        raise SuiteError(f"--tokenizer: {expected}, and the endpoint names none; give it")
    for suite in suites:
        if suite.run == "code":
            check_suite(suite, target, data)
    for suite in suites:
        name = name_run(suite, target) if suite.run == "code" else suite.name
        folder = out / re.sub("[:, ]+", "-", name)
        claim_folder(folder, list_settings(suite, target, root, data))
        note = folder / NOTE
        if note.exists():
            progress.say(f"{name}: has its result in {folder}")
            continue
        cut = 0
        if suite.run == "code":
            run_code_suite(suite, target, data, folder, progress)
        else:
            cut = run_lm_eval(suite, target, data, folder, progress)
        write_json(note, {"suite": name, "model": target.model, "root": root, "cut_prompts": cut})


async def describe_target(args: argparse.Namespace) -> tuple[Target, str]:
    """What the endpoint says of its model, and where the model came from ("" if it does not say).

    Raises:
        EndpointError: no OpenAI-compatible server answers there.
        SuiteError: it serves no model of that name, or does not say how long a prompt may be.
    """
    base_url = args.base_url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with open_session() as session, session.get(f"{base_url}/v1/models", headers=headers) as response:
            response.raise_for_status()
            models = {str(model["id"]): model for model in (await response.json())["data"]}
    except (aiohttp.ClientError, TimeoutError, OSError, KeyError, TypeError, ValueError) as error:
        expected = f"expected a list of models, got {type(error).__name__}: {error}"
        raise EndpointError(f"{base_url}/v1/models: {expected}; is the engine up?") from error
    name = args.model or next(iter(models), None)
    if name not in models:
        raise SuiteError(f"--model: expected one of {', '.join(models) or 'no models'}, got {name}; choose one of them")
    model: dict[str, Any] = models[name]
    length = args.max_length or model.get("max_model_len")
    if length is None:
        raise SuiteError(f"{base_url}: expected max_model_len of {name}, got none; give --max-length")
    root = str(model.get("root") or "")
    asked = (args.tokenizer or root or None, args.chat, args.concurrency, args.limit, args.template, args.max_tokens)
    return Target(base_url, name, length, *asked), root


def list_settings(suite: Suite, target: Target, root: str, data: Path | None) -> dict[str, Any]:
    """What decides about a suite's answers; the endpoint's address does not."""
    files = sorted(data.glob(f"{suite.data.replace('{subject}', '*')}/*")) if data is not None else []
    return {
        "suite": [suite.task, suite.shots, suite.seed, suite.split],
        "model": [target.model, root, fingerprint(root) if root else ""],
        "asked": [target.max_length, target.tokenizer, target.chat, target.limit, target.template, target.max_tokens],
        "data": [[str(file.relative_to(data)), fingerprint(str(file))] for file in files] if data else [],
    }


def report(args: argparse.Namespace, suites: Sequence[Suite], out: Path) -> None:
    """Read every result, print the table and write it into `out`."""
    folders = [Path(folder) for folder in args.merge] if args.merge else [out]
    table = merge({folder: read_scores(folder, suites) for folder in folders}, suites)
    environment = describe_environment(current_argv())
    result = {"schema": SCHEMA, "environment": environment, **table}
    write_json(out / "suites.json", result)
    write_text(out / "suites.md", render_markdown(table, environment["command"], environment["date"]))
    print(render_text(table))
    print(json.dumps(result, ensure_ascii=False))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="evals/suites.py",
        description=__doc__,
        epilog=EXAMPLES,
    )
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument(
        "--list", action="store_true", help="show the suites: settings, sources, and where their data are to be had"
    )
    job.add_argument("--suites", metavar="NAME,…", help="run these against --base-url; of MBPP's NAME:SPLIT")
    job.add_argument("--samples", metavar="FILE", help="grade evalplus's samples (JSONL) against --problems")
    job.add_argument("--merge", metavar="DIR", nargs="+", help="one table of the results in these folders")
    parser.add_argument("--base-url", metavar="URL", help="the endpoint, such as http://127.0.0.1:8000")
    parser.add_argument("--model", metavar="NAME", help="as the endpoint calls it (default: its first one)")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions; generating suites only")
    add_template_flags(parser)
    tokens = "of an answer, thoughts included (default: the suite's own number; with --thinking on half of the context)"
    parser.add_argument("--max-tokens", metavar="N", type=int, help=tokens)
    parser.add_argument("--data", metavar="DIR", help="read the data sets from here and fetch nothing")
    tokenizer = "for log-likelihoods: folder or hub id (default: what the endpoint names as the model's root)"
    parser.add_argument("--tokenizer", metavar="T", help=tokenizer)
    length = "tokens that prompt and answer may have together (default: what the endpoint says)"
    parser.add_argument("--max-length", metavar="N", type=int, help=length)
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N questions of every task")
    parser.add_argument("--concurrency", metavar="N", type=int, default=16, help="requests in flight (default: 16)")
    parser.add_argument("--problems", metavar="FILE", help="of --samples: HumanEvalPlus.jsonl.gz, MbppPlus.jsonl.gz, …")
    parser.add_argument("--out", metavar="DIR", help="results go here")
    args = parser.parse_args(argv)
    needed = {"suites": ("base_url", "out"), "samples": ("problems", "model", "out"), "merge": ("out",)}
    for job_name, names in needed.items():
        for name in names:
            if getattr(args, job_name) and not getattr(args, name):
                parser.error(f"--{job_name}: expected --{name.replace('_', '-')} with it, got none; add it")
    for name in ("limit", "concurrency", "max_length", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    args.template = read_template(parser, args)
    return args


if __name__ == "__main__":
    raise SystemExit(main())
