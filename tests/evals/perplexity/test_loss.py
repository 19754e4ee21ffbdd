"""loss.py: rows, weights and intervals by hand, on an endpoint of known losses.

And against transformers on a real engine, straight and through the gateway.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mock_engine import MockEngine, Settings, scoring

from laguna_serve.evals import loss
from laguna_serve.evals.perplexity.mean import average, subtract, to_bits_per_byte
from laguna_serve.evals.perplexity.rows import Row, choose_evenly, cut_rows, read_documents
from laguna_serve.evals.perplexity.scored import ScoredRows
from laguna_serve.serving.engine import Engine

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run loss.py in this process: exit status, last line, all output."""

    def run_loss(url: str, *flags: str | Path) -> tuple[int, dict[str, Any], str]:
        try:
            status = loss.main(["--base-url", url, "--out", str(tmp_path / "out"), *map(str, flags)])
        except SystemExit as error:
            status = int(str(error.code))
        captured = capsys.readouterr()
        lines = captured.out.strip().splitlines()
        return status, json.loads(lines[-1]) if lines else {}, captured.out + captured.err

    return run_loss


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save an array, or a text, under a name."""

    def save_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, str):
            path.write_bytes(content.encode())
        else:
            np.save(path, np.asarray(content))
        return path

    return save_file


def test_every_token_weighs_the_same(run: Run, save: Callable[..., Path], tmp_path: Path) -> None:
    array = save("a.npy", [[0, 10, 20, 30], [0, 40, 50, 0], [0, 0, 0, 0]])
    with MockEngine(scoring()) as fake:
        status, result, output = run(fake.url, "--tokens", array, "--pad-id", "0")
    assert status == 0
    assert sorted(fake.seen[1:]) == [[10, 20, 30], [40, 50]]  # the first request asks about the vocabulary
    assert result["data"]["scored_tokens"] == 3
    assert result["loss"]["nats_per_token"] == pytest.approx((0.2 + 0.3 + 0.5) / 3)  # not (0.25 + 0.5) ÷ 2
    assert result["perplexity"]["value"] == pytest.approx(math.exp(1 / 3))
    assert result["bits_per_byte"] is None
    assert result["loss"]["ci95"] is result["perplexity"]["ci95"] is None  # of two rows
    assert "2 rows, so no interval: it needs 8 of them at least." in output
    assert "0.3333" in output
    stored = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert stored == result
    assert "| perplexity | 1.3956 |" in (tmp_path / "out" / "loss.md").read_text()


def test_text_is_cut_by_the_endpoints_tokens(run: Run, save: Callable[..., Path]) -> None:
    text = save("a.txt", "abc\r\né")  # tokens 1 97 98 99 13 10 233, bytes 7
    with MockEngine(scoring()) as fake:
        status, result, _ = run(f"{fake.url}/v1/", "--text", text, "--length", "3")
    assert status == 0
    assert sorted(fake.seen) == [[1, 97, 98], [99, 13, 10]]  # 233 alone has nothing before it
    mean = (0.97 + 0.98 + 0.13 + 0.10) / 4
    assert result["loss"]["nats_per_token"] == pytest.approx(mean)
    assert (result["data"]["text_tokens"], result["data"]["text_bytes"]) == (6, 7)
    assert result["bits_per_byte"]["value"] == pytest.approx(6 / 7 * mean / math.log(2))


def test_overlapping_rows_score_every_token_once(run: Run, save: Callable[..., Path]) -> None:
    text = save("a.txt", "abcdé")
    with MockEngine(scoring()) as fake:
        status, result, _ = run(fake.url, "--text", text, "--length", "4", "--stride", "2")
    assert status == 0
    assert sorted(fake.seen) == [[1, 97, 98, 99], [98, 99, 100, 233]]
    assert result["loss"]["nats_per_token"] == pytest.approx((0.97 + 0.98 + 0.99 + 1.00 + 2.33) / 5)


@pytest.mark.parametrize(("count", "length", "stride"), [(1, 4, 2), (5, 4, 3), (23, 7, 1), (24, 6, 5), (9, 50, 3)])
def test_cut_covers_a_document(count: int, length: int, stride: int) -> None:
    rows = cut_rows(0, range(count), length, stride)
    scored = [token for row in rows for token in row.tokens[row.first :]]
    assert scored == list(range(1, count))
    assert all(len(row.tokens) <= length for row in rows)
    assert all(row.first >= length - stride for row in rows[1:])


def test_long_default_rows_fit_the_endpoint(run: Run, save: Callable[..., Path]) -> None:
    with MockEngine(scoring(max_model_len=20, listed_length=False)) as fake:
        status, result, _ = run(fake.url, "--text", save("a.txt", "x" * 100))
    assert (status, result["data"]["length"], result["data"]["rows"]) == (0, 19, 6)
    assert result["endpoint"] == {"model": "fake", "root": None, "max_model_len": 20}


def test_documents_do_not_share_rows(run: Run, save: Callable[..., Path]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("ab\u2028c", "de"))
    with MockEngine(scoring(vocabulary=10_000)) as fake:
        status, result, _ = run(fake.url, "--text", save("a.jsonl", lines))
    assert (status, result["data"]["documents"]) == (0, 2)
    assert sorted(fake.seen) == [[1, 97, 98, 0x2028, 99], [1, 100, 101]]


def test_some_rows_evenly_spaced() -> None:
    rows = [Row(number, (1, 2)) for number in range(10)]
    assert [row.document for row in choose_evenly(rows, 4)] == [0, 2, 5, 7]
    assert choose_evenly(rows, None) == choose_evenly(rows, 99) == rows


def test_interval_draws_documents_where_there_are_ten() -> None:
    few = [Row(number // 2, (1, 2)) for number in range(18)]
    many = [Row(number // 2, (1, 2)) for number in range(20)]
    alternating = {number: float(number % 2) for number in range(20)}
    assert (average(few, alternating).drawn, average(few, alternating).units) == ("rows", 18)
    by_document = average(many, alternating)  # every document has a row of 0 and one of 1
    assert by_document == average(many, alternating)
    assert (by_document.drawn, by_document.units, by_document.ci95) == ("documents", 10, (0.5, 0.5))
    assert average(many[:1], alternating).ci95 is None


def test_a_handful_carries_no_interval() -> None:
    """One of 95% over three to seven rows covered 50 to 80%."""
    rows = [Row(number, (1, 2)) for number in range(8)]
    nats = {number: float(number) for number in range(8)}
    assert average(rows[:7], nats).ci95 is None
    low, high = average(rows, nats).ci95 or (0.0, 0.0)
    assert 0 < low < 3.5 < high < 7


def test_difference_is_paired() -> None:
    rows = [Row(number, (1, 2, 3)) for number in range(12)]
    base = {number: 10.0 * number for number in range(12)}
    delta = subtract(rows, {number: nats + 0.5 for number, nats in base.items()}, base)
    assert delta.nats_per_token == pytest.approx(0.25)
    assert delta.ci95 == pytest.approx((0.25, 0.25))  # the rows differ, the models do so everywhere alike


def test_bits_per_byte() -> None:
    assert to_bits_per_byte(math.log(2), 50, 100) == pytest.approx(0.5)


def test_same_command_continues(run: Run, save: Callable[..., Path], tmp_path: Path) -> None:
    array = save("a.npy", np.arange(2, 62).reshape(12, 5))
    with MockEngine(scoring(die_after=6)) as fake:
        status, _, output = run(fake.url, "--tokens", array, "--concurrency", "1")
    assert status == 2
    assert "HTTP 503" in output
    assert "Traceback" not in output
    journal = tmp_path / "out" / "rows.jsonl"
    assert len(ScoredRows(journal).nats) == 5  # one of the six asked about the vocabulary
    journal.write_text(journal.read_text() + '{"row": 5, "nats": 0.')
    with MockEngine(scoring(together=3)) as fake:
        status, result, _ = run(fake.url, "--tokens", array, "--concurrency", "3")
        assert sorted(fake.seen[1:]) == np.arange(2, 62).reshape(12, 5).tolist()[5:]
        assert fake.most == 3
    assert status == 0
    expected = np.arange(2, 62).reshape(12, 5)[:, 1:].mean() / 100
    assert result["loss"]["nats_per_token"] == pytest.approx(expected)
    assert len(journal.read_text().splitlines()) == 12


@pytest.mark.slow
def test_ctrl_c_ends_in_good_order(run: Run, save: Callable[..., Path], tmp_path: Path) -> None:
    array, journal = save("a.npy", np.full((3000, 3), 5)), tmp_path / "out" / "rows.jsonl"
    with MockEngine(scoring()) as fake:
        flags = ["--base-url", fake.url, "--tokens", str(array), "--out", str(tmp_path / "out"), "--concurrency", "1"]
        command = [sys.executable, str(ROOT / "evals" / "loss.py"), *flags]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
            for _ in range(600):
                if journal.exists() and journal.stat().st_size:
                    break
                time.sleep(0.05)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=30)
        assert running.returncode == 130
        assert "the same command continues" in said
        assert "Traceback" not in said
        scored = len(ScoredRows(journal).nats)
        assert 0 < scored < 3000
        assert run(fake.url, "--tokens", array)[0] == 0
    assert len(journal.read_text().splitlines()) == 3000


def test_another_measurements_folder_is_refused(run: Run, save: Callable[..., Path]) -> None:
    with MockEngine(scoring()) as fake:
        assert run(fake.url, "--tokens", save("a.npy", [[1, 2, 3]]))[0] == 0
        asked = len(fake.seen)
        status, _, output = run(fake.url, "--tokens", save("b.npy", [[1, 2, 4]]))
    assert status == 2
    assert "choose another --out" in output
    assert len(fake.seen) == asked + 1  # the vocabulary; no row


def test_key_comes_from_the_environment(run: Run, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    array = save("a.npy", [[1, 2, 3]])
    with MockEngine(scoring(key="secret")) as fake:
        assert "HTTP 401" in run(fake.url, "--tokens", array)[2]
        assert "$LOSS_KEY, got nothing" in run(fake.url, "--tokens", array, "--api-key-env", "LOSS_KEY")[2]
        monkeypatch.setenv("LOSS_KEY", "secret")
        status, _, output = run(fake.url, "--tokens", array, "--api-key-env", "LOSS_KEY")
    assert status == 0
    assert "secret" not in output


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("a.npy", [[1.0, 2.0]], (), "expected integer token ids [N, L], got float64 [1, 2]"),
        ("a.npy", [1, 2], (), "expected integer token ids [N, L], got int64 [2]"),
        ("a.npy", [[1, 2], [3, -100]], (), "got -100 in row 1, column 1; name padding by --pad-id"),
        ("a.npy", [[1, 2], [3, 0]], ("--pad-id", "0"), "expected rows of at least 2 tokens, got 1 in row 1"),
        ("a.npy", [[0, 0]], ("--pad-id", "0"), "expected rows of token ids, got [1, 2] with none"),
        ("a.npy", [[1, 2, 3], [4, 1000, 6]], (), "got id 1000 in row 1, token 1: "),
        ("a.npy", [list(range(64))], (), "expected rows of at most 63 tokens"),
        ("a.npy", "no array", (), "expected a NumPy file (.npy), got one that cannot be read"),
        ("a.npy", "PK\x03\x04 half an archive", (), "expected a NumPy file (.npy), got one that cannot be read"),
        ("a.npy", [[1, 2]], ("--model", "third"), "expected model third, got fake, other"),
        ("a.npy", [[1, 2]], ("--length", "5"), "expected --text beside them"),
        ("a.txt", "", (), "expected text, got an empty file"),
        ("a.txt", "abc", ("--length", "64"), "--length: expected at most 63"),
        ("a.txt", "abc", ("--length", "8", "--stride", "9"), "--stride: expected 1 to 8"),
        ("a.txt", "abc", ("--rows", "0"), "--rows: expected at least 1, got 0"),
        ("a.txt", "abc", ("--pad-id", "0"), "expected --tokens beside it"),
        ("a.jsonl", '{"text": "a \\ud800"}\n', (), 'a.jsonl:1: expected an object with a "text" or "prompt"'),
        ("a.jsonl", '{"text": "a"}\n{"words": 1}\n', (), 'a.jsonl:2: expected an object with a "text" or "prompt"'),
    ],
)
def test_bad_input_is_refused(
    run: Run, save: Callable[..., Path], tmp_path: Path, name: str, content: Any, flags: tuple[str, ...], message: str
) -> None:
    path = save(name, content)
    with MockEngine(scoring()) as fake:
        status, _, output = run(fake.url, "--tokens" if name.endswith("npy") else "--text", path, *flags)
    assert status == 2
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert fake.seen == []
    assert not (tmp_path / "out").exists()


def test_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    assert "expected a text file, got No such file" in run("http://127.0.0.1:1", "--text", tmp_path / "a.txt")[2]
    assert "expected a NumPy file (.npy), got No such file" in run("http://127.0.0.1:1", "--tokens", tmp_path / "a")[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (scoring(losses={3: 9999.0}), "expected finite losses, got 9999 nats at token 2 of 3 (id 3)"),
        (scoring(losses={3: math.nan}), "expected finite losses, got nan nats at token 2 of 3 (id 3)"),
        (scoring(losses={3: -4.6}), "expected losses of at least 0, got -4.6 nats at token 2 of 3 (id 3); serve with"),
        (scoring(losses={2: 9990.0, 3: 9990.0}), "expected one whose perplexity is a number, got 9990 nats a token"),
        (scoring(spoil=lambda steps: steps[:-1]), "expected vLLM's answer, got another one"),
        (scoring(spoil=lambda steps: None), "expected vLLM's answer, got another one"),
        (
            scoring(spoil=lambda steps: [None, *steps[:0:-1]]),
            "expected vLLM's answer, got another one (KeyError('2'))",
        ),
    ],
)
def test_answer_that_cannot_be_right_is_refused(
    run: Run, save: Callable[..., Path], settings: Settings, message: str
) -> None:
    with MockEngine(settings) as fake:
        status, _, output = run(fake.url, "--tokens", save("a.npy", [[1, 2, 3]]), "--model", "fake")
    assert status == 2
    assert message in output


def test_nobody_there(run: Run, save: Callable[..., Path]) -> None:
    status, _, output = run("http://127.0.0.1:1", "--tokens", save("a.npy", [[1, 2, 3]]))
    assert status == 2
    assert "ClientConnectorError" in output


@pytest.fixture(scope="module")
def score() -> Callable[[Sequence[int]], Any]:
    """The losses of a row's tokens after the first, by transformers in fp32."""
    import torch
    from transformers import LagunaForCausalLM

    model = LagunaForCausalLM.from_pretrained(TOY / "teacher", dtype=torch.float32).eval()

    def score_row(tokens: Sequence[int]) -> Any:
        ids = torch.tensor([list(tokens)])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().numpy()

    return score_row


@contextmanager
def start_gateway(engine: Engine) -> Iterator[str]:
    """`laguna gateway` before an engine; its address."""
    command = [sys.executable, "-m", "laguna_serve.serving.cli", "gateway", "--upstream", engine.base_url]
    flags = ["--model", engine.model_name, "--port", "0"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as gateway:
        try:
            assert gateway.stdout is not None
            yield gateway.stdout.readline().split()[2]
        finally:
            gateway.terminate()


@pytest.mark.vllm
def test_text_agrees_with_transformers(
    fp32_engine: Engine, run: Run, save: Callable[..., Path], score: Callable[[Sequence[int]], Any]
) -> None:
    from transformers import AutoTokenizer

    text = (TOY / "prompts.jsonl").read_text()[:9000]
    status, result, _ = run(fp32_engine.base_url, "--text", save("a.txt", text), "--length", "300", "--stride", "100")
    ids = AutoTokenizer.from_pretrained(TOY / "teacher")(text)["input_ids"]
    losses = np.concatenate([score(row.tokens)[row.first - 1 :] for row in cut_rows(0, ids, 300, 100)])
    assert status == 0
    assert len(losses) == result["data"]["scored_tokens"] == len(ids) - 1
    assert result["loss"]["nats_per_token"] == pytest.approx(losses.mean(), abs=1e-3)
    bits = losses.sum() / math.log(2) / len(text.encode())
    assert result["bits_per_byte"]["value"] == pytest.approx(bits, abs=1e-3)


@pytest.mark.vllm
def test_array_agrees_with_transformers_through_a_gateway(
    fp32_engine: Engine, run: Run, save: Callable[..., Path], score: Callable[[Sequence[int]], Any], tmp_path: Path
) -> None:
    """Every row comes twice, with prefix caching on: were it read, the losses of the cached tokens would be missing."""
    once = np.random.default_rng(7).integers(8, 512, (3, 400))
    once[1, 250:] = 0
    array = save("a.npy", np.concatenate([once, once]))
    assert fp32_engine.config.prefix_caching
    with start_gateway(fp32_engine) as url:
        status, result, output = run(f"{url}/v1", "--tokens", array, "--pad-id", "0", "--concurrency", "1")
    assert status == 0, output
    losses = [score(row[row > 0].tolist()) for row in once]
    assert result["data"]["scored_tokens"] == 2 * (399 + 249 + 399)
    assert result["loss"]["nats_per_token"] == pytest.approx(np.concatenate(losses).mean(), abs=1e-3)
    nats = ScoredRows(tmp_path / "out" / "rows.jsonl").nats
    for number, row in enumerate(losses):
        assert nats[number] / len(row) == pytest.approx(row.mean(), abs=1e-3)
        assert nats[number] == pytest.approx(nats[number + 3], rel=1e-6)


@pytest.mark.vllm
def test_engine_knows_its_vocabulary(fp32_engine: Engine, run: Run, save: Callable[..., Path]) -> None:
    status, _, output = run(fp32_engine.base_url, "--tokens", save("a.npy", [[1, 2, 3], [4, 512, 6]]))
    assert status == 2
    assert "got id 512 in row 1, token 1" in output
    assert "out of vocabulary" in output


def test_mark_of_the_encoding_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n", encoding="utf-8-sig")
    assert read_documents(tmp_path / "a.txt") == ["x = 1\n"]
