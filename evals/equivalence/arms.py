"""The arms of a comparison: opened when they are first needed, together where memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from laguna_serve.bench.arms.arms import Arm, ArmSpec, has_room_beside, open_arm


class Arms:
    """Opens the arms when they are first needed: both at once where they fit, else one after the other."""

    def __init__(self, specs: Mapping[str, ArmSpec], folder: Path, say: Callable[[str], None]) -> None:
        # A run that was continued stays what it was.
        self._note = folder / "one-arm-at-a-time"
        self.interleaved = not self._note.exists()
        self._specs, self._folder, self._say = specs, folder, say
        self._open: dict[str, tuple[Arm, ExitStack]] = {}

    def __enter__(self) -> Arms:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def take_turns(self, names: Sequence[str]) -> Iterator[list[Arm]]:
        """Group the named arms: in one list when they are up together, else each in its own, those that are up first.

        Raises:
            EngineError: an engine did not start.
        """
        names = sorted(names, key=lambda name: name not in self._open)
        if self.interleaved and len(names) > 1:
            if names[1] in self._open or has_room_beside(self._get(names[0])):
                yield [self._get(name) for name in names]
                return
            self._say("not enough free memory for both engines at once: asking one arm after the other")
            self.interleaved = False
            self._note.touch()
        for name in names:
            if name not in self._open:
                self._close()
            yield [self._get(name)]

    def _get(self, name: str) -> Arm:
        if name not in self._open:
            stack = ExitStack()
            self._open[name] = stack.enter_context(open_arm(self._specs[name], self._folder, self._say)), stack
        return self._open[name][0]

    def _close(self) -> None:
        with ExitStack() as stack:  # closes each even if another one fails to
            for _, one in self._open.values():
                stack.push(one)
            self._open = {}
