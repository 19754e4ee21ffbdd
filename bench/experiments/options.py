"""What a campaign runs: the configuration of bench/campaign.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laguna_serve.bench.experiments.step import PARTS, XS2, XS2_DRAFT, XS2_PRUNED, Part
from laguna_serve.serving.checkpoint import find_folder
from laguna_serve.serving.checkpoint.digest import digest_checkpoint
from laguna_serve.serving.kit.files import expand
from laguna_serve.serving.kit.flags import Flag, FlagError, check_bounds
from laguna_serve.serving.kit.run_dir import fingerprint


@dataclass(frozen=True, kw_only=True)
class CampaignConfig:
    """Which steps, for how long; what they write goes below `out`."""

    budget_min: Annotated[
        float,
        Flag("minutes for all steps together (default: 25)", metavar="MIN", at_least=0.1, group="what to run"),
    ] = 25.0
    part: Annotated[tuple[Part, ...], Flag(f"parts of the list: {', '.join(PARTS)} (default: all)", metavar="P,…")] = ()
    step: Annotated[tuple[str, ...], Flag("steps by name (default: all of the parts)", metavar="NAME,…")] = ()
    retry: Annotated[bool, Flag("once more for steps that failed or ran out of their time limit")] = False
    plan: Annotated[
        bool, Flag("print what would run after what --out holds, and what not, and why; run and write nothing")
    ] = False
    rehearse: Annotated[bool, Flag("the same steps at toy size on the CPU: whether they run, not how fast")] = False
    xs2: Annotated[
        str | None, Flag("XS.2's weights, folder or cached hub id", metavar="M", group="published checkpoints")
    ] = None
    xs2_draft: Annotated[str | None, Flag("its DFlash drafter", metavar="D")] = None
    xs2_pruned: Annotated[str | None, Flag("the same with a tenth of its experts pruned", metavar="M")] = None
    checkpoints: Annotated[
        Path | None,
        Flag("folder for checkpoints that are made up (default: DIR/checkpoints)", metavar="DIR", group="files"),
    ] = None
    out: Annotated[Path | None, Flag("folder of the campaign: journal, page and a folder per step", metavar="DIR")] = (
        None
    )
    write_todo: Annotated[Path | None, Flag("write the whole list as Markdown, and end", metavar="FILE")] = None

    def __post_init__(self) -> None:
        """Refuse a campaign without a folder."""
        check_bounds(self)
        if self.out is None and not self.plan and self.write_todo is None:
            raise FlagError("--out: expected a folder for what is measured, or --plan, got neither")

    @property
    def made_up(self) -> Path | None:
        """The folder of checkpoints that steps make."""
        return self.checkpoints or (None if self.out is None else self.out / "checkpoints")

    @property
    def budget_s(self) -> float:
        """Seconds for all steps together."""
        return self.budget_min * 60

    def list_given(self) -> dict[str, str]:
        """List the user's own checkpoints, by placeholder; folders as steps find them from the repository's."""
        given = {XS2: self.xs2, XS2_DRAFT: self.xs2_draft, XS2_PRUNED: self.xs2_pruned}
        return {name: locate(value) for name, value in given.items() if value is not None}

    def identify_given(self) -> dict[str, str]:
        """Say what each of them is, by placeholder: a digest of its content, or the name of what only a hub has.

        Raises:
            CheckpointError: there is no such folder; OSError: a file cannot be read.
        """
        return {place: identify(name) for place, name in self.list_given().items()}


def locate(name: str) -> str:
    """Give a folder's whole path; a hub id stays what it is."""
    path = expand(name)
    return str(path.absolute()) if path.is_dir() else name


def identify(name: str) -> str:
    """Say what a checkpoint is, so that it is the same on another machine; read again where its files were written."""
    folder = find_folder(name)
    return name if folder is None else _digest(folder, fingerprint(str(folder)))


@functools.cache
def _digest(folder: Path, _written: str) -> str:
    return digest_checkpoint(folder)
