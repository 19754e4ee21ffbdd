"""Lines of a run's answers and grades as they come, one for each sample of a problem, so that it can be continued."""

from __future__ import annotations

import msgspec

from laguna_serve.evals.codegen.grading import Grade, Verdict
from laguna_serve.serving.client.openai_endpoint import Answer

Key = tuple[str, int]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What all lines have: which sample they are about."""

    task_id: str
    sample: int

    @property
    def key(self) -> Key:
        """Which sample the line is about, as (task id, number)."""
        return self.task_id, self.sample


class AnswerLine(Line, frozen=True, kw_only=True):
    """An answer (openai_endpoint.Answer), or the error in its place."""

    text: str | None = None
    finish_reason: str | None = None
    tokens: int | None = None
    versions: dict[str, str] = {}
    error: str | None = None

    @classmethod
    def of(cls, key: Key, answer: Answer) -> AnswerLine:
        """Make the line of one sample's answer."""
        return cls(
            task_id=key[0],
            sample=key[1],
            text=answer.text,
            finish_reason=answer.finish_reason,
            tokens=answer.tokens,
            versions=dict(answer.versions),
        )


class GradeLine(Line, frozen=True, kw_only=True):
    """A program's grade (grading.Grade), with the program and the verdict of the base tests (grading.Verdict)."""

    reward: float
    passed: bool
    tests_passed: int
    tests_total: int
    status: str
    detail: str
    published: bool = False
    walls: str = ""
    program: str = ""
    base: bool | None = None

    @classmethod
    def of(cls, key: Key, verdict: Verdict) -> GradeLine:
        """Make the line of one sample's verdict."""
        grade = {name: getattr(verdict.grade, name) for name in Grade.__dataclass_fields__}
        return cls(task_id=key[0], sample=key[1], program=verdict.program, base=verdict.base, **grade)

    @property
    def grade(self) -> Grade:
        """Return the grade as grading.py gave it."""
        return Grade(**{name: getattr(self, name) for name in Grade.__dataclass_fields__})
