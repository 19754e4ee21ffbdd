"""What the server loads: dtypes, stops, schedules, proposers of every name; misfits are refused in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_llada import END, END_OF_TURN, write_llada

from laguna_serve.plugins.diffusion.checkpoint import read_config
from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Evenly, PerStep, Reference, Threshold
from laguna_serve.plugins.diffusion.engine import room
from laguna_serve.plugins.diffusion.engine.room import count_token_bytes, find_logit_room
from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.model import load_model
from laguna_serve.plugins.diffusion.proposing.graph import Graph
from laguna_serve.plugins.diffusion.proposing.order import OrderModel
from laguna_serve.plugins.diffusion.proposing.prepared import GRAPHS, ORDER
from laguna_serve.plugins.diffusion.server import loading
from laguna_serve.plugins.diffusion.server.loading import choose_dtype, load, make_schedule
from laguna_serve.plugins.diffusion.server.options import PROPOSERS, parse_options
from laguna_serve.plugins.diffusion.trial import Trial
from laguna_serve.serving.engine.log import find_notes


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("draft") / "draft", error=0.02)


@pytest.fixture(scope="module")
def proposals(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as calibrate.py writes it, of nothing that was learnt."""
    folder = tmp_path_factory.mktemp("proposals")
    for name in GRAPHS.values():
        Graph(((0,), (0, 1)), (0.6, 0.4)).save(folder / name)
    OrderModel(load_model(toy).embedding.weight).save(folder / ORDER)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("name", PROPOSERS)
def test_every_proposer_changes_no_text(toy: Path, draft: Path, proposals: Path, name: str, learnt: bool) -> None:
    if PROPOSERS[name][2] and not learnt:
        return
    flags = ["--proposer", name, "--states", "2", "--cache", "dual", "--draft-policy", "always"]
    flags += ["--draft", str(draft)] if PROPOSERS[name][1] else []
    flags += ["--proposals", str(proposals)] if learnt else []
    served = load(parse_options([str(toy), *flags]))
    canvas = Canvas((7, 8, 9), 8, 8, served.mask_id)
    (run,) = served.decoder.decode([canvas])
    (plain,) = load(parse_options([str(toy), "--cache", "dual"])).decoder.decode([canvas])
    assert run.state == plain.state
    assert bool(run.proposed) == (name != "sequential"), "a draft of the target's size is never worth a pass of its own"


def test_proposals_are_by_default_what_is_there(toy: Path, draft: Path, proposals: Path) -> None:
    for flags, chosen, states in (
        ([], "chain", 0),
        (["--draft", str(draft)], "corrected", 4),
        (["--proposals", str(proposals)], "order", 4),
        (["--states", "3"], "chain", 3),
        (["--draft", str(draft), "--states", "0"], "corrected", 0),
        (["--draft", str(draft), "--draft-policy", "off"], "corrected", 0),
    ):
        options = parse_options([str(toy), *flags])
        assert (options.chosen_proposer, options.proposed_states) == (chosen, states)


@pytest.mark.parametrize(("speedup", "kept"), [(0.99, False), (1.01, True)])
def test_proposals_that_lose_are_left_out_with_the_figure(
    toy: Path,
    draft: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    speedup: float,
    kept: bool,
) -> None:
    tried = []

    def try_them(*given: object) -> Trial:
        tried.append(given)
        return Trial(speedup, 1.5)

    monkeypatch.setattr(loading, "try_speculation", try_them)
    with caplog.at_level("INFO"):
        served = load(parse_options([str(toy), "--draft", str(draft), "--cache", "dual"]))
    assert (served.decoder.speculation is not None) == kept
    assert f"Proposals (corrected): {speedup:.2f} times as fast as without, 1.50 steps per pass" in caplog.text
    assert ("left out as they lose here" in caplog.text) != kept
    load(parse_options([str(toy), "--draft", str(draft), "--draft-policy", "always"]))
    load(parse_options([str(toy), "--draft", str(draft), "--draft-policy", "off"]))
    load(parse_options([str(toy)]))
    assert len(tried) == 1


@pytest.mark.slow
def test_a_trial_is_made_where_nothing_is_stubbed(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load(parse_options([str(toy), "--states", "2", "--canvas-length", "16", "--block-length", "8"]))
    (note,) = find_notes("\n".join(f"{r.levelname} {r.name}: {r.getMessage()}" for r in caplog.records))
    assert note.startswith("Proposals (chain): ")


def test_ends_are_all_that_are_named(toy: Path, tmp_path: Path) -> None:
    assert load(parse_options([str(toy)])).stop == {END, END_OF_TURN}
    for path in toy.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 77]}))
    assert load(parse_options([str(tmp_path)])).stop == {END, END_OF_TURN, 77}


@pytest.mark.parametrize("text", ["[1]", '{"eos_token_id": {}}', '{"eos_token_id": [1.5]}', "{", "[" * 100_000])
def test_ends_that_cannot_be_read_are_refused(toy: Path, tmp_path: Path, text: str) -> None:
    for path in toy.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(DiffusionError, match=r"generation_config.json: expected .*; (check|correct) "):
        load(parse_options([str(tmp_path)]))


@pytest.mark.parametrize("text", ["[1]", "{", "7", '{"model_type": "llama"}'])
def test_dtype_of_a_folder_that_is_no_llada_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DiffusionError, match=r"config.json: expected .*; (check|choose) "):
        choose_dtype("auto", tmp_path, "cuda")


def test_dtypes_and_schedules(toy: Path) -> None:
    assert choose_dtype("auto", toy, "cpu") is torch.float32
    assert choose_dtype("auto", toy, "cuda") is torch.bfloat16
    assert choose_dtype("half", toy, "cpu") is torch.float16
    assert make_schedule(None, None, None) == PerStep(1)
    assert make_schedule(3, None, None) == PerStep(3)
    assert make_schedule(None, 4, None) == Evenly(4)
    assert make_schedule(None, None, 0.9) == Threshold(0.9)


def test_room_is_for_what_is_kept(toy: Path, draft: Path) -> None:
    """Two layers of 32 keys and as many values in fp32; with guidance twice, and the draft's beside them."""
    rooms = []
    for flags in ([], ["--guidance", "1"], ["--draft", str(draft), "--draft-policy", "always"]):
        served = load(parse_options([str(toy), "--cache", "prefix", *flags]))
        assert served.room is not None
        rooms.append(served.room)
        assert load(parse_options([str(toy), *flags])).room is None
    model = load_model(toy)
    assert count_token_bytes(Reference(cache="dual"), model) == 2 * 2 * 32 * 4
    assert count_token_bytes(Reference(cache="dual", guidance=1.0), model, model) == 2 * 2 * 2 * 2 * 32 * 4
    assert all(1.6 < rooms[0] / room < 2.4 for room in rooms[1:])
    assert load(parse_options([str(toy), "--cache", "dual", "--max-cached-tokens", "99"])).room == 99


def test_logits_of_open_blocks_need_room(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice each, and the last ones that proposals keep; a request of the server's own block is always taken."""
    monkeypatch.setattr(room, "available_bytes", lambda: 2_000_000)
    cpu = torch.device("cpu")
    assert find_logit_room(Reference(), 100, 1, cpu) == 300_000 // (3 * 400)
    assert find_logit_room(Reference(guidance=1.0), 100, 2, cpu) == 300_000 // (9 * 400)
    assert find_logit_room(Reference(), 10**9, 1, cpu) == 1
    monkeypatch.setattr(room, "available_bytes", lambda: 1)
    assert load(parse_options([str(toy), "--block-length", "16"])).open_room == 16


def test_a_block_that_leaves_no_room_for_a_prompt_is_refused_at_the_start(toy: Path) -> None:
    """Every request of the server's own block was refused instead."""
    for flags, longest in (([], 256), (["--max-model-len", "64"], 64)):
        options = parse_options([str(toy), *flags, "--block-length", "256"])
        expected = f"--block-length: expected fewer than {longest}, the longest sequence .*, got 256; lower it"
        with pytest.raises(DiffusionError, match=expected):
            load(options)


def test_what_does_not_fit_is_refused(toy: Path, draft: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffusionError, match="--max-model-len: expected at most 256"):
        load(parse_options([str(toy), "--max-model-len", "257"]))
    with pytest.raises(DiffusionError, match="expected a tokenizer"):
        load(parse_options([str(tmp_path)]))
    with pytest.raises(DiffusionError, match="expected a calibrated graph"):
        load(parse_options([str(toy), "--proposals", str(tmp_path)]))
    with pytest.raises(DiffusionError, match="--proposer order: expected --proposals beside it"):
        parse_options([str(toy), "--proposer", "order"])
    config = json.loads((draft / "config.json").read_text()) | {"mask_token_id": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).mask_token_id == 4
    with pytest.raises(DiffusionError, match="expected mask_token_id 2, as the target has, got 4"):
        load(parse_options([str(toy), "--draft", str(tmp_path)]))
