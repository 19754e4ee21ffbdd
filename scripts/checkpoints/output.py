"""The output folder: what may be written into, what is already there, and files that appear whole or not at all.

A journal (`compact.json`, `unpad.json`, …) holds everything that decides the outcome and the finished files; with it
the same command continues after an interruption, and another one is refused. config.json and the index come last, so
that a folder with a config.json is a whole checkpoint.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit import files
from laguna_serve.serving.kit.progress import ByteProgress
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.kit.run_dir import hold_folder
from laguna_serve.serving.kit.signals import check_signals
from laguna_serve.serving.machine.memory import GIB, MIB

JOURNALS = ("compact.json", "unpad.json", "pad.json", "quantise.json")
# Beside the tensors: headers, tokenizer, config and index.
SLACK_BYTES = MIB
# Where a checkpoint is until it is whole.
PARTIAL = ".partial"
WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(slots=True)
class Output:
    """An output folder that is ours: what was asked for, and the bytes of every finished file."""

    folder: Path
    arguments: JsonObject
    journal: str
    finished: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def has(self, name: str) -> bool:
        """Whether the file was finished and still is as it was left."""
        path = self.folder / name
        return name in self.finished and path.is_file() and path.stat().st_size == self.finished[name]

    def start(self) -> None:
        """Make the folder ours. A checkpoint that is no longer whole must not look like one: its config.json goes."""
        self.complete = False
        self._save()
        (self.folder / "config.json").unlink(missing_ok=True)

    def note(self, name: str) -> None:
        """Note in the journal that a file is finished."""
        self.finished[name] = (self.folder / name).stat().st_size
        self._save()

    def close(self) -> None:
        """Note that the checkpoint is whole."""
        self.complete = True
        self._save()

    def _save(self) -> None:
        schema = _schema(self.journal)
        journal = {"schema": schema, "complete": self.complete, "arguments": self.arguments, "finished": self.finished}
        write_file(self.folder / self.journal, lambda path: path.write_text(json.dumps(journal, indent=1) + "\n"))


def open_output(folder: Path, base: Path, arguments: JsonObject, journal: str = JOURNALS[0]) -> Output:
    """Open the folder to write into or to continue in; nothing is written yet.

    Raises:
        CheckpointError: it lies in the base, holds something else, or was begun with other arguments.
    """
    resolved, source = folder.resolve(), base.resolve()
    if resolved == source or source in resolved.parents:
        raise CheckpointError(f"{folder}: expected a folder outside the base, got one in {base}; choose another --out")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, got a file; choose another --out")
    if is_free(folder):
        return Output(folder, arguments, journal)
    return _continue(folder, arguments, journal)


def is_free(folder: Path) -> bool:
    """Whether a checkpoint can be written there: nothing is in it but what a killed run has left of one."""
    left = {PARTIAL, *(f".{journal}{PARTIAL}" for journal in JOURNALS)}
    return not folder.exists() or all(path.name in left for path in folder.iterdir())


def _continue(folder: Path, arguments: JsonObject, journal: str) -> Output:
    try:
        noted = json.loads((folder / journal).read_text(encoding="utf-8"))
        begun, finished = noted["arguments"], noted["finished"]
        if noted["schema"] != _schema(journal):
            raise ValueError(noted["schema"])
        complete = bool(noted["complete"])
        if not (isinstance(begun, dict) and isinstance(finished, dict)):
            raise TypeError("arguments and finished are no objects")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: expected an empty folder or one to continue in, got other files; choose another --out"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / journal}: expected a journal, got one that cannot be read ({error!r}); remove the folder"
        ) from None
    for key in sorted(arguments.keys() | begun.keys()):
        if arguments.get(key) != begun.get(key):
            expected, got = f"{key} {begun.get(key)!r} as begun", repr(arguments.get(key))
            remedy = "repeat the first command, choose another --out or remove the folder"
            raise CheckpointError(f"{folder}: expected {expected}, got {got}; {remedy}")
    output = Output(folder, begun, journal, finished)
    output.complete = complete and (folder / "config.json").is_file() and all(map(output.has, finished))
    return output


def check_own(out: Path, read: Iterable[Path], *, own: bool) -> None:
    """Refuse to train into a checkpoint that is read, or into any that is not the command's `own`.

    Raises:
        CheckpointError: it is one of these.
    """
    if out.resolve() in [folder.resolve() for folder in read]:
        raise CheckpointError(f"{out}: expected a folder of its own, got one that is read; choose another --out")
    if (out / "config.json").exists() and not own:
        expected = "an empty folder, or one that this command has made"
        raise CheckpointError(f"{out}: expected {expected}, got another checkpoint; choose another --out")


@contextmanager
def write_files(
    output: Output, source: Path, sizes: dict[str, int], write: Callable[[str, Path, Callable[[int], None]], None]
) -> Iterator[None]:
    """Write the files that are not there yet, and copy the source's others; what describes them is left to the body.

    sizes: name → bytes; write: makes the file of a name at a path, and says what it has written.

    Raises:
        CheckpointError: too little space, the folder cannot be created, or a file to copy is a link that leads nowhere;
            RunDirError: another run writes into it.
    """
    missing = [name for name in sizes if not output.has(name)]
    needed = sum(sizes[name] for name in missing)
    list_others(source)
    check_space(output.folder, needed)
    try:
        output.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{output.folder}: expected to create it, got {error.strerror}; choose another") from None
    progress = ByteProgress(sum(sizes.values()), sum(sizes.values()) - needed)
    with hold_folder(output.folder):
        if progress.done:
            progress.say(f"continuing: {len(sizes) - len(missing)} of {len(sizes)} files are done")
        output.start()
        for name in missing:
            progress.label = name
            write(name, output.folder / name, progress.advance)
            output.note(name)
            check_signals()
        progress.finish()
        for name in copy_others(source, output.folder):
            output.note(name)
        yield
        output.close()


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError when the file system of the folder has less free than is still to be written."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SLACK_BYTES:
        expected = f"{needed + SLACK_BYTES:,} bytes free ({needed / GIB:.2f} GiB)"
        raise CheckpointError(f"{folder}: expected {expected}, got {free:,}; free some or choose another --out")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that appears whole or not at all."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file(path, lambda partial: save_file(contiguous, partial, metadata=metadata or {"format": "pt"}))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        CheckpointError: the disk is full or refuses.
    """

    def write_tensors_too(partial: Path) -> None:
        try:
            write(partial)
        except SafetensorError as error:
            raise OSError(errno.ENOSPC if files.is_disk_full(error) else errno.EIO, str(error)) from None

    try:
        files.write_file(path, write_tensors_too)
    except files.WriteError as error:
        raise CheckpointError(f"{error}: finished files are kept") from None


def write_described(output: Output, name: str, content: Mapping[str, Any] | bytes) -> None:
    """Write a file that describes the checkpoint, a JSON object or a copy of the source's bytes, and note it."""
    if not isinstance(content, bytes):
        content = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    text = content
    write_file(output.folder / name, lambda partial: partial.write_bytes(text))
    output.note(name)


def save_checkpoint(folder: Path, save: Callable[[Path], object]) -> None:
    """Save a checkpoint by `save` in a folder of its own, then move its files into `folder`, config.json last.

    What is in `folder` stays until the new one is written; then its weights go.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save(partial)
        (folder / "config.json").unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.name.endswith((".safetensors", ".index.json")):
                path.unlink()
        for path in sorted(partial.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            write_file(folder / path.name, path.replace)
    except (OSError, SafetensorError) as error:
        full = files.is_disk_full(error)
        got = "no space left; free some and repeat the command" if full else str(error)
        raise CheckpointError(f"{folder}: expected to write it, got {got}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_others(base: Path, folder: Path) -> list[str]:
    """Copy what is neither weights nor config.json: tokenizer, chat template, licence and the like."""
    others = list_others(base)
    for path in others:
        write_file(folder / path.name, lambda partial, path=path: shutil.copyfile(path, partial))  # type: ignore[misc]
    return [path.name for path in others]


def list_others(base: Path) -> list[Path]:
    """List what `copy_others` copies.

    Raises:
        CheckpointError: a link that leads nowhere, as in a cache that was pruned.
    """
    left_out = ("config.json", *JOURNALS)
    named = [path for path in sorted(base.iterdir()) if path.name not in left_out and path.name[0] != "."]
    others = [path for path in named if not path.name.endswith(WEIGHT_SUFFIXES)]
    for path in others:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: expected a file, got a link that leads nowhere; fetch it again")
    return [path for path in others if path.is_file()]


def _schema(journal: str) -> str:
    return f"laguna_serve.{Path(journal).stem}_journal/1"
