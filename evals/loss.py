"""Mean loss and perplexity of a model on a text or a token array, through an endpoint's prompt log-probabilities.

The mean is over scored tokens: every one counts the same, and the first of each row is not scored, as nothing stands
before it. Text is tokenised by the endpoint and cut into rows of --length tokens. A --stride below the length makes
rows overlap: a token is then scored in the first row that holds it, so that every token but a document's first counts
once, with at least length − stride tokens of context after the first row. Bits per byte = tokens of the text ÷ its
bytes × loss ÷ ln 2. The 95% interval draws documents, or rows where the documents are few.

DIR gets loss.json, loss.md and rows.jsonl, which grows as rows come in, so that the same command continues; the last
stdout line is one JSON object (schema laguna_serve.loss/1).
"""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.evals.perplexity.loss import LossConfig, measure_loss
from laguna_serve.evals.perplexity.loss_report import LossResult, render_text
from laguna_serve.serving.kit.cli import CONTINUES
from laguna_serve.serving.kit.command import Command

__all__ = ["LossConfig", "LossResult", "main", "measure_loss"]

EXAMPLES = """
examples:
  python evals/loss.py --base-url http://127.0.0.1:8000 --text held-out.jsonl --out out/loss
  python evals/loss.py --base-url http://127.0.0.1:8000 --tokens chunks.npy --pad-id 0 --out out/loss
  python evals/loss.py --base-url https://gateway.example/v1 --model laguna --api-key-env LAGUNA_KEY \\
      --text book.txt --length 2048 --stride 1024 --out out/loss

exit status:
  0    held: measured
  2    could not run: bad input, or the endpoint failed; what was scored is kept
  130  interrupted: the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("evals/loss.py", LossConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
    return command.run(argv, measure_loss, show=render_text)


if __name__ == "__main__":
    raise SystemExit(main())
