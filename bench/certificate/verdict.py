"""Judges the passes of a certificate: where a candidate parts from its baseline, and whether arithmetic explains it.

Per load (concurrency) there are up to four passes over the same prompts: the baseline, the baseline *again* in another
order, the *row-matched* control (γ + 1 rows verified per step, next to nothing accepted) and the candidate. What the
controls' log-probabilities differ by from the baseline's, where their tokens agree, is the noise: what rounding can do
here. Every mismatch is classed against it as in stats/parity.py, the controls' own too. Three more things are defects:

- an emitted token that the arm's own log-probabilities, from the same forward pass, do not put first;
- a prompt that was read as other tokens;
- drift: the candidate's log-probabilities lie further from the baseline's, on average, than the row-matched control's,
  beyond the 95% interval and by more than DRIFT_RATIO. It shows a wrong weight that has not yet cost a token.

Pure; passes.py makes the passes, rescoring.py asks a third path about each divergence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs

from laguna_serve.bench.certificate.result import (
    Comparison,
    Difference,
    Divergence,
    Drift,
    LoadResult,
    NotOwnBest,
    StreamCheck,
)
from laguna_serve.bench.stats.intervals import bootstrap_table, bound_mismatch_rate
from laguna_serve.bench.stats.parity import (
    CLASSES,
    LOGIT_SPACING,
    Verdict,
    classify,
    count_common,
    find_mismatch,
    list_differences,
)
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Record

AGAIN, ROW_MATCHED = "again", "row-matched"
IDENTICAL, UP_TO_TIES, DEFECT = "identical", "equal up to ties", "defect"
DRIFT_RATIO = 1.5
# Of text around a divergence, in characters.
BEFORE, AFTER = 160, 60

Answers = Mapping[str, Probe]


@dataclass(frozen=True, slots=True)
class Rules:
    """What is asked of the arms.

    Attributes:
        identical: every difference is a defect, a tie too, and in a log-probability: the engine promises bits.
        drawn: tokens were drawn, with the same seeds in both arms, and need not be the likeliest.
    """

    identical: bool = False
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """The passes at one concurrency, by prompt id: the baseline's, the candidate's, and those of the controls made."""

    concurrency: int
    baseline: Answers
    candidate: Answers
    controls: Mapping[str, Answers]


def judge_load(load: Load, dtype: str, seed: int, rules: Rules = Rules()) -> LoadResult:
    """Everything at one load. `dtype`: the models', which bounds the noise from below."""
    differences = {name: _difference(load.baseline, answers) for name, answers in load.controls.items()}
    floor = LOGIT_SPACING.get(dtype, LOGIT_SPACING["float32"])
    noise = max((value for rows in differences.values() for values in rows for value in values), default=0.0)
    # Arms whose every row is computed bit for bit alike have no noise; others at least the spacing of their logits.
    noise = 0.0 if noise == 0.0 and ROW_MATCHED in differences else max(noise, floor)
    candidate = _compare(load.baseline, load.candidate, noise, rules)
    controls = {name: _compare(load.baseline, answers, noise, rules) for name, answers in load.controls.items()}
    drift = None
    if ROW_MATCHED in differences:
        drift = _find_drift(_difference(load.baseline, load.candidate), differences[ROW_MATCHED], floor, seed)
    return LoadResult(
        concurrency=load.concurrency,
        noise=noise,
        candidate=candidate,
        controls=controls,
        drift=drift,
        reasons=_find_reasons(candidate, controls, drift) + _find_differences(candidate, controls, rules),
    )


def find_verdict(loads: Sequence[LoadResult], more_reasons: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Find the verdict over all loads, and the reasons for a defect."""
    reasons = [f"at concurrency {load.concurrency}: {reason}" for load in loads for reason in load.reasons]
    reasons += more_reasons
    if reasons:
        return DEFECT, reasons
    return (UP_TO_TIES if any(load.candidate.mismatches for load in loads) else IDENTICAL), []


def judge_streams(observed: Answers, streamed: Sequence[Record], noise: float) -> StreamCheck:
    """Whether answers streamed without log-probabilities, as users get them, equal those that were examined.

    `beyond_noise` counts prompts whose streamed token lies further below the best than rounding explains.
    """
    differing, beyond = 0, 0
    for record in streamed:
        probe = observed[record.prompt_id]
        mismatch = find_mismatch(_as_record(record.prompt_id, probe), record)
        if mismatch is not None:
            differing += 1
            beyond += not _is_near(probe, mismatch.index, mismatch.candidate_token, noise)
    return StreamCheck(prompts=len(streamed), differing=differing, beyond_noise=beyond)


def find_not_own_best(answers: Answers) -> list[NotOwnBest]:
    """Every emitted token that its own step's log-probabilities do not put first. A tie is not one."""
    return [
        NotOwnBest(prompt_id=prompt_id, index=index, token=token, top=sorted(step.items(), key=lambda kv: -kv[1]))
        for prompt_id, probe in answers.items()
        for index, (token, step) in enumerate(zip(probe.token_ids, probe.top, strict=True))
        if token not in step or step[token] < max(step.values())
    ]


def _is_near(probe: Probe, index: int | None, token: int | None, noise: float) -> bool:
    if index is None or token is None or index >= len(probe.top) or token not in probe.top[index]:
        return False
    return max(probe.top[index].values()) - probe.top[index][token] <= 2 * noise


def _compare(baseline: Answers, other: Answers, noise: float, rules: Rules) -> Comparison:
    divergences = []
    for prompt_id, probe in baseline.items():
        answers = _as_record(prompt_id, probe), _as_record(prompt_id, other[prompt_id])
        mismatch = find_mismatch(*answers)
        if mismatch is not None:
            verdict = classify(mismatch, *answers, (probe, other[prompt_id]), noise)
            divergences.append(_put_in_context(verdict, probe.text, other[prompt_id].text))
    classes = Counter(item.classification for item in divergences)
    prompts = len(baseline)
    return Comparison(
        prompts=prompts,
        tokens=sum(len(other[prompt_id].token_ids) for prompt_id in baseline),
        mismatches=len(divergences),
        bound95=bound_mismatch_rate(len(divergences), prompts),
        classes={name: classes[name] for name in CLASSES},
        defect_bound95=bound_mismatch_rate(classes["defect"], prompts),
        first_index=min((d.index for d in divergences if d.index is not None), default=None),
        difference=_summarise([value for values in _difference(baseline, other) for value in values]),
        not_own_best=[] if rules.drawn else find_not_own_best(other),
        other_prompts=sum(probe.prompt_ids != other[prompt_id].prompt_ids for prompt_id, probe in baseline.items()),
        divergences=divergences,
    )


def _put_in_context(verdict: Verdict, baseline_text: str, candidate_text: str) -> Divergence:
    common = count_common(baseline_text, candidate_text)
    # The log-probabilities are those of the very forward passes that chose the tokens: nothing was run again.
    fields = {name: value for name, value in structs.asdict(verdict).items() if not name.endswith("_reproduced")}
    return Divergence(
        **fields,
        before=baseline_text[max(0, common - BEFORE) : common],
        baseline_text=baseline_text[common : common + AFTER],
        candidate_text=candidate_text[common : common + AFTER],
    )


def _difference(baseline: Answers, other: Answers) -> list[list[float]]:
    return [list_differences(probe, other[prompt_id]) for prompt_id, probe in baseline.items()]


def _summarise(values: list[float]) -> Difference | None:
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99])
    return Difference(mean=float(np.mean(values)), p50=float(p50), p99=float(p99), max=max(values), n=len(values))


def _find_drift(candidate: list[list[float]], control: list[list[float]], floor: float, seed: int) -> Drift:
    """Ratio of the mean differences from the baseline with its interval over prompts.

    The control's is taken to be at least 1% of the spacing of the logits, so that arms which compute bit for bit alike
    can be compared too.
    """
    rows = [
        (sum(controls), len(controls), sum(candidates), len(candidates))
        for candidates, controls in zip(candidate, control, strict=True)
        if candidates and controls
    ]
    if not rows:
        return Drift(ratio=None, ci95=None, drifts=False)
    table = np.array(rows, dtype=np.float64)
    table[:, 0] = np.maximum(table[:, 0], table[:, 1] * floor / 100)
    sums = table.sum(axis=0)
    low, high = bootstrap_table(table, seed)
    ratio = (sums[2] / sums[3]) / (sums[0] / sums[1])
    return Drift(ratio=float(ratio), ci95=(low, high), drifts=low > DRIFT_RATIO)


def _find_reasons(candidate: Comparison, controls: Mapping[str, Comparison], drift: Drift | None) -> list[str]:
    reasons = []
    if count := candidate.classes["defect"]:
        defect = next(d for d in candidate.divergences if d.classification == "defect")
        reasons.append(
            f"{count} of {candidate.prompts} prompts differ beyond rounding (the first: prompt "
            f"{defect.prompt_id}, token {defect.index}: {defect.reason})"
        )
    arms = {"candidate": candidate, **{f"{name} control": comparison for name, comparison in controls.items()}}
    for name, comparison in arms.items():
        if comparison.not_own_best:
            first = comparison.not_own_best[0]
            reasons.append(
                f"the {name} emitted {len(comparison.not_own_best)} tokens that its own log-probabilities do not put "
                f"first (the first: prompt {first.prompt_id}, token {first.index})"
            )
        if comparison.other_prompts:
            reasons.append(f"the {name} read {comparison.other_prompts} prompts as other tokens than the baseline")
    for name, comparison in controls.items():
        if count := comparison.classes["defect"]:
            reasons.append(f"the {name} control fails itself: {count} prompts differ from the baseline beyond rounding")
    if drift is not None and drift.drifts and drift.ci95 is not None:
        low, high = drift.ci95
        reasons.append(
            f"drift: the candidate's log-probabilities lie {drift.ratio:.2f} times as far from the baseline's as the "
            f"same number of rows explains (95% interval {low:.2f}–{high:.2f})"
        )
    return reasons


def _find_differences(candidate: Comparison, controls: Mapping[str, Comparison], rules: Rules) -> list[str]:
    """List what an engine that promises bits may not show."""
    if not rules.identical:
        return []
    reasons = []
    for name, arm in {"candidate": candidate, **{f"{name} control": arm for name, arm in controls.items()}}.items():
        if arm.mismatches:
            reasons.append(f"{arm.mismatches} of {arm.prompts} of the {name}'s answers differ, of which none may")
        elif arm.difference is not None and arm.difference.max > 0:
            reasons.append(
                f"the {name}'s log-probabilities differ by up to {arm.difference.max:.2g}, and may not at all"
            )
    return reasons


def _as_record(prompt_id: str, probe: Probe) -> Record:
    return Record(prompt_id, 0, 0, token_ids=list(probe.token_ids), text=probe.text)
