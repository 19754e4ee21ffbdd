"""Model cards: front matter that a hub reads, somebody's own card stays, and a licence comes from the base's."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from msgspec import structs

from laguna_serve.scripts.training.card import MARK, Card, write_card
from laguna_serve.scripts.training.dense.curve import Curve, cut
from laguna_serve.scripts.training.dense.report.card import describe_student
from laguna_serve.scripts.training.dense.report.result import DistillResult, write_report
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.results import read_result

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = Environment(date="2026-11-27T10:00", command="python train.py", cpu="a processor", cores=2)


def make_card(base: str) -> Card:
    figures = {"there.png": "a curve", "absent.png": "none"}
    return Card(
        title="student",
        summary="A student.",
        base=base,
        tags=("laguna",),
        sections={"Use": "Serve it."},
        environment=ENVIRONMENT,
        figures=figures,
    )


def test_card_is_read_by_a_hub(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# The base\n")
    (tmp_path / "there.png").touch()
    assert write_card(make_card(str(base)), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license, card.data.tags) == ("base", "apache-2.0", ["laguna"])
    assert "![a curve](there.png)" in card.text
    assert "absent.png" not in card.text
    assert "python train.py" in card.text
    assert str(tmp_path) not in card.text
    assert write_card(make_card("poolside/Laguna-XS.2"), tmp_path), "its own card is written again"
    again = ModelCard.load(tmp_path / "README.md")
    assert (again.data.base_model, again.data.license) == ("poolside/Laguna-XS.2", None)


@pytest.mark.parametrize("readme", ["no front matter", "---\nlicense: [\n---\n", "---\nlanguage: en\n---\n"])
def test_base_without_a_licence_states_none(readme: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(readme)
    write_card(make_card(str(base)), tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license is None


def test_card_of_somebodys_own_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    assert not write_card(make_card("base"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


@pytest.mark.slow
def test_dense_students_card_says_what_its_report_says(tmp_path: Path) -> None:
    """From the toy student's report, with a curve as if one had been asked for."""
    result = read_result(ROOT / "bench/results/toy-distillation/distillation.json", DistillResult)
    point = {"kl": 0.2, "entropy_student": 2.0, "entropy_teacher": 1.9, "stops": 0.7}
    curved = structs.replace(result, curve=[{"step": 0.0, **point, "kl": 0.4}, {"step": 10.0, **point}])
    write_report(curved, tmp_path)
    assert write_card(describe_student(curved, tmp_path), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert MARK in text
    assert f"{result.parameters['true']:,} parameters instead of {result.parameters['teacher']:,}" in text
    assert f"{result.measured['after_stage2']['kl']:.4f}" in text
    assert f"laguna drafter train {tmp_path.name} --prompts" in text
    assert "672 × 1" in text
    for name in ("stage1_nmse.png", "stage2_kl.png", "stage2_held_out.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


class Student:
    """As much of a model as a curve touches."""

    training = True

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode


def test_curve_goes_on_where_it_was(tmp_path: Path) -> None:
    seen: list[int] = []

    def measure(student: Student) -> dict[str, float]:
        assert not student.training
        seen.append(1)
        return {"kl": float(len(seen))}

    student = Student()
    for steps in (range(5), range(3, 9)):
        curve = Curve(tmp_path / "curve.jsonl", 4, measure)  # type: ignore[arg-type]
        for step in steps:
            curve(student, step)  # type: ignore[arg-type]
            assert student.training
    assert curve.points == [{"step": 0.0, "kl": 1.0}, {"step": 4.0, "kl": 2.0}, {"step": 8.0, "kl": 3.0}]


def test_answer_is_cut_behind_its_end() -> None:
    assert cut([5, 2, 7, 2], [2, 3]) == [5, 2]
    assert cut([5, 7], [2]) == [5, 7]
