"""Recorded traffic: which lines are records, which are left out and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from laguna_serve.serving.client.traffic import TrafficError, read_traffic

RECORD = b'{"prompt_token_ids": [1], "token_ids": [2], "temperature": 0}\n'


def test_line_that_is_being_written_is_left_out_and_any_other_refused(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_bytes(RECORD * 2 + RECORD[:20])
    assert len([*read_traffic(path)]) == 2
    path.write_bytes(RECORD + RECORD[:20] + b"\n" + RECORD)
    with pytest.raises(TrafficError, match=r"traffic.jsonl:2: expected token ids"):
        list(read_traffic(path))
