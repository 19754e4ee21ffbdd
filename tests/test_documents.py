"""What the documents say of files is true: links lead somewhere, named files exist, the README stays short."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")
# A path in backticks that begins in one of our folders.
PATH = re.compile(r"`(?:python |bash )?((?:serving|plugins|kernels|bench|evals|scripts|tests|docs)/[\w./-]+)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
README_LINES = 150


def list_documents() -> list[Path]:
    """Markdown files of the repository, without results, fixtures and what is not ours."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    skipped = ("bench/results/", "tests/fixtures/", "tests/toy/")
    return [ROOT / name for name in listed.stdout.split("\n") if name and not name.startswith(skipped)]


@pytest.mark.parametrize("document", list_documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        assert (document.parent / target).exists(), f"{document.name}: {target}: expected a file, got none"
    for named in PATH.findall(text):
        path = named.rstrip(".,:")
        assert (ROOT / path).exists() or any(ROOT.glob(f"{path}*")), f"{document.name}: {path}: expected a file"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"{page.name})" in text, f"docs/{page.name}: expected a link in README.md, got none"
