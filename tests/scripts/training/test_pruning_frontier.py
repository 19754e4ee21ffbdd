"""The frontier: its statistics against explicit values, resumption, bad input, and the script from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_laguna import make_tiny, save_tiny
from warm import run_warm

from laguna_serve.plugins.pruning import PruningError
from laguna_serve.scripts.checkpoints import quantise
from laguna_serve.scripts.frontier.__main__ import FrontierConfig, measure_frontier
from laguna_serve.scripts.frontier.estimates import Contest, Rival, compare, correlate, correlate_draws, estimate, rank
from laguna_serve.scripts.frontier.losses import Meter
from laguna_serve.scripts.frontier.page import describe_contest, format_page
from laguna_serve.scripts.frontier.result import FrontierResult
from laguna_serve.serving.kit.flags import FlagError
from laguna_serve.serving.kit.results import read_result
from laguna_serve.serving.kit.run_dir import RunDirError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
MASKS = ["loss", "heapr", "output", "magnitude", "reap", "loss-atoms", "heapr-atoms", "heapr-repacked"]
MASKS += ["reap-experts", "mone", "random"]


def test_an_interval_has_the_variance_of_rows_and_of_draws() -> None:
    targets = np.full(4, 10)
    rows = np.array([[1.0, 2.0, 3.0, 4.0]])
    alone = estimate(rows, targets)
    # Mean 2.5 / 10; standard error of the mean √(5/3 / 4) / 10; t at 97.5% with 3 degrees of freedom.
    half = 3.182446 * (5 / 3 / 4) ** 0.5 / 10
    assert (alone.delta, alone.low, alone.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    # Draws that differ by a constant, rows that do not differ: t with two degrees of freedom.
    draws = estimate(np.array([[1.0] * 4, [2.0] * 4, [3.0] * 4]), targets)
    half = 4.302653 * (0.01 / 3) ** 0.5
    assert (draws.delta, draws.low, draws.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    both = estimate(np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0]]), targets)
    by_row, by_draw = 5 / 3 / 4 / 100, 0.01 / 3
    freedom = (by_row + by_draw) ** 2 / (by_row**2 / 3 + by_draw**2 / 2)
    assert 2 < freedom < 6
    assert both.high - both.delta == pytest.approx(2.6 * (by_row + by_draw) ** 0.5, rel=0.05)


def test_rows_count_by_their_tokens_and_equal_ones_have_no_interval() -> None:
    targets = np.array([10, 100, 10, 100])
    same = estimate(0.01 * targets[None].astype(float), targets)
    assert (same.delta, same.low, same.high) == pytest.approx((0.01, 0.01, 0.01))
    assert estimate(np.zeros((3, 4)), targets).high == 0


def test_ranks_of_equal_values_are_shared() -> None:
    assert rank(np.array([3.0, 1.0, 3.0, 2.0], np.float32)).tolist() == [3.5, 1.0, 3.5, 2.0]
    values = np.random.default_rng(0).random((2, 3, 4), dtype=np.float32)
    draws = [{"a": values, "b": values**3, "c": -values}, {"a": values, "b": -values, "c": -values}]
    assert correlate(draws[:1])["a"] == {"a": 1.0, "b": 1.0, "c": -1.0}
    assert correlate(draws)["a"] == {"a": 1.0, "b": 0.0, "c": -1.0}
    assert correlate_draws(draws) == {"a": 1.0, "b": -1.0, "c": 1.0}


def test_best_mask_is_named_only_where_all_rivals_are_behind() -> None:
    generator, targets = np.random.default_rng(0), np.full(40, 100)
    base = generator.normal(size=(1, 40))
    nats = {name: np.repeat(base, 3, axis=0) + generator.normal(size=(3, 40)) * 0.1 for name in "ab"}
    nats["worse"] = nats["a"] + 1 + generator.normal(size=(3, 40)) * 0.1
    contest = compare("bf16", 0.1, nats, targets)
    assert contest.rivals[-1].mask == "worse"
    assert contest.rivals[-1].delta == pytest.approx(0.01, rel=0.1)
    assert len(contest.equals) == 1
    said = describe_contest(contest)
    assert said.startswith("bf16, 10%: no winner: ")
    assert "cannot be distinguished" in said
    assert "behind it: `worse` +0.0" in said
    rival = Rival(mask="b", delta=0.02, low=0.01, high=0.03)
    won = describe_contest(Contest(format="fp8", ratio=0.4, best="a", rivals=(rival,)))
    assert won.startswith("fp8, 40%: `a` wins by +0.0200 (+0.0100 to +0.0300) over `b`")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two sparse layers with the toy's tokenizer, and token ids beside it."""
    folder = save_tiny(make_tiny(vocab_size=512), tmp_path_factory.mktemp("tiny") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOY / "teacher" / name, folder)
    generator = np.random.default_rng(0)
    np.save(folder.parent / "calibration.npy", generator.integers(5, 500, (6, 24)))
    np.save(folder.parent / "chunks.npy", generator.integers(5, 500, (3, 24)).astype(np.uint16))
    return folder


def configure(tiny: Path, out: Path, **changes: Any) -> FrontierConfig:
    settings: dict[str, Any] = {
        "model": str(tiny),
        "calibration": str(tiny.parent / "calibration.npy"),
        "calibration_tokens": 48,
        "tokens": tiny.parent / "chunks.npy",
        "block_size": 2,
        "seeds": 2,
        "out": out,
    }
    return FrontierConfig(**settings | changes)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FrontierResult, Path]:
    out = tmp_path_factory.mktemp("whole")
    return measure_frontier(configure(tiny, out)), out


def test_every_mask_is_measured_in_both_formats_at_its_bytes(whole: tuple[FrontierResult, Path]) -> None:
    result, out = whole
    assert read_result(out / "frontier.json", FrontierResult) == result
    assert (result.text.rows, result.text.targets) == (3, 69), "all of chunks.npy"
    assert (result.calibration.rows, result.calibration.available) == (2, 6)
    plain, fp8 = result.formats
    assert (plain.format, fp8.format) == ("f32", "fp8")
    assert (plain.rounding.delta, plain.rounding.high) == (0, 0)
    assert fp8.rounding.delta == pytest.approx(fp8.loss - plain.loss)
    assert fp8.rounding.low < fp8.rounding.delta < fp8.rounding.high
    atoms, H = 2 * 4 * 8, 16
    # Each atom has three vectors: of four bytes a value, or of one, and a scale of two bytes for them each.
    assert plain.bytes - fp8.bytes == atoms * 3 * (4 * H - H - 2)
    for stored, left in ((plain, 4 * 3 * H), (fp8, 3 * (H + 2))):
        points = [point for point in result.points if point.format == stored.format]
        listed = MASKS if stored is plain else [mask for mask in MASKS if mask != "heapr-repacked"]
        assert [point.mask for point in points] == listed * 3
        for point in points:
            assert len(point.draws) == 2
            assert point.low <= point.delta <= point.high
            if point.mask in ("reap-experts", "mone"):  # of 8 experts
                gone = {0.1: 0, 0.25: 2, 0.4: 3}[point.ratio]
                constants = 2 * H * gone if point.mask == "mone" else 0
                assert stored.bytes - point.bytes == gone * 8 * left - constants
            elif not point.mask.endswith("-atoms"):  # of 32 groups
                assert stored.bytes - point.bytes == int(32 * point.ratio) * 2 * left
    magnitude = next(point for point in result.points if point.mask == "magnitude" and point.ratio == 0.4)
    assert magnitude.draws[0] == magnitude.draws[1], "it reads no text"
    assert "| heapr-atoms |" in format_page(result)
    assert (out / "frontier.png").stat().st_size > 10_000


def test_equal_masks_are_measured_once(whole: tuple[FrontierResult, Path]) -> None:
    lines = [json.loads(line) for line in (whole[1] / "work" / "losses.jsonl").read_text().splitlines()]
    keys = [(line["format"], line["digest"]) for line in lines]
    assert len(set(keys)) == len(keys)
    # 11 masks, 3 shares, 2 draws, and of one format no repacked ones; magnitude's are the same for both draws.
    assert len(keys) <= 2 * (11 * 3 * 2 + 1) - 6 - 6


def test_interrupted_measurement_goes_on_to_the_same_result(
    whole: tuple[FrontierResult, Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    measure = Meter._measure

    def stop_at(limit: int) -> None:
        def count(meter: Meter, model: Any, label: str) -> Any:
            if len(measured) == limit:
                raise KeyboardInterrupt
            measured.append(label)
            return measure(meter, model, label)

        monkeypatch.setattr(Meter, "_measure", count)

    config = configure(tiny, tmp_path)
    for limit in (5, 40):
        stop_at(limit)
        with pytest.raises(KeyboardInterrupt):
            measure_frontier(config)
    stop_at(-1)
    result = measure_frontier(config)
    assert result.points == whole[0].points
    assert result.contests == whole[0].contests
    lines = (whole[1] / "work" / "losses.jsonl").read_text().splitlines()
    assert len(measured) == len(lines), "nothing twice"
    measure_frontier(config)
    assert len(measured) == len(lines), "nothing again"


def test_more_draws_are_added_to_those_that_are_there(
    whole: tuple[FrontierResult, Path], tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole[1], tmp_path / "more")
    result = measure_frontier(configure(tiny, tmp_path / "more", seeds=3))
    for before, after in zip(whole[0].points, result.points, strict=True):
        assert after.draws[:2] == before.draws
        assert len(after.draws) == 3


def test_other_settings_are_refused_in_the_same_folder(whole: tuple[FrontierResult, Path], tiny: Path) -> None:
    for changes in ({"block_size": 4}, {"calibration_tokens": 24}, {"tokens": tiny.parent / "calibration.npy"}):
        with pytest.raises(RunDirError, match="expected the parts of this measurement, got another one's"):
            measure_frontier(configure(tiny, whole[1], **changes))


def test_unfit_input_is_refused(tiny: Path, tmp_path: Path) -> None:
    flat, foreign = tmp_path / "flat.npy", tmp_path / "foreign.npy"
    np.save(flat, np.arange(100))
    np.save(foreign, np.full((2, 32), 70_000))
    for path, message in (
        (flat, r"expected integers \[rows, tokens\], got int64 \[100\]"),
        (foreign, "expected token ids below 512"),
        (tmp_path / "none.npy", "expected a NumPy file, got none"),
    ):
        with pytest.raises(PruningError, match=message):
            measure_frontier(configure(tiny, tmp_path / "out", tokens=path))
    with pytest.raises(PruningError, match="expected more than 6 rows, so that 2 draws differ"):
        measure_frontier(configure(tiny, tmp_path / "all", calibration_tokens=1000))
    with pytest.raises(PruningError, match="expected a text file"):
        measure_frontier(configure(tiny, tmp_path / "all", calibration=str(tmp_path / "none.txt")))
    assert not (tmp_path / "all").exists(), "the right flags would be refused there as another measurement's"
    with pytest.raises(FlagError, match="--tokens: expected a number beside --text"):
        configure(tiny, tmp_path, text="held-out.jsonl")
    with pytest.raises(FlagError, match="--tokens: expected at least 1, got 0"):
        configure(tiny, tmp_path, tokens=0)


def test_script_says_who_wins(tiny: Path, tmp_path: Path) -> None:
    files = ["--model", str(tiny), "--block-size", "4", "--tokens", str(tiny.parent / "chunks.npy")]
    flags = ["--calibration", str(tiny.parent / "calibration.npy"), "--seeds", "1", "--out", str(tmp_path)]
    done = run_warm("laguna_serve.scripts.frontier", *files, *flags)
    assert done.returncode == 0, done.stderr
    assert "f32, 40%: " in done.stdout
    assert "s left" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["schema"] == "laguna_serve.pruning_frontier/2"


def test_fp8_base_is_pruned_as_it_is_stored(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantise.main([str(tiny), "--to", "fp8", "--out", str(tmp_path / "fp8")]) == 0
    capsys.readouterr()
    files = {"calibration": str(tiny.parent / "calibration.npy"), "tokens": tiny.parent / "chunks.npy"}
    result = measure_frontier(configure(tmp_path / "fp8", tmp_path / "out", **files, seeds=1))
    assert [stored.format for stored in result.formats] == ["fp8"]
    assert [point.mask for point in result.points] == MASKS * 3
    removed = next(point for point in result.points if (point.mask, point.ratio) == ("loss", 0.25))
    # 8 groups of 2 atoms, three vectors of each, every one with a scale of two bytes.
    assert result.formats[0].bytes - removed.bytes == 8 * 2 * 3 * (16 + 2)
