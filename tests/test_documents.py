"""What the documents say is true: links lead somewhere, named files exist, commands have the flags that are shown."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")
# A path in backticks that begins in one of our folders.
PATH = re.compile(r"`(?:python |bash )?((?:serving|plugins|kernels|bench|evals|scripts|tests|docs)/[\w./-]+)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# A command of ours in a document or in the examples of a help, as far as the end of its line or of its backticks.
COMMAND = re.compile(r"(?:^|`|&& )((?:[A-Z_]+=\S+ )*(?:\S*bin/)?(?:python|laguna|torchrun|accelerate)\b[^`]*)")
OURS = ("bench/", "evals/", "scripts/")
FEWEST = 250
HELP_COLUMNS = 120
# `--check` has a parser of its own; the rest of the help says so.
SPECIAL = {("bench/certify.py", "--check")}


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


def test_lines_are_short() -> None:
    """Outside of tables and fences; a word or a link may be longer than a line."""
    long = [
        f"{document.relative_to(ROOT)}: {line[:60]}"
        for document in list_documents()
        if document.parent in (ROOT, ROOT / "docs")
        for line in FENCE.sub("", document.read_text(encoding="utf-8")).splitlines()
        if len(line) > HELP_COLUMNS and not line.lstrip().startswith(("|", "#", "<"))
    ]
    assert not long


def test_changelog_is_for_users() -> None:
    """What each change was, Git has."""
    assert len((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"{page.name})" in text, f"docs/{page.name}: expected a link in README.md, got none"


def test_documented_commands_have_the_flags_and_files_that_are_shown() -> None:
    helps, wrong, seen = read_helps(), [], 0
    for document, command in list_documented():
        name, words = find_command(command, helps)
        if name is None:
            continue
        seen += 1
        if name not in helps:
            wrong.append(f"{document}: {name}: expected a command of docs/reference")
            continue
        options = helps[name].partition("\nexamples:")[0]
        for word in words:
            flag = word.partition("=")[0].rstrip(",.;:)")
            if flag.startswith("--") and (name, flag) not in SPECIAL:
                if re.search(rf"(?<![\w-]){flag}(?![\w-])", options) is None:
                    wrong.append(f"{document}: {name} {flag}: expected a flag that it has")
            elif word.startswith(("tests/", *OURS)) and not (ROOT / word.partition("#")[0]).exists():
                wrong += [] if word.startswith("bench/results/") else [f"{document}: {word}: expected a file"]
    assert not wrong
    assert seen > FEWEST


def test_lines_of_helps_end_where_they_were_meant_to() -> None:
    lines = [line for text in read_helps().values() for line in text.splitlines() if len(line) > HELP_COLUMNS]
    assert not lines


def read_helps() -> dict[str, str]:
    """Every command's `--help`, by its name ("bench/ab.py", "laguna keys new"), as docs/reference has them."""
    folder = ROOT / "docs" / "reference"
    pages = [(folder / f"{name}.md").read_text(encoding="utf-8") for name in ("laguna", "bench", "evals", "scripts")]
    parts = [part for page in pages for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]]
    return {part.partition("\n")[0].removeprefix("python "): part for part in parts}


def list_documented() -> Iterator[tuple[str, str]]:
    """Commands that the documents and the helps show, with the document; lines that go on are one."""
    for document in [*list_documents(), ROOT / "bench" / "results" / "GPU_TODO.md"]:
        if document.name == "CHANGELOG.md":  # of what was
            continue
        text = re.sub(r"\\\n\s*", " ", document.read_text(encoding="utf-8"))
        for line in text.splitlines():
            yield from ((str(document.relative_to(ROOT)), found) for found in COMMAND.findall(line.strip()))


def find_command(command: str, helps: dict[str, str]) -> tuple[str | None, list[str]]:
    """Find a command's name and its words, up to a bare `--`; of what is not ours the name is None."""
    try:
        words = shlex.split(command.replace("…", " "), comments=True)
    except ValueError:  # a sentence
        words = command.split()
    starts = (at for at, word in enumerate(words) if word.startswith(OURS) or word.rpartition("/")[2] == "laguna")
    at = next(starts, None)
    if at is None:
        return None, []
    words = words[at : words.index("--") if "--" in words else None]
    name = "laguna" if words[0].endswith("laguna") else words[0].rstrip("/")
    name = "scripts/dante train" if name == "scripts/dante/train.py" else name
    for word in words[1:]:
        if not any(help == f"{name} {word}" or help.startswith(f"{name} {word} ") for help in helps):
            break
        name = f"{name} {word}"
    return name, words[1:]
