"""What is known of the machine: the processor, beyond its name."""

from __future__ import annotations

from pathlib import Path

from laguna_serve.serving.machine.device import read_isa


def test_family_model_and_instruction_sets(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: X\nflags\t\t: fpu avx2 avx512f sse\n"
    )
    assert read_isa(tmp_path / "cpuinfo") == ["cpu family 25", "model 17", "avx2", "avx512f"]


def test_nothing_is_known_where_the_kernel_does_not_say(tmp_path: Path) -> None:
    assert read_isa(tmp_path / "absent") == []
