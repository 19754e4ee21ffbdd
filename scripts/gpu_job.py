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
failed or was interrupted. The same again with --resume ARCHIVE continues on another machine, and on this one without.
Exit status: the campaign's; 2 where it could not be installed.

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
RESULTS, JOURNAL = "results", "campaign.jsonl"


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
    results, begun = work / RESULTS, False
    try:
        if given.archive.is_dir():
            raise JobError(f"--archive: expected a file, got the folder {given.archive}; name a file in it")
        given.archive.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        if given.resume is not None:
            unpack(given.resume, work)
        tree = fetch(given.source, given.ref, work / "tree")
        python = install(tree, given.wheel)
        budget = ["--budget-min", str(given.budget_min), "--out", str(results)]
        begun = True
        status = run_campaign([str(python), "bench/campaign.py", *budget, *given.campaign], tree)
    except (JobError, OSError, tarfile.TarError, subprocess.CalledProcessError) as error:
        print(f"gpu_job.py: error: {error}", file=sys.stderr)
        status = COULD_NOT_RUN
    except KeyboardInterrupt:
        status = INTERRUPTED
    if begun and results.is_dir():
        try:
            pack(results, given.archive)
        except OSError as error:
            print(f"gpu_job.py: error: {error}; the results are in {results}", file=sys.stderr)
            return COULD_NOT_RUN
        print(f"results in {given.archive}")
    return status


def fetch(source: str, ref: str | None, tree: Path) -> Path:
    """Fetch the project's folder: a local one as it is, anything else below `tree`.

    Raises:
        JobError: it is no such thing, or not this project; CalledProcessError: its files are in Git's way.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir() and ref is None:
        found = path.resolve()
    elif path.is_file():
        shutil.rmtree(tree, ignore_errors=True)
        shutil.unpack_archive(path, tree)
        inside = [entry for entry in tree.iterdir() if entry.is_dir()]
        found = tree if (tree / "pyproject.toml").exists() else inside[0] if len(inside) == 1 else tree
    else:
        fetch_commit(str(path.resolve()) if path.exists() else source, ref, tree)
        found = tree
    if not (found / "bench" / "campaign.py").exists():
        raise JobError(f"--source: expected this project with bench/campaign.py, got {source}; check address and --ref")
    return found


def fetch_commit(source: str, ref: str | None, tree: Path) -> None:
    """Make `tree` a checkout of what the address has now; what an earlier job left there may be older, or another's.

    Raises:
        JobError: Git cannot read the address, or has no such commit there.
    """
    git = ["git", "-C", str(tree)]
    try:
        wanted = fetch_branches(source, ref, tree, git)
    except subprocess.CalledProcessError as error:
        raise JobError(f"--source: expected a folder, an archive or what Git can read, got {source}") from error
    found = subprocess.run(
        [*git, "rev-parse", "--quiet", "--verify", f"{wanted}^{{commit}}"], check=False, capture_output=True, text=True
    )
    if found.returncode:
        raise JobError(f"--ref: expected a branch, tag or commit of {source}, got {ref}; check it")
    subprocess.run([*git, "checkout", "--quiet", "--detach", found.stdout.strip()], check=True)


def fetch_branches(source: str, ref: str | None, tree: Path, git: Sequence[str]) -> str:
    """Fetch all of an address's branches and tags into `tree`; return Git's name there for `ref`.

    Raises CalledProcessError.
    """
    if (tree / ".git").exists():
        subprocess.run([*git, "remote", "set-url", "origin", source], check=True)
        subprocess.run([*git, "fetch", "--quiet", "--prune", "--tags", "--force", "origin"], check=True)
    else:
        shutil.rmtree(tree, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", source, str(tree)], check=True)
    if ref is None:
        subprocess.run([*git, "fetch", "--quiet", "origin", "HEAD"], check=True)
        return "FETCH_HEAD"
    branch = f"refs/remotes/origin/{ref}"
    known = subprocess.run([*git, "rev-parse", "--quiet", "--verify", branch], check=False, capture_output=True)
    return ref if known.returncode else branch


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
    """Unpack an earlier job's results, where this one goes on; no member may lead out of the folder.

    Results that are there already and go on from the archive's are left as they are.

    Raises:
        JobError: it is no such archive, or the results that are there are of another campaign.
    """
    results = work / RESULTS
    with tarfile.open(archive) as tar:
        if others := [name for name in tar.getnames() if name.split("/")[0] != RESULTS]:
            raise JobError(f"--resume: expected an archive of this job's, got {archive} with {others[0]} in it")
        journal = f"{RESULTS}/{JOURNAL}"
        member = tar.extractfile(journal) if journal in tar.getnames() else None
        theirs = member.read() if member is not None else b""
        ours = (results / JOURNAL).read_bytes() if (results / JOURNAL).exists() else b""
        if results.is_dir() and ours.startswith(theirs):
            print(f"{results} has all that {archive} has; going on with that")
            return
        if not theirs.startswith(ours):
            expected = f"expected what goes on from {results}, got {archive} with other steps"
            raise JobError(f"--resume: {expected}; leave it out, or name another --work")
        tar.extractall(work, filter="data")


def pack(results: Path, archive: Path) -> None:
    """One .tar.gz of everything but the made-up checkpoints; it appears whole. Raises OSError."""
    partial = archive.with_name(f".{archive.name}.partial")
    left_out = f"{RESULTS}/{LEFT_OUT}"
    try:
        with tarfile.open(partial, "w:gz") as tar:
            tar.add(results, RESULTS, filter=lambda member: None if member.name == left_out else member)
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
