"""What the dense experiments count of an answer, and the flags they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.scripts.training.dense.config import DistillConfig
from laguna_serve.scripts.training.dense.curve import cut
from laguna_serve.scripts.training.dense.experiments.__main__ import main
from laguna_serve.scripts.training.dense.experiments.behaviour import is_python
from laguna_serve.scripts.training.dense.experiments.config import ExperimentsConfig
from laguna_serve.scripts.training.dense.work import open_work
from laguna_serve.scripts.training.ranks import ALONE
from laguna_serve.serving.kit.run_dir import RunDirError


def test_answer_ends_with_its_first_end() -> None:
    assert cut([5, 6, 4, 0, 2], [2, 4]) == [5, 6, 4]
    assert cut([5, 6], [2, 4]) == [5, 6]


@pytest.mark.parametrize(
    ("text", "is_so"), [("x = 1", True), ("", False), ("# only", False), ("def f(", False), ("\0", False)]
)
def test_python_is_what_parses_and_is_not_empty(text: str, is_so: bool) -> None:
    assert is_python(text) == is_so


def test_arms_share_one_distillation() -> None:
    config = ExperimentsConfig(teacher="t", out=Path("out"), stage2_steps=50, seed=3)
    assert (config.distil.recipe.seed, config.distil.recipe.stage2_steps, config.distil.recipe.warm_up) == (3, 50, 5)


def test_k_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["t", "--out", str(tmp_path), "--top-k", "8,many"])
    assert "expected numbers of tokens or 'full', got '8,many'" in capsys.readouterr().err


def test_folder_that_cannot_be_is_told_by_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["t", "--out", str(tmp_path / "file" / "out")]) == 2
    assert f"--out {tmp_path / 'file' / 'out'}: expected a folder, got the file" in capsys.readouterr().err


def test_work_folder_that_cannot_be_is_told_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = DistillConfig(teacher="t", out=tmp_path / "out", work=tmp_path / "file" / "work")
    with pytest.raises(RunDirError, match=r"^--work .*: expected a folder, got the file"):
        open_work(config, config.recipe, tmp_path, ALONE)
