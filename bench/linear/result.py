"""The result of bench/linear: `linear.json`, schema laguna_serve.linear/1."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from laguna_serve.serving.kit.environment import Environment

Interval = tuple[float, float]


class LinearRow(Struct, frozen=True, kw_only=True):
    """One number of rows of one matrix [outputs, inputs].

    Attributes:
        kernel_us, bfloat16_us, float32_us: median of a call of the kernel, and of torch's in either type.
        against_bfloat16, against_float32: how many times as fast as torch the kernel is: the median
            of rounds in which each had a turn, with its 95% interval.
        vllm_us, against_vllm: the same of vLLM's linear layers without the kernel, whose matrices are arranged once.
        gb_s: weights that the kernel read; `read_share`: of what plain reading reached beside it.
        error: the largest difference to float32, relative to the largest output.
        refused: why there is no time; then the others are unset.
    """

    inputs: int
    outputs: int
    rows: int
    calls: int | UnsetType = UNSET
    kernel_us: float | UnsetType = UNSET
    bfloat16_us: float | UnsetType = UNSET
    float32_us: float | UnsetType = UNSET
    against_bfloat16: float | UnsetType = UNSET
    against_bfloat16_ci95: Interval | UnsetType = UNSET
    against_float32: float | UnsetType = UNSET
    against_float32_ci95: Interval | UnsetType = UNSET
    vllm_us: float | UnsetType = UNSET
    against_vllm: float | UnsetType = UNSET
    against_vllm_ci95: Interval | UnsetType = UNSET
    gb_s: float | UnsetType = UNSET
    read_share: float | UnsetType = UNSET
    error: float | None = None
    refused: str | None = None

    @property
    def name(self) -> str:
        """The row's label in tables."""
        return f"{self.inputs}x{self.outputs}, {self.rows} rows"


class LinearResult(Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.linear/1"):
    """The bfloat16 linear op against torch's bfloat16 and float32.

    Attributes:
        path: the instruction set that the kernel used; `torch_isa`: torch's.
        limits: variables that held the processor to fewer instructions than it has.
        refused: of the rows without a time, what was wrong.
        partial: the run was interrupted.
    """

    environment: Environment
    path: str
    torch_isa: str
    limits: dict[str, str]
    threads: int
    rows: list[LinearRow]
    refused: list[str]
    partial: bool
