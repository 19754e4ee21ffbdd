"""A drafter beside a moving policy: replay, gate, roll-back, and runs that are interrupted in the worst places."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_laguna import make_tiny

from laguna_serve.scripts.training.drafter.data.records import Row
from laguna_serve.scripts.training.rl import loop, run
from laguna_serve.scripts.training.rl.refresh import gate, live, refresher
from laguna_serve.scripts.training.rl.refresh.buffer import ReplayBuffer
from laguna_serve.scripts.training.rl.refresh.gate import find_accepted, judge
from laguna_serve.scripts.training.rl.refresh.learner import Learner
from laguna_serve.scripts.training.rl.refresh.live import Steps, falls_short, find_p_below
from laguna_serve.scripts.training.rl.refresh.policy_states import PolicyStates
from laguna_serve.scripts.training.rl.refresh.pushed import Pushed
from laguna_serve.scripts.training.rl.rollouts import Rollout
from laguna_serve.serving.client.counters import Counters
from laguna_serve.serving.client.traffic import TrafficRecord
from laguna_serve.serving.kit.flags import FlagError

TOY = Path(__file__).resolve().parents[2] / "toy"
GAMMA = 7


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answer(prompt: int, version: int, temperature: float = 1.0) -> TrafficRecord:
    return TrafficRecord(
        prompt_token_ids=[prompt], token_ids=[5, 6, 7], temperature=temperature, weight_version=f"step-{version}"
    )


def test_replay_is_bounded_and_prefers_what_is_recent() -> None:
    replay = ReplayBuffer(size=60)
    for version in range(10):
        replay.add([answer(prompt, version) for prompt in range(10)])
        replay.add([answer(0, version, temperature=0.0)])
    assert len(replay.sampled) == 60
    assert len(replay.greedy) == 10
    drawn = Counter(record.weight_version for record in replay.draw(6000, 0.0, random.Random(0)))
    assert set(drawn) == {f"step-{version}" for version in range(4, 10)}
    assert drawn["step-9"] / drawn["step-5"] == pytest.approx(2.0, rel=0.15), "half as often after four versions"


def test_replay_draws_shares_and_leaves_prompts_out() -> None:
    replay = ReplayBuffer(size=100)
    assert replay.draw(4, 0.5, random.Random(0)) == []
    replay.add([answer(prompt, 0, temperature) for prompt in range(8) for temperature in (0.0, 1.0)])
    drawn = replay.draw(40, 0.25, random.Random(0), without={(3,), (4,)})
    assert sum(record.temperature == 0 for record in drawn) == 10
    assert not {3, 4} & {record.prompt_token_ids[0] for record in drawn}
    assert all(r.temperature == 1 for r in replay.draw(5, 0.25, random.Random(0), without={(p,) for p in range(8)}))
    again = ReplayBuffer(size=100)
    again.load(replay.dump())
    assert again == replay


def simulate(rng: np.random.Generator, quality: float, prompts: int = 8, spread: float = 0.3) -> np.ndarray:
    """Counts [prompts, 2] of drafters of one draft: answers differ in how easy they are, for all drafters alike."""
    ease = np.random.default_rng(1).uniform(1 - spread, 1 + spread, prompts)
    steps = np.full(prompts, 300.0)
    return np.stack([steps, rng.binomial(300, np.clip(0.4 * quality * ease, 0, 1)).astype(float)], axis=1)


@pytest.mark.slow
def test_gate_lets_better_drafters_pass_and_no_others() -> None:
    rng, prompts = np.random.default_rng(0), list(range(8))

    def passed(quality: float) -> float:
        return sum(judge(simulate(rng, 1.0), simulate(rng, quality), prompts).passes for _ in range(200)) / 200

    assert passed(1.3) > 0.95
    assert passed(0.9) < 0.05
    assert passed(1 - gate.MARGIN) < 0.12, "at the margin itself the level is that of the test"


def test_gate_says_why() -> None:
    rng = np.random.default_rng(0)
    serving, worse = simulate(rng, 1.0), simulate(rng, 0.5)
    assert "no more" in str(judge(serving, worse, list(range(8))).reason)
    assert "no more" in str(judge(serving, serving, list(range(8))).reason)
    few = judge(serving, worse, [0] * 8)
    assert "1 prompts" in str(few.reason)
    assert few.p_worse is None
    nothing = judge(np.zeros((8, 2)), np.zeros((8, 2)), list(range(8)))
    assert not nothing.passes
    assert nothing.serving_tau == 1.0


def test_gate_counts_a_prompt_once_however_many_answers_it_has() -> None:
    counts = np.array([[10.0, 4.0, 1.0], [10.0, 2.0, 0.0], [20.0, 9.0, 3.0]])
    assert find_accepted(counts) == pytest.approx(19 / 40)
    assert judge(counts, counts, ["a", "a", "b"]).prompts == 2


def count_live(rng: np.random.Generator, chances: Sequence[float], drafts: int = 1500) -> Steps:
    """The engine's counters for drafts whose places are accepted with these chances, given those before."""
    reached = np.cumprod(rng.random((drafts, len(chances))) < np.array(chances), axis=1)
    return Steps(float(drafts), reached.sum(axis=0).tolist())


def test_roll_back_takes_what_is_worse_and_leaves_what_is_as_good() -> None:
    rng, chances = np.random.default_rng(0), [0.35, 0.4, 0.4]
    frozen = count_live(rng, chances)
    assert falls_short(find_p_below(count_live(rng, [0.01, 0.1, 0.1]), frozen))
    assert falls_short(find_p_below(count_live(rng, [0.0, 0.0, 0.0]), frozen))
    assert falls_short(find_p_below(count_live(rng, [0.26, 0.4, 0.4]), frozen)), "a quarter fewer first drafts"
    assert not falls_short(find_p_below(count_live(rng, [0.5, 0.4, 0.4]), frozen))
    alarms = sum(falls_short(find_p_below(count_live(rng, chances), count_live(rng, chances))) for _ in range(500))
    assert alarms == 0


def test_roll_back_waits_for_enough_drafts_and_can_look_at_first_places_alone() -> None:
    frozen, bad = Steps(1000.0, [400.0, 200.0]), Steps(live.LEAST_DRAFTS - 1.0, [0.0, 0.0])
    assert find_p_below(bad, frozen) is None
    assert not falls_short(None)
    assert find_p_below(Steps(500.0, [0.0, 0.0]), Steps(500.0, [0.0, 0.0])) == 1.0
    shallow = Steps(1000.0, [400.0])  # γ was 1 in every step: no second place was tried
    assert falls_short(find_p_below(shallow, frozen))
    assert not falls_short(find_p_below(shallow.cut(1), frozen.cut(1)))


def test_mean_and_spread_of_a_step_are_those_of_its_draft() -> None:
    accepted = [0, 0, 1, 3, 2, 0, 3, 1]
    steps = Steps(8.0, [float(sum(n >= k for n in accepted)) for k in (1, 2, 3)])
    assert steps.mean == pytest.approx(np.mean(accepted))
    assert steps.deviation == pytest.approx(np.std(accepted))


def test_states_are_those_of_the_model() -> None:
    model = make_tiny()
    lengths = (5, 9, 3)
    rows = [Row(torch.arange(3, 3 + length, dtype=torch.int32), 1, 1.0) for length in lengths]
    states = PolicyStates(model, rows, (0, 2))
    assert all(not layer._forward_hooks for layer in model.model.layers), "hooks are taken off again"
    for number, row in enumerate(rows):
        with torch.no_grad():
            hidden = model(row.tokens[None].long(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(states.read(0, number, 3), hidden[1][0, :3], atol=1e-5, rtol=0)
    context = states.read_context([2, 1], 9)
    assert context.shape == (2, 9, 2, 16)
    assert not context[0, 3:].any()
    torch.testing.assert_close(context[1, :, 1], states.read(2, 1, 9))


class Service:
    """Stands for engine and gateway: remembers what was pushed, and accepts as told."""

    def __init__(self) -> None:
        self.pushes: list[tuple[str, str | None]] = []
        self.accepted: list[int] = [300, 100, 30, 10, 3, 1, 0]
        self._asked = 0
        self.previous: list[str] = []

    def push(
        self,
        version: str,
        folder: Path,
        digests: dict[str, str],
        previous: Path,
        draft: Pushed | None = None,
        previous_draft: Pushed | None = None,
    ) -> None:
        if draft is not None:
            assert draft == Pushed.of(draft.version, draft.folder), "what was digested is what is there"
            assert previous_draft is not None
            assert (previous_draft.folder / "model.safetensors").exists()
        self.pushes.append((version, None if draft is None else draft.version))

    def count(self, before: Counters | None = None, tokens: int = 0) -> Counters:
        if before is None:
            return Counters(accepted_per_position=(0,) * GAMMA)
        return Counters(drafts=1000, accepted_tokens=sum(self.accepted), accepted_per_position=tuple(self.accepted))

    def read_cpu_s(self) -> float:
        return 0.0


def write_answers(
    _service: Service, texts: Sequence[str], version: str, group: int, max_tokens: int, *, temperature: float = 1.0
) -> list[list[Rollout]]:
    """Made-up rollouts, a function of what is asked."""

    def write(text: str, number: int) -> Rollout:
        rng = random.Random(f"{text}/{version}/{number}/{temperature}")
        prompt, tokens = tuple(20 + ord(c) for c in text[:5]), tuple(rng.randrange(20, 40) for _ in range(max_tokens))
        return Rollout(prompt, tokens, (-1.0,) * max_tokens, rng.random(), version)

    return [[write(text, number) for number in range(group)] for text in texts]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Service:
    """Runs of grpo.py meet this in the place of an engine."""
    fake = Service()

    @contextmanager
    def open_fake(*_: Any) -> Iterator[Service]:
        yield fake

    monkeypatch.setattr(run, "open_service", open_fake)
    monkeypatch.setattr(loop, "sample", write_answers)
    prompts = [{"id": f"{name}.py:1", "prompt": f"{name} = 1"} for name in map(chr, range(ord("A"), ord("Z") + 1))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return fake


def describe(folder: Path, name: str, **changes: Any) -> run.GrpoConfig:
    settings: dict[str, Any] = {
        "model": str(TOY / "teacher"),
        "draft": str(TOY / "dflash"),
        "draft_sampling": "probabilistic",
        "prompts": folder / "prompts.jsonl",
        "out": folder / name,
        "steps": 4,
        "prompts_per_step": 4,
        "group": 2,
        "max_tokens": 10,
        "measure_every": 10,
        "threads": 1,
        "refresh_drafter": True,
        "refresh_every": 1,
        "refresh_steps": 2,
    }
    return run.GrpoConfig(**settings | changes)


def read_run(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The log without its seconds, and the state."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("seconds", None), line.pop("processor_s", None)
    state = torch.load(out / "state.pt", weights_only=True)
    state.pop("log"), state.pop("decisive")
    return log, state


def flatten(value: Any) -> list[Any]:
    """Everything in a state, tensors as bytes."""
    if isinstance(value, dict):
        return [part for key in value for part in (key, *flatten(value[key]))]
    if isinstance(value, list | tuple):
        return [part for item in value for part in flatten(item)]
    return [value.numpy().tobytes() if isinstance(value, torch.Tensor) else value]


@pytest.fixture
def pass_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate lets everything pass."""

    def wave(serving: gate.Counts, candidate: gate.Counts, prompts: Sequence[object]) -> gate.Verdict:
        return gate.Verdict(1.0, 1.0, None, len(prompts), None)

    monkeypatch.setattr(refresher, "judge", wave)


@pytest.mark.slow
@pytest.mark.usefixtures("pass_all")
def test_interrupted_run_goes_on_to_the_same_bits(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train_policy(describe(tmp_path, "whole"))
    whole = read_run(tmp_path / "whole")
    versions = [line["drafter"]["version"] for line in whole[0][:-1]]
    assert versions == ["d-0", "d-0", "d-1:step-1", "d-2:step-2"], "there is nothing to learn from in the first step"

    # Ctrl-C while the second step is sampled: the step is finished, and saved.
    config = describe(tmp_path, "stopped")

    def interrupt(*given: Any, **named: Any) -> list[list[Rollout]]:
        if given[2:4] == ("step-1", config.group):
            os.kill(os.getpid(), signal.SIGINT)
        return write_answers(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "sample", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.train_policy(config)
    assert len((config.out / "log.jsonl").read_text().splitlines()) == 2
    assert torch.load(config.out / "state.pt", weights_only=True)["step"] == 2
    service.pushes.clear()
    run.train_policy(config)
    assert service.pushes[0] == ("step-2", "d-1:step-1"), "the engine gets the drafter that the state names"
    stopped = read_run(config.out)
    assert stopped[0] == whole[0]
    assert flatten(stopped[1]) == flatten(whole[1])


@pytest.mark.slow
@pytest.mark.usefixtures("pass_all")
def test_run_that_breaks_off_between_push_and_log_goes_on_from_what_was_saved(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train_policy(describe(tmp_path, "whole", measure_every=2))
    whole = read_run(tmp_path / "whole")
    config = describe(tmp_path, "broken", measure_every=2)

    find_length = loop.find_length

    def break_off(counted: Counters) -> float | None:
        if service.pushes[-1][0] == "step-4":
            raise OSError("killed")
        return find_length(counted)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "find_length", break_off)  # between push and log
        with pytest.raises(OSError, match="killed"):
            run.train_policy(config)
    assert service.pushes[-1] == ("step-4", "d-3:step-3")
    assert torch.load(config.out / "state.pt", weights_only=True)["step"] == 2
    service.pushes.clear()
    run.train_policy(config)
    assert service.pushes[0] == ("step-2", "d-1:step-1"), "not the drafter that was pushed last, and never logged"
    broken = read_run(config.out)
    assert broken[0][-3:] == whole[0][-3:]
    assert flatten(broken[1]) == flatten(whole[1])


@pytest.mark.slow
@pytest.mark.usefixtures("pass_all")
def test_bad_drafter_is_taken_back(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights, pushed past the gate, accept next to nothing."""
    learn = Learner.learn

    def spoil(self: Learner, *given: Any) -> float:
        loss = learn(self, *given)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_(std=0.05)
        service.accepted = [2, 0, 0, 0, 0, 0, 0]
        return loss

    monkeypatch.setattr(Learner, "learn", spoil)
    monkeypatch.setattr(live, "LEAST_DRAFTS", 5)
    config = describe(tmp_path, "run", steps=3, max_tokens=24)
    result = run.train_policy(config)
    notes = [step.drafter for step in result.log[:-1]]
    assert notes[1] is not None
    assert notes[1].pushed == "d-1:step-1"
    assert notes[2] is not None
    assert notes[2].live is not None
    assert notes[2].live.rolled_back_to == notes[2].pushed == "d-0"
    assert service.pushes[-2:] == [("step-2", "d-1:step-1"), ("step-3", "d-0")]
    learner = torch.load(config.out / "state.pt", weights_only=True)["drafter"]["learner"]["module"]
    first = load_file(TOY / "dflash" / "model.safetensors")
    assert all(torch.equal(learner[name], tensor.float()) for name, tensor in first.items()), "it learns from there on"


@pytest.mark.slow
def test_refused_drafter_is_logged_and_not_pushed(service: Service, tmp_path: Path) -> None:
    """Answers of made-up tokens teach nothing that is shown on four prompts."""
    config = describe(tmp_path, "run", refresh_lr=0.0, steps=2)
    log = run.train_policy(config).log
    note = log[1].drafter
    assert note is not None
    assert note.gate is not None
    assert not note.gate.pushed
    assert note.gate.reason
    assert note.pushed is None
    assert service.pushes == [("step-0", "d-0"), ("step-1", None), ("step-2", None)]
    assert list((config.out / "drafters").iterdir()) == []
    assert note.gate.serving_tau == note.gate.candidate_tau, "with a learning rate of 0 it is the same drafter"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"draft": None}, "--refresh-drafter"),
        ({"greedy_share": 1.5}, "--greedy-share"),
        ({"refresh_every": 0}, "--refresh-every"),
        ({"draft": None, "refresh_drafter": False, "gamma": "adaptive"}, "--gamma adaptive"),
    ],
)
def test_what_means_nothing_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=says):
        describe(tmp_path, "run", **changes)


@pytest.mark.vllm
def test_rollouts_with_an_adaptive_gamma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pass_all: None) -> None:
    """The engine decides how much it drafts; a pushed drafter is held to the first place of its drafts alone."""
    monkeypatch.setattr(live, "LEAST_DRAFTS", 1)
    # An eighth of them: those of the modules that are held out are all asked at both measurements.
    lines = (TOY / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(lines[::8]), encoding="utf-8")
    config = describe(tmp_path, "run", gamma="adaptive", steps=3, group=4, max_tokens=16)
    log = run.train_policy(config).log
    note = log[2].drafter
    assert note is not None
    assert (note.version, note.live is not None and note.live.places) == ("d-1:step-1", 1)
    assert all((step.mismatch_nats or 0.0) < 1e-3 for step in log)
    assert sum(step.tokens or 0 for step in log) > 0
