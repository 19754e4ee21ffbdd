"""What scoring will take, as `--dry-run` prints it; training/pruning/streaming/sizes.py adds it up."""

from __future__ import annotations

import msgspec

from laguna_serve.serving.machine.memory import GIB

# The peak is at most so many of the model's largest parts, besides activations.
PARTS = 3


class ScoringPlan(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.expert_scoring_plan/1"
):
    """What a run will take; sizes in bytes.

    Attributes:
        score, dtype, device: as the command was given them.
        layers, sparse_layers: of the model.
        rows, tokens, longest: the text; tokens of its longest row.
        model_bytes: of the checkpoint's tensors as they are stored.
        part_bytes: the largest part of the model, in the dtype it is computed in.
        row_bytes: activations of the longest row in one part, there and back.
        memory_bytes: the peak is below this, besides Python and its libraries; on a GPU, of the device's memory.
        disk_bytes: most that lies in the work folder at one time.
        read_bytes: of weights, over all passes.
    """

    score: str
    dtype: str
    device: str
    layers: int
    sparse_layers: int
    rows: int
    tokens: int
    longest: int
    model_bytes: int
    part_bytes: int
    row_bytes: int
    memory_bytes: int
    disk_bytes: int
    read_bytes: int

    def describe(self) -> str:
        """Say it in one line."""
        memory = f"at most {self.memory_bytes / GIB:.2f} GiB of memory besides Python"
        parts = f"{PARTS} × {self.part_bytes / GIB:.2f} GiB of weights, {self.row_bytes / GIB:.2f} GiB for a row"
        return f"{memory} ({parts}), {self.disk_bytes / GIB:.2f} GiB of disk, {self.read_bytes / GIB:.2f} GiB read"
