"""What does a faster reference cost? Tokens, loss and Python lines of masked diffusion under other caches, schedules.

A reference (cache none, prefix or dual; one token a step, two, a threshold) is exact in itself and writes other texts
than the others. The same prompts are answered under a baseline and under any number of others, one engine after the
other, greedy. Then a judge, a causal model with the same tokenizer, reads every answer after its prompt: its loss on
the answers. Differences are taken prompt by prompt, with 95% intervals. What comes of it is quality: no reference is
called lossless against another. A prompt that does not fit the context beside its answer is cut from the left, and the
page says how many were.

DIR gets references.json, references.md and answers/, which grows as answers come in, so that the same command
continues; with more --other, or another judge, it asks for what is new alone. The last stdout line is one JSON object
(schema laguna_serve.references/1).
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.evals.distance.options import ReferencesConfig
from laguna_serve.evals.distance.references import measure_references
from laguna_serve.evals.distance.report import render_text
from laguna_serve.evals.distance.result import LINE, ReferencesResult
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.command import Command

__all__ = ["ReferencesConfig", "ReferencesResult", "main", "measure_references"]

EXAMPLES = """
examples:
  python evals/references.py --model tests/toy/llada --other "dual=--cache dual" \\
      --other "fast=--cache dual --threshold 0.9" --judge tests/toy/teacher \\
      --prompts tests/toy/prompts.jsonl --num-prompts 64 --max-tokens 64 --out out/references
  a baseline that is not the default, whose flags follow an =:
  python evals/references.py --model tests/toy/llada --baseline-args="--cache dual" \\
      --other "two=--cache dual --tokens-per-step 2" --judge tests/toy/teacher \\
      --prompts tests/toy/prompts.jsonl --quick --out out/two
  engines that run already:
  python evals/references.py --baseline-url http://127.0.0.1:8000 --other dual=http://127.0.0.1:8001 \\
      --judge-url http://127.0.0.1:8002 --prompts FILE --out out/references

exit status:
  0    measured: there is no verdict, as what may be lost is for who chooses to say
  2    could not run: bad input, a judge with another tokenizer, an engine did not start or died, or a request failed;
       what was answered is kept
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("evals/references.py", ReferencesConfig, __doc__, EXAMPLES, interrupted=CONTINUES, measures=True)
    return command.run(argv, measure_references, show=render_text, line=LINE)


if __name__ == "__main__":
    raise SystemExit(main())
