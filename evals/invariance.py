"""Do two endpoints give the same answers, programs and rewards on the same problems? Greedy, with the noise measured.

Every problem is answered several times by each arm, all requests in one mixed order. Tokens, text, extracted program
and reward are compared per problem, between the arms and of each arm with itself; tokens that part are examined with
the log-probabilities of both sides. What counts as the engine's own noise and what as a difference:
equivalence/verdict.py. DIR gets invariance.json, invariance.md and answers/answers.jsonl, which grows as answers come
in, so that the same command continues; the last stdout line is one JSON object (schema laguna_serve.invariance/1).
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.evals.codegen.grading import JailError
from laguna_serve.evals.equivalence.invariance import InvarianceConfig, compare_answers
from laguna_serve.evals.equivalence.report import render_text
from laguna_serve.evals.equivalence.result import InvarianceResult, shorten
from laguna_serve.evals.equivalence.verdict import COULD_NOT_TELL, EXPLAINED, INVARIANT, NOISE
from laguna_serve.serving.kit.cli import CONTINUES, COULD_NOT_RUN, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Command

__all__ = ["InvarianceConfig", "InvarianceResult", "compare_answers", "main"]

EXAMPLES = """
examples:
  speculation against plain decoding, engines started and stopped here:
    python evals/invariance.py --model tests/toy/teacher --draft tests/toy/dflash --gamma 7 \\
        --form completion --max-tokens 128 --out out/invariance
  two servers that already run (vLLM, started without prefix caching), a HumanEval file:
    python evals/invariance.py --baseline-url http://127.0.0.1:8000 --candidate-url http://127.0.0.1:8001 \\
        --problems HumanEval.jsonl.gz --repeats 3 --out out/invariance

exit status:
  0    held: invariant, explained by rounding with equal rewards, or no more than the engine's own noise
  1    fell short: the arms differ, or it is unclear; the reasons are printed
  2    could not run: bad input, an engine did not start or died, or a request failed (then the verdict is "could not
       tell"); the same command continues
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command(
        "evals/invariance.py", InvarianceConfig, __doc__, EXAMPLES, others=(JailError,), interrupted=CONTINUES
    )
    return command.run(argv, compare_answers, show=render_text, line=shorten, judge=judge)


def judge(result: InvarianceResult) -> int:
    """Return the exit status that a verdict stands for."""
    if result.verdict == COULD_NOT_TELL:
        return COULD_NOT_RUN
    return HELD if result.verdict in (INVARIANT, EXPLAINED, NOISE) else FELL_SHORT


if __name__ == "__main__":
    raise SystemExit(main())
