"""Weights from a folder of safetensors: a transfer engine for RL that needs no NCCL and no common process group.

A trainer writes a folder, on disk or in shared memory (/dev/shm), and names it in the body of vLLM's `/update_weights`:

    {"update_info": {"folder": "/dev/shm/policy/v7", "sha256": {"model.safetensors": "9f…"}}}

between `/start_weight_update` (or `/start_draft_weight_update`, for the drafter) and `/finish_weight_update`. The
folder holds a whole checkpoint's tensors under its own names, in one file or several; a config.json is not read. A
body that fails (files missing, cut off, not those that were digested, tensors missing, misshapen or not finite) is
answered with an error, and the engine goes on with the weights that it had: staging.py.

Given to vLLM with `--weight-transfer-config '{"backend": "folder"}'`, which `laguna serve --weight-updates` does.
Run with vLLM 0.32.0, read against 0.26. One device: tensor and pipeline parallelism are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from laguna_serve.plugins.staging import load_in_place

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what its own loggers say


class WeightFolderError(ValueError):
    """A folder that cannot be loaded; one line."""


@dataclass
class FolderInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """`/init_weight_transfer_engine` has nothing to agree on; `{}` is its body, and it need not be called."""


@dataclass
class FolderUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One version.

    folder: where the safetensors are, as this engine's machine knows it.
    sha256: file name → digest in hex; then exactly these files are read, and checked. None: every *.safetensors.
    """

    folder: str
    sha256: dict[str, str] | None = None


class FolderWeightTransferEngine(WeightTransferEngine[FolderInitInfo, FolderUpdateInfo]):  # type: ignore[misc]
    """Takes whole versions, one per update, for the model and for its drafter."""

    init_info_cls = FolderInitInfo
    update_info_cls = FolderUpdateInfo

    def init_transfer_engine(self, init_info: FolderInitInfo) -> None:
        """There is nothing to connect to: versions are folders."""

    def start_weight_update(self) -> None:
        """Refuses what cannot be updated.

        Raises:
            WeightFolderError: the model is quantised or spread over several devices.
        """
        if self.model_config.quantization is not None:
            raise self._refuse(f"unquantised weights, got {self.model_config.quantization}")
        if self.parallel_config.world_size > 1:
            raise self._refuse(f"one device, got {self.parallel_config.world_size}")
        self._received = False

    def receive_weights(self, update_info: FolderUpdateInfo) -> None:
        """Load a version, or leave everything as it is.

        Raises:
            WeightFolderError: the files are not there, not whole, or not those that were named.
            StagingError: they do not fit this model.
        """
        if self._received:
            raise WeightFolderError("update: expected one folder per update, got a second; finish this one first")
        files = find_files(update_info)
        is_draft = self.model is not self._default_model
        kept = set(self._default_model.modules()) if is_draft else set()
        load_in_place(self.model, read_files(files, update_info.sha256 or {}), kept=kept)
        self._received = True
        logger.info("%s: new weights from %s", "drafter" if is_draft else "model", update_info.folder)

    def finish_weight_update(self) -> None:
        """Raise WeightFolderError when no folder came."""
        if not self._received:
            raise WeightFolderError("update: expected a folder before its end, got none; call /update_weights first")

    @staticmethod
    def trainer_send_weights(iterator: Iterator[object], trainer_args: object) -> None:
        """Raise NotImplementedError always: a trainer writes a folder instead. vLLM 0.26 demands the method."""
        raise NotImplementedError("weights from a folder: write the folder and name it in /update_weights")

    def shutdown(self) -> None:
        """There is nothing to release: no connection is kept."""

    def _refuse(self, reason: str) -> WeightFolderError:
        return WeightFolderError(f"weight updates from a folder: expected {reason}; restart the engine instead")


def find_files(info: FolderUpdateInfo) -> list[Path]:
    """Find the files of a version, in the order of their names.

    Raises:
        WeightFolderError: the folder, or one of the files, is not there.
    """
    folder = Path(info.folder)
    if not folder.is_dir():
        raise WeightFolderError(f"{folder}: expected a folder of safetensors, got none; write it first")
    if info.sha256 is None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise WeightFolderError(f"{folder}: expected *.safetensors in it, got none; write them first")
        return files
    for name in info.sha256:
        if Path(name).name != name or not (folder / name).is_file():
            raise WeightFolderError(f"{folder}: expected the file {name} in it, got none; write it first")
    return [folder / name for name in sorted(info.sha256)]


def read_files(files: list[Path], digests: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the files. They are read, not mapped: one that is cut off meanwhile would kill the process.

    Raises:
        WeightFolderError: a file is not whole, is not the one that was digested, or repeats a tensor.
    """
    seen: set[str] = set()
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise WeightFolderError(f"{path}: expected to read it, got {error.strerror}; write it again") from error
        wanted, found = digests.get(path.name), hashlib.sha256(data).hexdigest()
        if wanted is not None and wanted != found:
            raise WeightFolderError(f"{path}: expected SHA-256 {wanted}, got {found}; write it again")
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise WeightFolderError(f"{path}: expected a whole safetensors file, got {error}; write it again") from None
        if twice := seen & tensors.keys():
            raise WeightFolderError(f"{path}: expected new tensors, got {min(twice)} again; remove one file")
        seen |= tensors.keys()
        yield from tensors.items()
