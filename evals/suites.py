"""Standard suites against an OpenAI-compatible endpoint: lm-evaluation-harness's, and code problems in our sandbox.

GSM8K, MMLU, MMLU-Pro, ARC-Challenge, HellaSwag, HumanEval(+), MBPP(+) and CRUXEval-O with the settings that the
checkpoints' own pages used (evals/suites.toml; --list shows them, and for each its data: fields, file names, and the
public data set). lm-evaluation-harness runs as a command in .venv-evals, which scripts/client_env.sh makes (pinned
releases, no torch). Code is asked by the prompts and stop words of bigcode-evaluation-harness, of evalplus or of this
project, as the suite's name says, and runs in this project's sandbox only. DIR gets a folder per suite with its results
and log, and suites.json and suites.md with one table; --merge makes that table of several folders, also of runs made
by hand with lm-evaluation-harness (--log_samples) and evalplus, and tests every column against the first one, question
by question.

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

from collections.abc import Sequence

from laguna_serve.evals.codegen.grading import JailError
from laguna_serve.evals.harnesses.runs import SuitesConfig, run_suites
from laguna_serve.evals.harnesses.settings import load_suites, render_list
from laguna_serve.evals.harnesses.table import SuitesResult, render_text
from laguna_serve.serving.kit.cli import CONTINUES, HELD, print_result, run_command
from laguna_serve.serving.kit.flags import read_flags_and_json
from laguna_serve.serving.kit.results import to_json

__all__ = ["SuitesConfig", "SuitesResult", "main", "run_suites"]

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
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        SuitesConfig, argv, prog="evals/suites.py", description=__doc__, epilog=EXAMPLES
    )

    def run() -> int:
        if config.list:
            print(render_list(list(load_suites().values())))
        else:
            result = run_suites(config)
            print_result(render_text(result), to_json(result), config.out, always_json=always_json)
        return HELD

    return run_command("suites.py", run, others=(JailError,), interrupted=CONTINUES)


if __name__ == "__main__":
    raise SystemExit(main())
