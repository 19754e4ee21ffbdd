# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""The GPU campaign on a rented machine or as a hosted job, from nothing but this file, Git and a driver.

    uv run gpu_job.py --source https://github.com/OWNER/laguna-serve.git --ref main --budget-min 25
    python gpu_job.py --source laguna-serve.tar.gz --archive results.tar.gz -- --part kernels
    python gpu_job.py --source . --wheel dist/laguna_serve-0.1.0-py3-none-any.whl

Fetches the project (a Git address with --ref, a folder, or an archive of one), installs its locked stack
(scripts/bootstrap.sh: for the GPU, where nvidia-smi answers), with --wheel puts that wheel in the checkout's place,
runs bench/campaign.py with what stands after --, and leaves one archive with everything that it wrote, also when it
failed or was interrupted. The same again with --resume ARCHIVE continues on another machine. Exit status: the
campaign's; 2 where it could not be installed.

Standard library alone, and in one file, as it runs where nothing of the project is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

COULD_NOT_RUN, INTERRUPTED = 2, 130
# Made-up checkpoints are made again in seconds.
LEFT_OUT = "checkpoints"


class JobError(Exception):
    """What ends the job before the campaign; one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="S", help="Git address, folder, or .tar.gz or .zip of one")
    parser.add_argument("--ref", metavar="R", help="branch, tag or commit of a Git address (default: its own)")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="wheel to install in the checkout's place")
    parser.add_argument("--work", type=Path, default=Path("gpu-job"), metavar="DIR", help="default: gpu-job")
    parser.add_argument("--archive", type=Path, default=Path("campaign.tar.gz"), metavar="FILE", help="the results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="an archive of an earlier job, to continue")
    parser.add_argument("--budget-min", type=float, default=25.0, metavar="MIN", help="of the campaign (default: 25)")
    parser.add_argument("campaign", nargs="*", metavar="-- FLAG", help="more flags of bench/campaign.py")
    given = parser.parse_args(argv)
    work = given.work.resolve()
    results = work / "results"
    try:
        work.mkdir(parents=True, exist_ok=True)
        tree = fetch(given.source, given.ref, work / "tree")
        python = install(tree, given.wheel)
        if given.resume is not None:
            unpack(given.resume, work)
        budget = ["--budget-min", str(given.budget_min), "--out", str(results)]
        status = run_campaign([str(python), "bench/campaign.py", *budget, *given.campaign], tree)
    except (JobError, OSError, tarfile.TarError, subprocess.CalledProcessError) as error:
        print(f"gpu_job.py: error: {error}", file=sys.stderr)
        status = COULD_NOT_RUN
    except KeyboardInterrupt:
        status = INTERRUPTED
    if results.is_dir():
        pack(results, given.archive)
        print(f"results in {given.archive}")
    return status


def fetch(source: str, ref: str | None, tree: Path) -> Path:
    """Fetch the project's folder: a local one as it is, anything else below `tree`.

    Raises:
        JobError: it is no such thing, or not this project; CalledProcessError: Git could not have it.
    """
    path = Path(source).expanduser()
    if path.is_dir() and ref is None:
        found = path.resolve()
    elif path.is_file():
        shutil.rmtree(tree, ignore_errors=True)
        shutil.unpack_archive(path, tree)
        inside = [entry for entry in tree.iterdir() if entry.is_dir()]
        found = tree if (tree / "pyproject.toml").exists() else inside[0] if len(inside) == 1 else tree
    else:
        if not tree.exists():
            subprocess.run(["git", "clone", "--quiet", source, str(tree)], check=True)
        subprocess.run(["git", "-C", str(tree), "checkout", "--quiet", ref or "HEAD"], check=True)
        found = tree
    if not (found / "bench" / "campaign.py").exists():
        raise JobError(f"--source: expected this project with bench/campaign.py, got {source}; check address and --ref")
    return found


def install(tree: Path, wheel: Path | None) -> Path:
    """Make the project's environment, and return its Python. Raises CalledProcessError."""
    subprocess.run(["bash", "scripts/bootstrap.sh"], cwd=tree, check=True)
    python = tree / ".venv" / "bin" / "python"
    if wheel is not None:
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--force-reinstall", str(wheel.resolve())], check=True)
        (tree / ".venv" / ".stamp").unlink(missing_ok=True)  # the next bootstrap puts the checkout back
    return python


def run_campaign(command: Sequence[str], tree: Path) -> int:
    """Run it in a group of its own; SIGTERM and Ctrl-C are passed on once, and it is waited for."""
    campaign = subprocess.Popen(command, cwd=tree, start_new_session=True)

    def pass_on(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(campaign.pid, signal.SIGINT)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return campaign.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def unpack(archive: Path, work: Path) -> None:
    """Unpack an earlier job's results, where this one goes on; no member may lead out of the folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")


def pack(results: Path, archive: Path) -> None:
    """One .tar.gz of everything but the made-up checkpoints; it appears whole."""
    partial = archive.with_name(f".{archive.name}.partial")
    left_out = f"results/{LEFT_OUT}"
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(results, "results", filter=lambda member: None if member.name == left_out else member)
    partial.replace(archive)


if __name__ == "__main__":
    raise SystemExit(main())
