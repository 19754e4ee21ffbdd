"""What `laguna unpad` and `laguna pad` look for in their source, and in what they wrote."""

from __future__ import annotations

from pathlib import Path

import torch

from laguna_serve.plugins.layers import PaddingError
from laguna_serve.scripts.checkpoints.headers import SCALE_SUFFIXES, is_identical, open_file
from laguna_serve.scripts.checkpoints.widths import WidthsSource
from laguna_serve.serving.kit.signals import check_signals


def count_negative_zeros(source: WidthsSource) -> int:
    """How many values of the padding are −0, which comes back as +0."""
    count = 0
    for file in source.files:
        with open_file(source.folder / file) as opened:
            for name in opened.keys():  # noqa: SIM118
                padded = source.find(name)
                if padded is not None and not padded[0].is_whole and not name.endswith(SCALE_SUFFIXES):
                    cut = padded[0].padding.trim(opened.get_tensor(name), padded[1])
                    count += int(torch.count_nonzero((cut.half() if cut.element_size() == 1 else cut).signbit()))
                    check_signals()
    return count


def compare(source: WidthsSource, out: Path) -> None:
    """Read back what was written and compare it with the source, bit for bit.

    Raises:
        PaddingError: a tensor is missing, or is not what it should be.
    """
    for file in source.files:
        with open_file(source.folder / file) as before, open_file(out / file) as after:
            if set(before.keys()) != set(after.keys()):
                raise PaddingError(f"{out / file}: expected the tensors of the source, got others; make it again")
            for name in before.keys():  # noqa: SIM118
                wanted, got = source.change(name, before.get_tensor(name)), after.get_tensor(name)
                if not is_identical(wanted, got):
                    raise PaddingError(f"{out / file}: expected {name} of the source, got other values; make it again")
                check_signals()
