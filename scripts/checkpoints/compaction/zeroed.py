"""The published form of a pruned model: the base's files byte for byte, but for zeros in what is pruned.

Scales of FP8 stay as they are. A file is copied tensor by tensor, so that one tensor at a time is in memory and
header, order and padding stay as they are. The library does not say where a tensor lies; its format does: eight bytes
of length, a JSON header with `data_offsets` from the end of the header on, then the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import Pruning
from laguna_serve.scripts.checkpoints.compaction.base import EXPERTS, SCALE, Base
from laguna_serve.scripts.checkpoints.headers import ITEM_BYTES

CHUNK_BYTES = 2**24


def copy_zeroed(base: Base, pruning: Pruning, file: str, destination: Path, advance: Callable[[int], None]) -> None:
    """Copy one of the base's files to `destination`, with every pruned atom's rows and columns at zero."""
    experts = {name for layer in base.shape.layers for name in base.expert_names(layer) if not name.endswith(SCALE)}
    with (base.folder / file).open("rb") as source, destination.open("wb") as target:
        prefix = source.read(8)
        header = source.read(int.from_bytes(prefix, "little"))
        target.write(prefix + header)
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            _copy(source.read, target.write, begin - at, lambda _: None)
            if name in experts:
                data = np.frombuffer(bytearray(source.read(end - begin)), np.uint8)
                _zero(base, pruning, name, data)
                target.write(data.data)
                advance(end - begin)
            else:
                _copy(source.read, target.write, end - begin, advance)
            at = end


def _copy(
    read: Callable[[int], bytes], write: Callable[[bytes], int], count: int, advance: Callable[[int], None]
) -> None:
    while count:
        chunk = read(min(count, CHUNK_BYTES))
        if not chunk:
            raise EOFError("a file of the base became shorter while it was read")
        write(chunk)
        count -= len(chunk)
        advance(len(chunk))


def _zero(base: Base, pruning: Pruning, name: str, data: npt.NDArray[np.uint8]) -> None:
    """Zero the pruned atoms in the bytes of one of the experts' tensors."""
    match = EXPERTS.fullmatch(name)
    assert match is not None
    layer, part = base.shape.layers.index(int(match[1])), match[2]
    N, H = base.shape.intermediate_size, base.shape.hidden_size
    down = "down_proj" in part
    size = ITEM_BYTES[base.dtype]
    # [experts, parts, rows, columns, bytes]: one expert and one matrix, or in the fused spelling all and both.
    parts = 2 if part == "gate_up_proj" else 1
    matrices = data.reshape(-1, parts, *((H, N) if down else (N, H)), size)
    first = 0 if base.fused else int(part.split(".")[0])
    for expert, matrix in enumerate(matrices, first):
        gone = pruning.indices[layer, expert][~pruning.keep[layer, expert]].reshape(-1)
        if down:
            matrix[:, :, gone] = 0
        else:
            matrix[:, gone] = 0
