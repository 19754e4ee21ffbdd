"""certify.py --check: where a certificate applies, and the identity that says so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.bench import certify
from laguna_serve.bench.arms.options import make_spec
from laguna_serve.bench.certificate import identity
from laguna_serve.bench.certificate.check import EXAMPLES, compare
from laguna_serve.bench.certificate.identity import NOT_HERE, list_variables, make_identity
from laguna_serve.bench.certificate.result import Certificate
from laguna_serve.bench.certificate.subject import digest_lasting, find_identity
from laguna_serve.serving.kit.environment import Environment, read_environment
from laguna_serve.serving.kit.results import read_result, write_result

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy"
OLD = ROOT / "bench" / "results" / "toy-certificate-cpu" / "certificate.json"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    shutil.copytree(TOY / "dflash", models / "dflash")
    (models / "teacher").mkdir()
    shutil.copyfile(TOY / "teacher" / "config.json", models / "teacher" / "config.json")
    (models / "teacher" / "model.safetensors").write_bytes(b"teacher")
    return models


@pytest.fixture
def certificate(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An old certificate, given the identity of this machine (with AVX2 held by nothing) and of these models."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    path = tmp_path / "c" / "certificate.json"
    path.parent.mkdir()
    write(path, models)
    return path


def write(path: Path, models: Path, **changes: Any) -> None:
    settings: dict[str, Any] = {"model": str(models / "teacher"), "draft": str(models / "dflash")} | changes
    config = certify.CertifyConfig(prompts=TOY / "prompts.jsonl", out=path.parent, **settings)
    specs = {name: make_spec(config, name) for name in ("baseline", "candidate")}
    found = find_identity(config, specs, read_environment(["certify.py"]))
    result = read_result(OLD, Certificate)
    result = Certificate(**{name: getattr(result, name) for name in result.__struct_fields__} | {"identity": found})
    write_result(path, result)


@pytest.fixture
def check(certificate: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_check(*more: str, file: Path = certificate) -> tuple[int, list[str]]:
        status = certify.main(["--check", str(file), *more])
        captured = capsys.readouterr()
        return status, (captured.out + captured.err).splitlines()

    return run_check


def test_run_that_fetches_its_models_first_goes_on_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, threads by their size and a drafter's γ are known then; nothing else may be another."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = {"weights, target": "not on this machine", "threads": "not on this machine", "γ": "the drafter's most"}
    after = {"weights, target": "0" * 64, "threads": "2", "γ": "7"}
    digests = {digest_lasting(make_identity({**parts, "processor": "x"}, {})) for parts in (before, after)}
    assert len(digests) == 1
    assert digest_lasting(make_identity({**after, "processor": "y"}, {})) not in digests
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert digest_lasting(make_identity({**after, "processor": "x"}, {})) not in digests


def test_it_applies_where_it_was_made(check: Any, certificate: Path) -> None:
    for file in (certificate, certificate.parent):
        status, lines = check(file=file)
        assert status == 0
        assert lines[0].startswith("applies here: identical (identity ")
    line = json.loads(lines[-1])
    assert (line["schema"], line["applies"]) == ("laguna_serve.certificate_check/1", True)
    assert line["expected"] == line["got"]


def test_same_weights_in_another_folder_apply(check: Any, models: Path) -> None:
    models.rename(models.with_name("moved"))
    moved = models.with_name("moved")
    assert check("--model", str(moved / "teacher"), "--draft", str(moved / "dflash"))[0] == 0


def test_weights_that_are_not_here_leave_it_open(check: Any, models: Path) -> None:
    shutil.rmtree(models / "dflash")
    status, lines = check()
    assert status == 2
    assert lines[0] == "not known whether it applies here"
    assert any("weights, drafter" in line and "--draft" in line for line in lines)


def test_certificate_that_names_no_target_is_no_traceback(
    check: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    result = json.loads(certificate.read_text())
    del result["identity"]["models"]["target"]
    certificate.write_text(json.dumps(result))
    status, lines = check()
    assert status == 1
    assert any("threads: expected 2, got not on this machine" in line for line in lines)


def test_threads_for_a_target_that_is_not_here_are_not_known(
    check: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large target may get another number of them than a small one."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    shutil.rmtree(models / "teacher")
    status, lines = check()
    assert status == 2
    assert "- threads: expected 2, got not on this machine; name its folder with --model or --draft" in lines


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("weights", "- weights, target: expected sha256:"),
        ("torch", "- torch's instruction set: expected AVX512, got AVX2"),
        ("variable", "- $ONEDNN_MAX_CPU_ISA: expected none, got AVX2"),
        ("threads", "- threads: expected 2, got 1"),
        ("OpenMP", "- OpenMP: expected "),
        ("version", "- torch: expected "),
        ("processor", "- processor: expected "),
        ("instructions", "- processor's instructions: expected "),
    ],
)
def test_every_part_that_differs_has_a_line(
    check: Any, change: str, line: str, models: Path, arithmetic: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = read_environment(["certify.py"])
    fields = {name: getattr(here, name) for name in here.__struct_fields__}
    if change == "weights":
        (models / "teacher" / "model.safetensors").write_bytes(b"TEACHER")
    elif change == "torch":
        arithmetic["torch's instruction set"] = "AVX2"
    elif change == "variable":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    elif change == "threads":
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    elif change == "OpenMP":
        monkeypatch.setattr(identity, "name_openmp", lambda _environment: "another")
    else:
        other = {
            "version": {"versions": here.versions | {"torch": "1.0"}},
            "processor": {"cpu": "another"},
            "instructions": {"isa": ["avx2"]},
        }[change]
        monkeypatch.setattr(certify, "read_environment", lambda _argv: Environment(**fields | other))
    status, lines = check()
    assert status == 1
    assert lines[0] == "does not apply here: 1 parts of its identity differ"
    assert lines[1].startswith(line)
    assert len([text for text in lines if text.startswith("- ")]) == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--dtype", "float32"], "- dtype: expected bfloat16, got float32"),
        (["--eager"], "- compile mode: expected compiled, got eager"),
        (["--gamma", "3"], "- γ: expected 7, got 3"),
    ],
)
def test_what_was_certified_is_held_against_flags(check: Any, flags: list[str], line: str) -> None:
    status, lines = check(*flags)
    assert (status, lines[1]) == (1, line)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"eager": True},
        {"gamma": 3},
        {"exact": "both"},
        {"prefix_caching": True},
        {"candidate_args": "--attention-backend FLASHINFER"},
        {"baseline_args": "--max-num-batched-tokens 64"},
    ],
)
def test_identity_changes_with_how_the_arms_are_set(certificate: Path, models: Path, changes: dict[str, Any]) -> None:
    before = read_result(certificate, Certificate).identity
    write(certificate, models, **changes)
    after = read_result(certificate, Certificate).identity
    assert before is not None
    assert after is not None
    assert before.sha256 != after.sha256


def test_certificate_without_an_identity_says_so(check: Any) -> None:
    status, lines = check(file=OLD)
    assert status == 2
    assert "carries no identity (made on 2026-11-21, " in lines[1]
    assert "; certify again here: python bench/certify.py --model tests/toy/teacher " in lines[1]


def test_certificate_of_the_help_has_an_identity() -> None:
    (path,) = re.findall(r"--check (bench/results/\S+)", EXAMPLES)
    assert read_result(ROOT / path, Certificate).identity is not None


def test_file_that_is_no_certificate_is_refused(check: Any, tmp_path: Path) -> None:
    status, lines = check(file=tmp_path / "none.json")
    assert status == 2
    assert "none.json: expected a result file" in lines[0]


def test_its_own_help_is_shown_as_the_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        certify.main(["--check", "--help"])
    assert ended.value.code == 0
    assert "usage: bench/certify.py --check" in capsys.readouterr().out


def test_hash_is_of_the_parts_alone() -> None:
    one = make_identity({"b": "2", "a": "1"}, {"target": "here"})
    assert one == make_identity({"a": "1", "b": "2"}, {"target": "here"})
    assert one.sha256 == make_identity({"a": "1", "b": "2"}, {"target": "there"}).sha256
    assert one.sha256 != make_identity({"a": "1", "b": NOT_HERE}, {"target": "here"}).sha256


def test_keys_and_places_are_no_part() -> None:
    environ = {"VLLM_API_KEY": "secret", "VLLM_CACHE_ROOT": "/x", "HF_TOKEN": "secret", "VLLM_CPU_ATTN_SPLIT_KV": "0"}
    assert list_variables(environ) == {"$VLLM_CPU_ATTN_SPLIT_KV": "0"}


def test_how_long_threads_wait_is_no_part_in_old_identities_either() -> None:
    assert list_variables({"KMP_BLOCKTIME": "0", "KMP_DETERMINISTIC_REDUCTION": "1"}) == {
        "$KMP_DETERMINISTIC_REDUCTION": "1"
    }
    old, here = make_identity({"torch": "2", "$KMP_BLOCKTIME": "0"}, {}), make_identity({"torch": "2"}, {})
    found = compare("identical", old, here)
    assert (found.applies, found.differing) == (True, [])


def test_torch_that_does_not_answer_is_one_line(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, str]:
        raise identity.IdentityError("expected what torch computes with, got nothing")

    monkeypatch.setattr(identity, "ask_torch", fail)
    status, lines = check()
    assert (status, len(lines)) == (2, 1)
