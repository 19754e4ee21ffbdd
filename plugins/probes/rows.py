"""Finds the first operation of a model whose result for a row depends on the rows beside it.

Hooks on every module see what goes in and what comes out. A row stands for a token at a position of one sequence: its
values are learned while the sequence goes through one row at a time, and compared while it goes through otherwise. The
first that differ, in the order of computation, come from equal values before them, keys and values in the cache
included, so the operation that made them is the one that differs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


class Event(NamedTuple):
    """A tensor that went into a module or came out of it: of its nth call in a step, the nth tensor."""

    module: str
    side: Literal["input", "output"]
    call: int
    place: int


@dataclass(frozen=True, slots=True)
class Seen:
    """The values of an event for some positions, [positions, …] on the CPU, and the shapes of the module's inputs."""

    event: Event
    positions: tuple[int, ...]
    values: torch.Tensor
    inputs: list[list[int]]


class RowRecorder:
    """Watches a model whose forward has `input_ids` [T] and `positions` [T], by keyword or in this order."""

    def __init__(self, model: nn.Module, sequence: Sequence[int]) -> None:
        self.sequence = tuple(sequence)
        self.compared = 0
        self.found: Seen | None = None
        self.fetched: dict[Event, Seen] = {}
        self.operations: dict[Event, list[str]] = {}
        self._mode: Literal["off", "learn", "compare", "fetch"] = "off"
        self._digests: dict[Event, np.ndarray] = {}
        self._wanted: dict[Event, tuple[int, ...]] = {}
        self._rows: list[int] = []
        self._calls: Counter[tuple[str, str]] = Counter()
        self._inputs: dict[str, list[list[int]]] = {}
        self._logs: dict[str, _OperationLog] = {}
        self._hook(model)

    @contextmanager
    def learn(self) -> Iterator[None]:
        """Learn from what runs inside how the values should be."""
        yield from self._during("learn")

    @contextmanager
    def compare(self) -> Iterator[None]:
        """Compare what runs inside with it, up to the first difference: `found`, None without one."""
        self.found, self.compared = None, 0
        yield from self._during("compare")

    @contextmanager
    def fetch(self, wanted: Sequence[Seen]) -> Iterator[None]:
        """Fetch from what runs inside these events' values (`fetched`) and what their modules called (`operations`)."""
        self._wanted = {seen.event: seen.positions for seen in wanted}
        yield from self._during("fetch")

    def _during(self, mode: Literal["learn", "compare", "fetch"]) -> Iterator[None]:
        self._mode = mode
        try:
            yield
        finally:
            self._mode = "off"

    def _hook(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                module.register_forward_hook(self._after(name), with_kwargs=True)

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.clear()
        ids = kwargs.get("input_ids", args[0] if args else None)
        positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
        self._rows = [] if ids is None or positions is None else self._place(ids.tolist(), positions.tolist())

    def _end(self, *_: Any) -> None:
        self._rows = []

    def _place(self, ids: list[int], positions: list[int]) -> list[int]:
        """Find the position of every row that stands for a token of the sequence; −1 of others, and of what follows."""
        rows: list[int] = []
        for token, position in zip(ids, positions, strict=True):
            follows = bool(rows) and position > 0 and positions[len(rows) - 1] == position - 1
            same = position < len(self.sequence) and self.sequence[position] == token
            rows.append(position if same and not (follows and rows[-1] < 0) else -1)
        return rows

    def _before(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._mode == "off" or not self._rows:
                return
            tensors = list(_list_tensors((args, kwargs)))
            self._inputs[name] = [list(tensor.shape) for tensor in tensors]
            self._see(name, "input", tensors)
            if self._mode == "fetch" and any(event.module == name for event in self._wanted):
                self._logs[name] = _OperationLog()
                self._logs[name].__enter__()  # type: ignore[no-untyped-call]

        return hook

    def _after(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            log = self._logs.pop(name, None)
            if log is not None:
                log.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self.operations.update({event: log.names for event in self._wanted if event.module == name})
            if self._mode != "off" and self._rows:
                self._see(name, "output", list(_list_tensors(output)))

        return hook

    def _see(self, name: str, side: Literal["input", "output"], tensors: list[torch.Tensor]) -> None:
        call = self._calls[name, side]
        self._calls[name, side] += 1
        for index, tensor in enumerate(tensors):
            looking = self._mode == "fetch" or self.found is None
            if looking and tensor.dim() > 0 and tensor.shape[0] == len(self._rows):
                self._observe(Event(name, side, call, index), tensor)

    def _observe(self, event: Event, tensor: torch.Tensor) -> None:
        if self._mode == "fetch":
            self._keep(event, tensor)
            return
        if self._mode == "learn":
            known = self._digests.setdefault(event, np.zeros(len(self.sequence), dtype=np.int64))
        elif (held := self._digests.get(event)) is not None:
            known = held
        else:
            return
        differing = []
        for row, (position, digest) in enumerate(zip(self._rows, _digest_rows(tensor), strict=True)):
            if position >= 0 and self._mode == "learn":
                known[position] = digest
            elif position >= 0 and known[position]:
                self.compared += 1
                differing += [row] if known[position] != digest else []
        if differing:
            positions = tuple(self._rows[row] for row in differing)
            values = tensor.detach()[differing].to("cpu", copy=True)
            self.found = Seen(event, positions, values, self._inputs[event.module])

    def _keep(self, event: Event, tensor: torch.Tensor) -> None:
        for row, position in enumerate(self._rows):
            if position not in self._wanted.get(event, ()):
                continue
            value = tensor.detach()[row : row + 1].to("cpu", copy=True)
            before = self.fetched.get(event)
            if before is not None:
                position_list, value = (*before.positions, position), torch.cat((before.values, value))
            else:
                position_list = (position,)
            self.fetched[event] = Seen(event, position_list, value, self._inputs[event.module])


class _OperationLog(TorchDispatchMode):
    """Names of the operations that run, each once, without those that only look at tensors otherwise."""

    VIEWS = (
        "view",
        "reshape",
        "_unsafe_view",
        "t",
        "transpose",
        "slice",
        "select",
        "detach",
        "split",
        "expand",
        "as_strided",
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.name()).removeprefix("aten::")
        if name.partition(".")[0] not in self.VIEWS and name not in self.names:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def find_layer(module: str) -> int | None:
    """Find the number of the layer that a module is in."""
    found = LAYER.search(module)
    return int(found[1]) if found else None


def measure(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Measure the largest difference, absolute and in units of the last place (0 or 1 for whole numbers)."""
    a, b = one.double(), other.double()
    difference = (a - b).abs().nan_to_num(nan=math.inf)
    largest = float(difference.max())
    if not one.dtype.is_floating_point:
        return largest, float(largest > 0)
    info = torch.finfo(one.dtype)
    size = torch.maximum(a.abs(), b.abs()).clamp(min=float(info.smallest_normal))
    return largest, float((difference / (torch.exp2(torch.floor(torch.log2(size))) * info.eps)).max())


def _digest_rows(tensor: torch.Tensor) -> list[int]:
    """Digest every row as a number other than 0, equal for equal values; −0 is 0."""
    rows = tensor.detach().reshape(tensor.shape[0], -1)
    if rows.dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = rows + 0.0
    array = rows.contiguous().cpu().view(torch.uint8).numpy()
    return [hash(row.tobytes()) or 1 for row in array]


def _list_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _list_tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _list_tensors(part)
