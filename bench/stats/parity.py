"""Greedy parity: whether two arms' outputs are equal, where they part, and whether numerical noise explains it.

A mismatch is classified from the log-probabilities that both arms report when the prompt is run again:

- `tie`: both arms give the two tokens exactly the same log-probability; either choice is greedy.
- `near_tie`: in both arms the two tokens lie within NOISE_MULTIPLE × noise of the best one.
- `defect`: anything else, including a mismatch that could not be examined.

Noise is measured, not assumed: the largest difference between the arms' log-probabilities of the same tokens in the
same places, over the stretches where both arms followed the same tokens. Pure: serving/client makes the requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec import Struct

from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Record

CLASSES = ("tie", "near_tie", "defect")
# Each of the two tokens' log-probabilities can be off by the noise, in opposite directions.
NOISE_MULTIPLE = 2.0
# Differences beyond this many nats are not rounding: the arms do not compute the same function.
NOISE_CEILING = 0.5
# Spacing of the numbers in [8, 16), where the largest logits of language models lie: logits come out of the model in
# its own dtype, so two of them differ by at least this or not at all. It bounds the noise from below, as a short
# common stretch may happen to show none. An unknown dtype counts as float32, the strictest.
LOGIT_SPACING = {"bfloat16": 2.0**-4, "float16": 2.0**-7, "float32": 2.0**-20}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where two answers part.

    `index` is the first token that differs; None when the ids are equal and only the text's bytes differ. A token is
    None where that arm's answer had ended.
    """

    prompt_id: str
    index: int | None
    baseline_token: int | None
    candidate_token: int | None


class Verdict(Struct, frozen=True):
    """A mismatch with its class.

    `…_top2`: [token, log-probability] pairs at the divergence, best first; `…_margin`: how far (nats) the worse of the
    two tokens lies below the arm's best; `…_reproduced`: the re-request gave the same tokens up to and including the
    divergence.
    """

    prompt_id: str
    index: int | None
    classification: str
    reason: str
    baseline_token: int | None
    candidate_token: int | None
    baseline_top2: list[tuple[int, float]] | None = None
    candidate_top2: list[tuple[int, float]] | None = None
    baseline_margin: float | None = None
    candidate_margin: float | None = None
    baseline_reproduced: bool | None = None
    candidate_reproduced: bool | None = None


@dataclass(frozen=True, slots=True)
class _Evidence:
    """One arm's re-request at the divergence: did it repeat the answer so far, its best two there, and the margin."""

    reproduced: bool | None = None
    top2: list[tuple[int, float]] | None = None
    margin: float | None = None


NONE = _Evidence()


def find_mismatch(baseline: Record, candidate: Record) -> Mismatch | None:
    """Compare ids, then bytes, of two answers to the same prompt."""
    left, right = baseline.token_ids, candidate.token_ids
    if left == right:
        if baseline.text_bytes == candidate.text_bytes:
            return None
        return Mismatch(baseline.prompt_id, None, None, None)
    index = count_common(left, right)
    return Mismatch(
        baseline.prompt_id,
        index,
        left[index] if index < len(left) else None,
        right[index] if index < len(right) else None,
    )


def count_common(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of the common prefix."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def measure_noise(pairs: Iterable[tuple[Probe, Probe]], dtype: str) -> float:
    """Largest |difference| (nats) of the arms' log-probabilities of the same tokens over the common prefixes.

    The step where the answers part is left out, or a defect would excuse itself. Never below LOGIT_SPACING of `dtype`.
    """
    floor = LOGIT_SPACING.get(dtype, LOGIT_SPACING["float32"])
    return max([floor, *(difference for pair in pairs for difference in list_differences(*pair))])


def list_differences(baseline: Probe, candidate: Probe) -> list[float]:
    """|difference| (nats) of both answers' log-probabilities of every token that both report, up to where they part."""
    common = count_common(baseline.token_ids, candidate.token_ids)
    return [
        abs(first[token] - second[token])
        for first, second in zip(baseline.top[:common], candidate.top[:common], strict=True)
        for token in first.keys() & second.keys()
    ]


def classify(
    mismatch: Mismatch,
    baseline: Record,
    candidate: Record,
    probes: tuple[Probe, Probe] | None,
    noise: float,
) -> Verdict:
    """Give a mismatch its class. `probes`: (baseline's, candidate's) re-request, or None if one could not be made."""
    tokens = (mismatch.baseline_token, mismatch.candidate_token)

    def judge(classification: str, reason: str, baseline: _Evidence = NONE, candidate: _Evidence = NONE) -> Verdict:
        return Verdict(
            mismatch.prompt_id,
            mismatch.index,
            classification,
            reason,
            *tokens,
            baseline_top2=baseline.top2,
            candidate_top2=candidate.top2,
            baseline_margin=baseline.margin,
            candidate_margin=candidate.margin,
            baseline_reproduced=baseline.reproduced,
            candidate_reproduced=candidate.reproduced,
        )

    if mismatch.index is None:
        return judge("defect", "token ids are equal but the text differs")
    if tokens[0] is None or tokens[1] is None:
        return judge("defect", "one answer is a prefix of the other")
    if probes is None:
        return judge("defect", "not examined: a re-request failed or was not made")
    of_baseline, of_candidate = (
        _examine(mismatch.index, (tokens[0], tokens[1]), baseline, probe, record)
        for probe, record in zip(probes, (baseline, candidate), strict=True)
    )
    return judge(*_weigh(of_baseline, of_candidate, noise), of_baseline, of_candidate)


def _examine(index: int, tokens: tuple[int, int], baseline: Record, probe: Probe, record: Record) -> _Evidence:
    reproduced = list(probe.token_ids[: index + 1]) == record.token_ids[: index + 1]
    if list(probe.token_ids[:index]) != list(baseline.token_ids[:index]) or index >= len(probe.top):
        return _Evidence(reproduced)
    top2 = sorted(probe.top[index].items(), key=lambda item: -item[1])[:2]
    return _Evidence(reproduced, top2, _find_margin(probe.top[index], tokens))


def _find_margin(top: dict[int, float], tokens: tuple[int, int]) -> float | None:
    """How far the worse of the two tokens lies below the best, or None when one is not among those reported."""
    if not all(token in top for token in tokens):
        return None
    return max(top.values()) - min(top[token] for token in tokens)


def _weigh(baseline: _Evidence, candidate: _Evidence, noise: float) -> tuple[str, str]:
    limit = NOISE_MULTIPLE * noise
    margins: list[float] = []
    for arm, evidence in (("baseline", baseline), ("candidate", candidate)):
        if evidence.top2 is None:
            return "defect", f"the {arm}'s re-request parted from its own answer before the divergence"
        if evidence.margin is None:
            return "defect", f"one of the two tokens is not among the {arm}'s best two"
        margins.append(evidence.margin)
    if max(margins) == 0.0:
        return "tie", "both arms give the two tokens exactly the same log-probability"
    if noise > NOISE_CEILING:
        return "defect", f"the arms' log-probabilities differ by {noise:.3g} nats where their tokens agree"
    if max(margins) <= limit:
        return "near_tie", f"margins are within {NOISE_MULTIPLE:g} × the measured noise of {noise:.3g} nats"
    return "defect", f"a margin of {max(margins):.3g} nats exceeds {NOISE_MULTIPLE:g} × the noise of {noise:.3g}"
