"""The cache of a teacher's answers: what is asked, what is measured of it, what is left out, and going on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from mock_engine.server import MockServer

from laguna_serve.scripts.dante.asking import Said, find_outcome, measure_consistency, measure_entropy, score_records
from laguna_serve.scripts.dante.cache import CacheConfig, main, make_cache
from laguna_serve.scripts.dante.overlap import list_grams
from laguna_serve.scripts.training.dante.records import CacheError, read_cache, read_prompts
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.kit.flags import FlagError
from laguna_serve.serving.kit.run_dir import RunDirError

PROBLEM = "write a function that returns the sum of all even numbers in a list of integers please"


class Teacher(MockServer):
    """Answers with the prompt's words; greedy answers have log-probabilities. `breaks`: the request that fails."""

    def __init__(self, *, silent: bool = False, breaks: int | None = None, name: str = "sage") -> None:
        super().__init__()
        self._name = name
        self.bodies: list[dict[str, Any]] = []
        self._silent, self._breaks = silent, breaks

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self._models),
            web.post("/v1/completions", self._complete),
            web.post("/v1/chat/completions", self._chat),
        ]

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self._name, "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.Response:
        body = await self._take(request)
        text = f"{body['prompt']} = {body['seed'] if body['temperature'] else 4}"
        step = {"a": math.log(0.5), "b": math.log(0.25)}
        logprobs = {"top_logprobs": [step, {"a": 0.0}]} if "logprobs" in body and not self._silent else None
        return self._say({"text": "" if "say nothing" in text else text, "logprobs": logprobs}, body)

    async def _chat(self, request: web.Request) -> web.Response:
        body = await self._take(request)
        tops = [{"token": "a", "logprob": math.log(0.5)}, {"token": "b", "logprob": math.log(0.5)}]
        content = [{"token": "a", "logprob": tops[0]["logprob"], "top_logprobs": tops}]
        said = {"message": {"role": "assistant", "content": "the answer is 7"}}
        return self._say({**said, "logprobs": {"content": content} if body.get("logprobs") else None}, body)

    async def _take(self, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        if self._breaks is not None and len(self.bodies) > self._breaks:
            raise web.HTTPForbidden(text="no more")
        if "too long" in json.dumps(body):
            raise web.HTTPBadRequest(text="longer than the context")
        return body

    def _say(self, choice: dict[str, Any], body: dict[str, Any]) -> web.Response:
        cut = "length" if body["max_tokens"] == 1 else "stop"
        answer = {"id": "1", "object": "x", "created": 1, "model": "sage"}
        choices = [{"index": 0, "finish_reason": cut, **choice}]
        return web.json_response({**answer, "choices": choices}, headers={"X-Weight-Version": "3"})


def write_prompts(folder: Path, *prompts: Any) -> Path:
    path = folder / "prompts.jsonl"
    lines = [{"prompt": one} if isinstance(one, str) else {"messages": one} for one in prompts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(tmp_path: Path) -> CacheConfig:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"id": 1, "text": {"question": PROBLEM}}) + "\n")
    prompts = write_prompts(tmp_path, "one", [{"role": "user", "content": "two?"}], "one", f"Oh: {PROBLEM.upper()}!")
    return CacheConfig(
        prompts=prompts, endpoint="", out=tmp_path / "out", samples=2, max_tokens=9, evaluations=(problems,)
    )


def test_records_hold_what_the_teacher_said(config: CacheConfig) -> None:
    with Teacher() as teacher:
        result = make_cache(replace(config, endpoint=teacher.url))
    assert (result.prompts, result.duplicates, result.contaminated_prompts, result.records) == (4, 1, 1, 2)
    text, chat = read_cache(config.out)
    assert (text.prompt, text.teacher_text, text.teacher, text.weight_version) == ("one", "one = 4", "sage", "3")
    assert chat.prompt == ({"role": "user", "content": "two?"},)
    # 0.5, 0.25 and a tail of 0.25, then a sure token.
    lumped = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / 2
    assert (text.output_entropy, text.tail_mass, text.top_k) == (pytest.approx(lumped, abs=1e-6), 0.125, 1)
    assert (chat.output_entropy, chat.tail_mass) == (pytest.approx(math.log(2), abs=1e-6), 0.0)
    # Samples of the text have other numbers; those of the chat the same.
    assert (text.self_consistency, chat.self_consistency) == (0.0, 1.0)
    assert (text.difficulty_score, chat.difficulty_score) == (0.5, 0.5)
    assert {body["max_tokens"] for body in teacher.bodies} == {9}
    greedy = [body for body in teacher.bodies if body["temperature"] == 0]
    assert sorted(body["logprobs"] for body in greedy) == [True, 20]
    assert next(body["top_logprobs"] for body in greedy if "messages" in body) == 20
    assert all("logprobs" not in body for body in teacher.bodies if body["temperature"])
    assert len({body["seed"] for body in teacher.bodies}) == 6
    assert (config.out / "cache.png").stat().st_size > 1000
    assert sum(result.counts) == 2


@pytest.mark.slow
def test_same_command_asks_for_what_is_missing_alone(config: CacheConfig, tmp_path: Path) -> None:
    single = replace(config, concurrency=1)
    with Teacher(breaks=3) as teacher, pytest.raises(EndpointError, match=r"no more.*; what was asked begins"):
        make_cache(replace(single, endpoint=teacher.url))
    with Teacher() as teacher:
        make_cache(replace(single, endpoint=teacher.url))
        assert len(teacher.bodies) == 3, "the first prompt's three answers were kept"
        more = write_prompts(tmp_path, "three", "one")
        make_cache(replace(single, endpoint=teacher.url, prompts=more, shard=1))
        assert len(teacher.bodies) == 6
    assert [record.prompt for record in read_cache(config.out)] == ["three", "one"], "in the prompts' order"
    assert len(list(config.out.glob("shard-*"))) == 2
    with Teacher() as teacher, pytest.raises(RunDirError, match="another one's"):
        make_cache(replace(single, endpoint=teacher.url, max_tokens=8))


def test_prompts_that_the_teacher_refuses_are_left_out(
    config: CacheConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Teacher() as teacher:
        some = replace(config, endpoint=teacher.url, prompts=write_prompts(tmp_path, "one", "too long", "three"))
        result = make_cache(some)
        assert (result.prompts, result.empty, result.records) == (3, 1, 2)
        assert [record.prompt for record in read_cache(config.out)] == ["one", "three"]
        said = capsys.readouterr().err
        assert "1 of 3 prompts were refused, and are left out: " in said
        assert "longer than the context" in said
        assert make_cache(some).empty == 1
        none = replace(some, prompts=write_prompts(tmp_path, "too long", "far too long"), out=tmp_path / "none")
        with pytest.raises(EndpointError, match="longer than the context"):
            make_cache(none)


def test_another_teacher_does_not_go_on_with_a_cache(config: CacheConfig, tmp_path: Path) -> None:
    with Teacher() as teacher:
        make_cache(replace(config, endpoint=teacher.url))
    more = replace(config, prompts=write_prompts(tmp_path, "one", "three"))
    with Teacher(name="other") as teacher, pytest.raises(EndpointError, match=r"expected sage, whose .* got other"):
        make_cache(replace(more, endpoint=teacher.url))
    assert not teacher.bodies


def test_answers_that_overlap_or_are_empty_are_left_out(config: CacheConfig, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "say nothing", "fine")
    problems = tmp_path / "answers.jsonl"
    with Teacher() as teacher:
        result = make_cache(replace(config, endpoint=teacher.url, prompts=prompts, max_tokens=1))
        assert (result.empty, result.records, result.cut_off) == (1, 1, 1)
        problems.write_text(json.dumps("fine 4 " * 20) + "\n")
        long = write_prompts(tmp_path, "4 fine " * 6)  # 12 words, to which the answer adds a 4
        changed = replace(config, endpoint=teacher.url, prompts=long, evaluations=(problems,), out=tmp_path / "other")
        with pytest.raises(CacheError, match="got none of 1 prompts, 1 of them different and clean, 1 with an answer"):
            make_cache(changed)


def test_endpoint_without_log_probabilities_is_refused(config: CacheConfig) -> None:
    with Teacher(silent=True) as teacher, pytest.raises(EndpointError, match="expected log-probabilities"):
        make_cache(replace(config, endpoint=teacher.url))


def test_openai_only_sends_no_fields_of_vllm(config: CacheConfig) -> None:
    with Teacher() as teacher:
        make_cache(replace(config, endpoint=teacher.url, openai_only=True))
    assert all("min_p" not in body for body in teacher.bodies)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got an empty file"),
        ("no json", 'expected an object with "prompt"'),
        ('{"prompt": 3}', 'expected an object with "prompt"'),
        ('{"messages": []}', 'expected an object with "prompt"'),
        ("[1]", 'expected an object with "prompt"'),
    ],
)
def test_bad_prompts_name_the_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(CacheError, match=says) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}{':1' if text else ''}: ")


def test_mark_of_the_encoding_is_no_part_of_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    plain = read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.jsonl") == plain


def test_bad_files_and_flags(config: CacheConfig, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="got none"):
        read_cache(tmp_path)
    (tmp_path / "shard-00000.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(CacheError, match="jsonl:1: expected a record"):
        read_cache(tmp_path)
    with pytest.raises(CacheError, match="--evaluations"):
        make_cache(replace(config, evaluations=(tmp_path / "none.jsonl",)))
    with pytest.raises(FlagError, match="--temperature"):
        replace(config, temperature=0.0)


def test_command_ends_in_a_line(config: CacheConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with Teacher() as teacher:
        problems = ["--evaluations", str(config.evaluations[0])]
        given = [str(config.prompts), "--endpoint", teacher.url, "--out", str(config.out), *problems]
        assert main(given) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["schema"] == "laguna_serve.dante_cache/1"
    assert any("output entropy" in row for row in table)


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=12), st.integers(1, 11))
def test_lumping_never_raises_the_entropy(masses: list[float], kept: int) -> None:
    """And with nothing lumped it is the entropy itself."""
    total = sum(masses)
    probabilities = sorted((mass / total for mass in masses), reverse=True)
    exact = -sum(p * math.log(p) for p in probabilities)
    entropy, tail = measure_entropy([[math.log(p) for p in probabilities[:kept]]])
    assert entropy <= exact + 1e-9
    assert tail == pytest.approx(max(0.0, 1 - sum(probabilities[:kept])), abs=1e-9)
    assert measure_entropy([[math.log(p) for p in probabilities]])[0] == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (r"so \boxed{1} and then \boxed{42}.", "42"),
        ("long\nthoughts\n#### 72", "72"),
        ("Thus the answer is 5.", "5"),
        ("\n\n  def f(x):\n    return x", "def f(x):"),
        ("", ""),
    ],
)
def test_what_answers_come_to(text: str, outcome: str) -> None:
    assert find_outcome(text) == outcome


def test_consistency_is_the_share_that_agrees() -> None:
    assert measure_consistency("#### 3", ["so #### 3", "#### 4", "answer: 3", "3"]) == 0.75
    assert measure_consistency("x", []) == 1.0


def test_difficulty_is_rank_and_disagreement() -> None:
    usual = {"prompt": "p", "finish_reason": "stop", "tail_mass": 0.0, "top_k": 1, "teacher": "t"}
    said = [
        Said(text="a", entropy=entropy, samples=(sample,), weight_version=None, **usual)  # type: ignore[arg-type]
        for entropy, sample in [(3.0, "b"), (1.0, "a"), (2.0, "b")]
    ]
    assert [record.difficulty_score for record in score_records(said)] == [1.0, 0.0, 0.75]


def test_overlap_is_of_thirteen_words_in_a_row() -> None:
    words = PROBLEM.split()
    assert len(list_grams(" ".join(words[:13]))) == 1
    assert not list_grams(" ".join(words[:12]))
    assert not list_grams(PROBLEM).isdisjoint(list_grams("so, " + ", ".join(words[2:15])))
    assert list_grams(PROBLEM).isdisjoint(list_grams(" and ".join(words)))
