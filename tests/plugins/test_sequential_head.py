"""A drafter's sequential head: its arithmetic, its config, and that drafts are drawn from what verification is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from probes import run_program
from sequential_toy import RANK, TOY, make_sequential

from laguna_serve.plugins.formats.sequential_head import HeadError, head_shapes, read_rank
from laguna_serve.plugins.models.dflash_head import SequentialHead

V, H = 20, 12


def make_head() -> SequentialHead:
    torch.manual_seed(0)
    head = SequentialHead(V, H, RANK)
    head.out.weight.data.normal_()
    return head


@torch.no_grad()
def test_it_adds_what_its_formula_says() -> None:
    head = make_head()
    hidden, tokens = torch.randn(3, H), [4, 17, 2]
    weights = {name: tensor.double() for name, tensor in head.state_dict().items()}
    state, expected = torch.zeros(RANK, dtype=torch.float64), []
    for place, token in zip(hidden.double(), tokens, strict=True):
        before = torch.cat([weights["tokens.weight"][token], state])
        both = weights["mix.weight"] @ before + weights["places.weight"] @ place + weights["places.bias"]
        gate, new = 1 / (1 + torch.exp(-both[:RANK])), torch.tanh(both[RANK:])
        state = (1 - gate) * state + gate * new
        expected.append(weights["out.weight"] @ state)
    torch.testing.assert_close(head(hidden, torch.tensor(tokens)).double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_place_depends_on_what_is_before_it_alone() -> None:
    head = make_head()
    hidden, tokens = torch.randn(2, 5, H), torch.randint(V, (2, 5))
    whole = head(hidden, tokens)
    torch.testing.assert_close(head(hidden[:, :3], tokens[:, :3]), whole[:, :3])
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % V
    changed = head(hidden, other)
    assert torch.equal(changed[:, :3], whole[:, :3])
    assert not torch.allclose(changed[:, 3:], whole[:, 3:], atol=1e-3)


@pytest.mark.vllm
@torch.no_grad()
@pytest.mark.parametrize("warmth", [None, [0.7, 1.0, 1.3], [0.7, 0.0, 1.3]], ids=["likeliest", "drawn", "one greedy"])
def test_compiled_drafts_are_the_formulas(warmth: list[float] | None) -> None:
    from laguna_serve.plugins.drafting.head import draft_block

    torch.manual_seed(5)
    head = SequentialHead(vocab_size=11, hidden_size=6, rank=4)
    torch.nn.init.normal_(head.out.weight)
    hidden, logits, anchors = torch.randn(3, 5, 6), torch.randn(3, 5, 11), torch.tensor([4, 0, 10])
    temperature = None if warmth is None else torch.tensor(warmth)
    tokens, probs = draft_block(head, hidden, logits, anchors, temperature)
    completed = logits + head(hidden, torch.cat([anchors[:, None], tokens[:, :-1]], dim=1))
    greedy = [True] * 3 if warmth is None else [each == 0 for each in warmth]
    for request, likeliest in enumerate(greedy):
        assert not likeliest or torch.equal(completed[request].argmax(-1), tokens[request])
    if warmth is None:
        assert probs is None
        return
    assert probs is not None
    drawn = [request for request, likeliest in enumerate(greedy) if not likeliest]
    expected = (completed / torch.tensor(warmth)[:, None, None]).softmax(-1)
    torch.testing.assert_close(probs[drawn], expected[drawn])
    assert len({tuple(draft_block(head, hidden, logits, anchors, temperature)[0][0].tolist()) for _ in range(9)}) > 1


def test_it_begins_without_effect() -> None:
    assert not SequentialHead(V, H, RANK)(torch.randn(2, 5, H), torch.randint(V, (2, 5))).any()


def test_its_tensors_are_those_that_a_checkpoint_is_checked_for() -> None:
    held = {f"sequential_head.{name}": tuple(tensor.shape) for name, tensor in make_head().state_dict().items()}
    assert held == head_shapes(V, H, RANK)


@pytest.mark.parametrize("said", [4, {}, {"rank": 0}, {"rank": True}, {"rank": "8"}, {"rank": 8, "kind": "gru"}])
def test_what_is_no_head_is_refused(said: Any) -> None:
    assert read_rank({}) is read_rank({"sequential_head": None}) is None
    assert read_rank({"sequential_head": {"rank": 8}}) == 8
    with pytest.raises(HeadError, match=r"expected dflash_config\.sequential_head to be .*, got"):
        read_rank({"sequential_head": said})


@pytest.mark.vllm
@torch.no_grad()
def test_the_other_runner_drafts_the_same() -> None:
    """V2's buffers, filled as it fills them, stand for the runner, which a CPU cannot run."""
    from laguna_serve.plugins.models.dflash_drafts import generate_draft

    head, gamma, requests = make_head(), 3, 2
    matrix, states = torch.randn(V, H), torch.randn(requests * (gamma + 1), H)
    anchors = torch.tensor([7, 11])
    ids = torch.full((requests, gamma + 1), 3)
    ids[:, 0] = anchors
    rows = [request * (gamma + 1) + 1 + place for request in range(requests) for place in range(gamma)]
    predicted: list[tuple[int, int, list[int], int]] = []
    inner = SimpleNamespace(sequential_head=head)
    speculator = SimpleNamespace(
        model=SimpleNamespace(model=inner, compute_logits=lambda hidden: hidden @ matrix.T),
        num_speculative_steps=gamma,
        sample_indices=torch.tensor([*rows, 0, 0]),
        sample_pos=torch.arange(requests * gamma + 2),
        sample_idx_mapping=torch.tensor([0] * gamma + [1] * gamma + [-1] * 2),
        sample_col=torch.arange(gamma).repeat(4),
        input_buffers=SimpleNamespace(input_ids=torch.cat([ids.flatten(), torch.zeros(5, dtype=torch.int64)])),
        draft_logits=None,
        draft_tokens=torch.zeros(4, gamma, dtype=torch.int64),
        _run_model=lambda tokens: states,
        _maybe_predict_acceptance=lambda logits, slots, column: predicted.append(
            (column.dim(), int(column), slots.tolist(), len(logits))
        ),
    )
    generate_draft(speculator, pytest.fail, requests, len(states))
    hidden = states[rows].view(requests, gamma, H)
    previous = torch.cat([anchors[:, None], speculator.draft_tokens[:requests, :-1]], dim=1)
    expected = (hidden @ matrix.T + head(hidden, previous)).argmax(-1)
    assert torch.equal(speculator.draft_tokens[:requests], expected)
    assert not torch.equal(expected, (hidden @ matrix.T).argmax(-1))
    assert predicted == [(0, place, [0, 1], requests) for place in range(gamma)]
    del speculator._maybe_predict_acceptance
    with pytest.raises(
        ValueError, match=r"sequential head: expected vLLM 0\.30 or later on this device, got .*; upgrade"
    ):
        generate_draft(speculator, pytest.fail, requests, len(states))
    inner.sequential_head = None
    asked: list[int] = []
    generate_draft(speculator, lambda _self, *given: asked.extend(given), requests, len(states))
    assert asked == [requests, len(states)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM's proposer drew, and from what (see drawn_probe.py)."""
    folder = make_sequential(tmp_path_factory.mktemp("drawn") / "drafter")
    out = folder.parent / "drawn.json"
    run_program("drawn_probe.py", str(TOY), str(folder), str(out))
    return {"drafter": folder, **json.loads(out.read_text())}


@pytest.mark.vllm
def test_verification_is_told_what_the_drafts_were_drawn_from(drawn: dict[str, Any]) -> None:
    """Every place's distribution is that of plain PyTorch, given the places drawn before it, at each temperature."""
    from transformers import LagunaForCausalLM

    from laguna_serve.scripts.checkpoints.drafters.dflash import LagunaDrafter, TapReader

    teacher = LagunaForCausalLM.from_pretrained(TOY / "teacher", dtype=torch.float32).eval()
    drafter = LagunaDrafter.load(drawn["drafter"])
    taps = TapReader(teacher, drafter.shape.target_layer_ids)
    blocks = 0
    for block in drawn["blocks"]:
        context, drafts, temperature = block["context"], block["drafts"], block["temperature"]
        with torch.no_grad():
            teacher.model(input_ids=torch.tensor([context]))
            hidden = drafter.draft(context[-1], taps.read()[0][:-1], len(drafts), teacher.model.embed_tokens.weight)
            logits = drafter.logits(hidden, teacher.lm_head.weight)
            logits = drafter.condition(logits, hidden, torch.tensor([context[-1], *drafts[:-1]]))
        expected = (logits / temperature).softmax(-1)
        told = torch.tensor(block["told"])  # of the drafted tokens
        torch.testing.assert_close(told, expected.gather(-1, torch.tensor(drafts)[:, None])[:, 0], rtol=2e-3, atol=1e-5)
        blocks += 1
    assert blocks > 30
    assert len({block["temperature"] for block in drawn["blocks"]}) == 2


@pytest.mark.vllm
def test_drafts_are_drawn_from_it(drawn: dict[str, Any]) -> None:
    """Many blocks of one context: each draft's share, and that of what follows it, are its probabilities."""
    for place in drawn["places"]:
        # Five standard errors, of shares of which most are near zero.
        shares, expected, count = torch.tensor(place["shares"]), torch.tensor(place["expected"]), place["count"]
        error = (expected * (1 - expected) / count).sqrt()
        assert ((shares - expected).abs() <= 5 * error + 5 / count).all()
    assert len(drawn["places"]) == 3


@pytest.mark.vllm
def test_drafts_that_a_grammar_may_cut_are_the_likeliest(drawn: dict[str, Any]) -> None:
    """vLLM draws what stands behind a cut from the target alone: exact for likeliest drafts, for drawn ones not."""
    cut, free = ([block for block in drawn["grammar"] if block["grammar"] is grammar] for grammar in (True, False))
    assert min(len(cut), len(free)) > 4
    assert all(block["drafted"] == block["largest"] == block["sums"] == [1.0] * 5 for block in cut)
    assert any(max(block["largest"]) < 0.9 for block in free)
    assert any(block["drafted"] != block["largest"] for block in free)
    for block in free:
        assert block["sums"] == pytest.approx([1] * 5, abs=1e-4)


@pytest.mark.vllm
def test_a_drafter_with_a_head_takes_new_weights(run_model: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first, second = make_sequential(tmp_path / "first"), make_sequential(tmp_path / "second", seed=1)
    settings = {"prompts": 8, "speculative_config": speculate(first)}
    updates = [{"folder": str(folder), "draft": True} for folder in (second, TOY / "dflash", first)]
    report = run_model(TOY / "teacher", **settings, updates=updates)
    fresh = run_model(TOY / "teacher", **settings | {"speculative_config": speculate(second)}, updates=[{"folder": ""}])
    changed, without, restored = report["updates"]
    assert changed["refused"] is restored["refused"] is None
    assert "expected finite values for all of model.sequential_head" in without["refused"]
    assert {tuple(map(tuple, update["tokens"])) for update in report["updates"]} == {
        tuple(map(tuple, report["tokens"]))
    }
    before, with_second, still_second, again = report["accepted"]
    assert with_second == still_second == fresh["accepted"][0] != before
    assert again == before


def speculate(drafter: Path) -> dict[str, Any]:
    return {"method": "dflash", "model": str(drafter), "num_speculative_tokens": 7}
