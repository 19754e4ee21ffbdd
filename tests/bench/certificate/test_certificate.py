"""What a certificate concludes from passes that are written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from safetensors import safe_open

from laguna_serve.bench.certificate import rescoring
from laguna_serve.bench.certificate.locating import choose_sequence
from laguna_serve.bench.certificate.passes import Answers
from laguna_serve.bench.certificate.report import summarise
from laguna_serve.bench.certificate.result import Certificate, LoadResult, Replayed, StreamCheck
from laguna_serve.bench.certificate.row_matched import write_blank_drafter
from laguna_serve.bench.certificate.verdict import (
    AGAIN,
    DEFECT,
    IDENTICAL,
    ROW_MATCHED,
    UP_TO_TIES,
    Load,
    Rules,
    find_verdict,
    judge_load,
    judge_streams,
)
from laguna_serve.bench.stats.intervals import bound_mismatch_rate
from laguna_serve.serving.client.logprobs import Probe
from laguna_serve.serving.client.records import Record
from laguna_serve.serving.kit.results import read_result
from laguna_serve.serving.kit.run_dir import RunDirError, claim_folder, fingerprint

ROOT = Path(__file__).resolve().parents[3]
TOY = Path(__file__).resolve().parents[2] / "toy"
PROMPTS = [f"p{i}" for i in range(12)]
LENGTH = 8


def answer(prompt_id: str, by: float = 0.0) -> Probe:
    """Tokens 10, 11, …, each at −0.5 + `by` with the next id at −3 + `by`."""
    tokens = tuple(range(10, 10 + LENGTH))
    top = tuple({token: -0.5 + by, token + 1: -3.0 + by} for token in tokens)
    return Probe(tokens, top, text=" ".join(map(str, tokens)), prompt_ids=(1, int(prompt_id[1:])))


def everyone(by: float = 0.0) -> dict[str, Probe]:
    return {prompt_id: answer(prompt_id, by) for prompt_id in PROMPTS}


def shift(probe: Probe, by: float) -> Probe:
    """The answer with every log-probability moved."""
    return replace(probe, top=tuple({token: value + by for token, value in step.items()} for step in probe.top))


def part(probe: Probe, index: int, ours: float, theirs: float) -> Probe:
    """The answer with the next id chosen at `index`, at `theirs`, where the baseline's token has `ours`."""
    token = probe.token_ids[index]
    tokens = (*probe.token_ids[:index], token + 1, *probe.token_ids[index + 1 :])
    top = (*probe.top[:index], {token: ours, token + 1: theirs}, *probe.top[index + 1 :])
    return replace(probe, token_ids=tokens, top=top, text=" ".join(map(str, tokens)))


def judge(
    candidate: dict[str, Probe],
    *,
    baseline: dict[str, Probe] | None = None,
    rows: float = 0.001,
    dtype: str = "float32",
) -> LoadResult:
    baseline = baseline or everyone()
    shifted = {prompt_id: shift(probe, rows) for prompt_id, probe in baseline.items()}
    controls = {AGAIN: baseline, ROW_MATCHED: shifted}
    return judge_load(Load(4, baseline, candidate, controls), dtype, seed=0)


def near_tie(
    ours: float = -0.7, margin: float = 0.001, prompt: str = "p5"
) -> tuple[dict[str, Probe], dict[str, Probe]]:
    """Baseline and candidate that part at token 3 of a prompt, each preferring its own token by `margin`."""
    baseline, candidate = everyone(), everyone(0.001)
    tie = {13: ours, 14: ours - margin}
    baseline[prompt] = replace(baseline[prompt], top=(*baseline[prompt].top[:3], tie, *baseline[prompt].top[4:]))
    candidate[prompt] = part(candidate[prompt], 3, ours - margin, ours)
    return baseline, candidate


def test_equal_answers_are_identical() -> None:
    load = judge(everyone(0.001))
    assert find_verdict([load]) == (IDENTICAL, [])
    assert load.noise == pytest.approx(0.001)
    assert load.candidate.bound95 == pytest.approx(1 - 0.05 ** (1 / 12))
    assert load.drift.ratio == pytest.approx(1)


def test_mismatch_within_the_controls_noise_is_a_near_tie() -> None:
    baseline, candidate = near_tie()
    load = judge(candidate, baseline=baseline)
    assert find_verdict([load]) == (UP_TO_TIES, [])
    (found,) = load.candidate.divergences
    assert (found.prompt_id, found.index, found.classification) == ("p5", 3, "near_tie")
    assert found.before.endswith("12 1")
    assert (found.baseline_text, found.candidate_text) == ("3 14 15 16 17", "4 14 15 16 17")


def test_headline_bounds_prompts_that_differ_at_any_load() -> None:
    """Each load has one of its own: two of the twelve differ at one load or the other."""
    loads = []
    for prompt in ("p5", "p7", "p7"):
        baseline, candidate = near_tie(prompt=prompt)
        loads.append(judge(candidate, baseline=baseline))
    made = read_result(ROOT / "bench/results/toy-certificate-cpu/certificate.json", Certificate)
    workload = structs.replace(made.workload, prompts=len(PROMPTS))
    summary = summarise(structs.replace(made, verdict=UP_TO_TIES, workload=workload, loads=loads))
    assert "3 of 36 answers" in summary
    assert f"at most {bound_mismatch_rate(2, 12):.2%} of such prompts differ at any of these loads" in summary
    assert f"and at most {bound_mismatch_rate(0, 12):.2%} by more than rounding" in summary


def test_mismatch_beyond_the_controls_noise_is_a_defect() -> None:
    baseline, candidate = near_tie(margin=0.01)
    verdict, reasons = find_verdict([judge(candidate, baseline=baseline)])
    assert verdict == DEFECT
    assert "at concurrency 4: 1 of 12 prompts differ beyond rounding (the first: prompt p5, token 3" in reasons[0]


def test_where_the_controls_show_no_noise_nothing_is_a_near_tie() -> None:
    baseline, candidate = near_tie(margin=1e-9)
    load = judge(candidate, baseline=baseline, rows=0.0)
    assert load.noise == 0
    assert load.candidate.classes["defect"] == 1


def test_without_a_row_matched_control_the_spacing_of_the_logits_is_the_noise() -> None:
    load = judge_load(Load(1, everyone(), everyone(), {AGAIN: everyone()}), "bfloat16", seed=0)
    assert load.noise == 2**-4


def test_candidate_cannot_excuse_itself_by_its_own_noise() -> None:
    """Were noise read off the candidate, as its answers are a nat off, this mismatch would be rounding."""
    baseline, candidate = near_tie(margin=0.5)
    shifted = {prompt_id: shift(probe, -1.0) for prompt_id, probe in candidate.items()}
    load = judge(shifted, baseline=baseline)
    assert load.candidate.classes["defect"] == 1
    assert find_verdict([load])[0] == DEFECT


def test_accepted_token_that_was_not_the_argmax() -> None:
    candidate = everyone(0.001)
    probe = candidate["p7"]
    candidate["p7"] = replace(probe, top=(*probe.top[:6], {16: -0.5, 99: -0.4}, *probe.top[7:]))
    verdict, reasons = find_verdict([judge(candidate)])
    assert verdict == DEFECT
    assert "the candidate emitted 1 tokens that its own log-probabilities do not put first" in reasons[0]
    assert "prompt p7, token 6" in reasons[0]


def test_own_tie_is_no_defect() -> None:
    candidate = everyone(0.001)
    probe = candidate["p7"]
    candidate["p7"] = replace(probe, top=(*probe.top[:6], {16: -0.499, 99: -0.499}, *probe.top[7:]))
    assert find_verdict([judge(candidate)])[0] == IDENTICAL


def test_drift_without_a_single_other_token_is_a_defect() -> None:
    load = judge(everyone(0.004))
    assert load.candidate.mismatches == 0
    verdict, reasons = find_verdict([load])
    assert verdict == DEFECT
    assert "drift: the candidate's log-probabilities lie 4.00 times as far" in reasons[0]


def test_prompt_read_as_other_tokens_is_a_defect() -> None:
    candidate = everyone(0.001)
    candidate["p2"] = replace(candidate["p2"], prompt_ids=(2, 2))
    assert find_verdict([judge(candidate)])[0] == DEFECT


def test_control_that_fails_itself_certifies_nothing() -> None:
    controls = {AGAIN: everyone() | {"p3": part(answer("p3"), 2, -3.0, -0.5)}}
    load = judge_load(Load(1, everyone(), everyone(), controls), "float32", seed=0)
    verdict, reasons = find_verdict([load])
    assert verdict == DEFECT
    assert "the again control fails itself" in reasons[0]
    assert load.drift is None


def test_bit_for_bit_arms_do_not_drift() -> None:
    assert judge(everyone(), rows=0.0).drift.drifts is False
    assert judge(everyone(0.001), rows=0.0).drift.drifts is True


def test_shorter_answer_is_a_defect() -> None:
    candidate = everyone(0.001)
    probe = candidate["p1"]
    candidate["p1"] = replace(probe, token_ids=probe.token_ids[:5], top=probe.top[:5], text="10 11 12 13 14")
    assert find_verdict([judge(candidate)])[0] == DEFECT


def test_streamed_answers_are_held_against_the_examined_ones() -> None:
    observed = everyone()
    same = [Record(p, 0, 1, token_ids=list(a.token_ids), text=a.text) for p, a in observed.items()]
    assert judge_streams(observed, same, 0.001) == StreamCheck(prompts=12, differing=0, beyond_noise=0)
    same[4].token_ids[2] += 1
    assert judge_streams(observed, same, 0.001).beyond_noise == 1
    assert judge_streams(observed, same, 2.0) == StreamCheck(prompts=12, differing=1, beyond_noise=0)


def test_replay_asks_about_the_common_prefix_and_says_who_is_right() -> None:
    baseline, candidate = near_tie()
    loads = [judge(candidate, baseline=baseline)]
    (prefix,) = rescoring.list_questions(loads, [baseline])
    assert prefix == (1, 5, 10, 11, 12)
    rescoring.attach(loads, [baseline], {prefix: {14: -0.6, 13: -0.8, 9: -5.0}})
    divergences = loads[0].candidate.divergences
    replay = divergences[0].replay
    assert isinstance(replay, Replayed)
    assert (replay.preferred, replay.top2) == ("candidate", [(14, -0.6), (13, -0.8)])
    assert replay.margin == pytest.approx(0.2)
    summary = rescoring.summarise(divergences)
    assert (summary.candidate, summary.baseline, summary.sign_test_p) == (1, 0, 1.0)


def test_sign_test_by_hand() -> None:
    baseline, candidate = near_tie()
    (divergence,) = judge(candidate, baseline=baseline).candidate.divergences
    sides = [
        structs.replace(divergence, replay=Replayed(preferred=side, margin=None, top2=[]))
        for side in ("baseline",) * 9 + ("candidate",)
    ]
    assert rescoring.summarise(sides).sign_test_p == pytest.approx(2 * 11 / 1024)
    assert rescoring.summarise([]).sign_test_p is None


def test_answers_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "pass.jsonl"
    answers = Answers(path)
    for prompt_id in ("p1", "p2"):
        answers.add(prompt_id, replace(answer(prompt_id), text="\ud800 é"))
    with path.open("a") as file:
        file.write('{"id": "p3", "prompt_ids": [1')
    again = Answers(path)
    assert again.by_id == answers.by_id
    assert path.read_text().count("\n") == 2


def test_folder_of_another_measurement_is_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path / "parts", {"gamma": 7})
    claim_folder(tmp_path / "parts", {"gamma": 7})
    with pytest.raises(RunDirError, match="expected the parts of this measurement, got another one's"):
        claim_folder(tmp_path / "parts", {"gamma": 6})


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("hub/name") == ""


@pytest.mark.parametrize("drafter", ["dflash", "dflash-speculators"])
def test_blank_drafter_keeps_everything_but_the_weights(tmp_path: Path, drafter: str) -> None:
    blank = tmp_path / "blank"
    write_blank_drafter(TOY / drafter, blank, seed=0)
    assert json.loads((blank / "config.json").read_text()) == json.loads((TOY / drafter / "config.json").read_text())
    import torch  # bfloat16 has no name in NumPy

    for path in (TOY / drafter).glob("*.safetensors"):
        with safe_open(path, "pt") as ours, safe_open(blank / path.name, "pt") as theirs:
            assert list(ours.keys()) == list(theirs.keys())
            for name in ours.keys():  # noqa: SIM118  safe_open is no mapping
                a, b = ours.get_tensor(name), theirs.get_tensor(name)
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                if a.is_floating_point():
                    assert not torch.equal(a, b)
                    spread = float(b.float().std())
                    assert np.isclose(spread, 0.02, rtol=0.5) or b.numel() < 8
                else:
                    assert torch.equal(a, b)


@pytest.mark.parametrize(("by", "drifts"), [(0.0014, False), (0.0016, True)])
def test_drift_begins_at_half_as_much_again(by: float, drifts: bool) -> None:
    assert judge(everyone(by)).drift.drifts is drifts


def test_prompts_that_part_at_once_say_nothing_about_drift() -> None:
    """The control's noise on them is nothing to hold the candidate's on the others against."""
    baseline, candidate = everyone(), everyone(0.004)
    control = everyone(0.001) | {"p5": shift(answer("p5"), 1.0)}
    candidate["p5"] = part(candidate["p5"], 0, -0.7, -0.6)
    load = judge_load(Load(1, baseline, candidate, {ROW_MATCHED: control}), "float32", seed=0)
    assert load.drift is not None
    assert load.drift.ratio == pytest.approx(4)
    assert load.drift.drifts


def test_streamed_token_may_lie_by_twice_the_noise_below_the_best() -> None:
    observed = everyone()
    record = Record("p4", 0, 1, token_ids=[*range(10, 18)], text=observed["p4"].text)
    record.token_ids[2] += 1  # 2.5 below
    assert judge_streams(observed, [record], 1.24).beyond_noise == 1
    assert judge_streams(observed, [record], 1.26).beyond_noise == 0


def test_drawn_token_need_not_be_the_likeliest() -> None:
    drawn = everyone()
    probe = drawn["p7"]
    drawn["p7"] = replace(probe, top=(*probe.top[:6], {16: -0.5, 99: -0.4}, *probe.top[7:]))
    load = Load(1, drawn, drawn, {AGAIN: drawn})
    assert find_verdict([judge_load(load, "float32", seed=0, rules=Rules(drawn=True))]) == (IDENTICAL, [])
    assert find_verdict([judge_load(load, "float32", seed=0)])[0] == DEFECT


def test_ties_do_not_count_towards_the_bound_on_defects() -> None:
    baseline, candidate = near_tie()
    found = judge(candidate, baseline=baseline).candidate
    assert found.defect_bound95 == pytest.approx(bound_mismatch_rate(0, 12))
    assert found.bound95 == pytest.approx(bound_mismatch_rate(1, 12))


def test_engine_that_promises_bits_may_show_no_difference() -> None:
    load = Load(1, everyone(), everyone(1e-6), {AGAIN: everyone()})
    verdict, reasons = find_verdict([judge_load(load, "float32", seed=0, rules=Rules(identical=True))])
    assert verdict == DEFECT
    assert "the candidate's log-probabilities differ by up to 1e-06, and may not at all" in reasons[0]


def test_rows_are_looked_for_where_the_arms_part_first() -> None:
    baseline, candidate = everyone(), everyone()
    candidate["p3"] = shift(answer("p3"), 0.1)
    assert choose_sequence(baseline, candidate, 2) == (1, 3, *range(10, 18))
    candidate["p7"] = part(answer("p7"), 4, -0.7, -0.6)
    candidate["p9"] = part(answer("p9"), 2, -0.7, -0.6)
    assert choose_sequence(baseline, candidate, 2) == (1, 9, 10, 11, 12, 13)
