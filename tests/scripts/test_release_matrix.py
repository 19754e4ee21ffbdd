"""The committed matrix of releases and devices is what its command writes."""

from __future__ import annotations

import json

import pytest

from laguna_serve.scripts.release_matrix import RELEASES, ROOT, format_matrix, list_pairs, make_matrix
from laguna_serve.serving.kit.results import to_json

RESULTS = ROOT / "bench" / "results"


@pytest.mark.slow
def test_committed_matrix_is_current() -> None:
    matrix = make_matrix(RELEASES)
    assert json.loads((RESULTS / "release-matrix.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(to_json(matrix))
    )
    assert (RESULTS / "release-matrix.md").read_text(encoding="utf-8") == format_matrix(matrix)
    assert all(cell.served or cell.refused for cell in matrix.cells)


def test_every_drafter_is_in_a_pair() -> None:
    drafts = {draft for _, draft in list_pairs(RELEASES)} - {None}
    assert len(drafts) == 9
