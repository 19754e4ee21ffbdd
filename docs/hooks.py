"""MkDocs hooks: the README is the home page, and links to the repository's other files become their names.

The site holds the pages alone; raw results and sources stay in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as index.md, and the pictures that pages show."""
    home = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_rebase(home, ROOT)))
    shown = {
        picture
        for page in (ROOT / "docs").rglob("*.md")
        for mark, _, target, _ in LINK.findall(page.read_text(encoding="utf-8"))
        if mark and not (picture := (page.parent / target).resolve()).is_relative_to(ROOT / "docs")
    }
    shown |= {(ROOT / target).resolve() for mark, _, target, _ in LINK.findall(home) if mark}
    for picture in sorted(shown):
        files.append(File.generated(config, _place(picture), content=picture.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links out of docs/ at what the site has of them."""
    if page.file.src_uri == "index.md":
        return markdown
    return _rebase(markdown, (ROOT / "docs" / page.file.src_uri).parent, depth=page.file.src_uri.count("/"))


def _place(picture: Path) -> str:
    return f"pictures/{picture.relative_to(ROOT).as_posix().replace('/', '-')}"


def _rebase(markdown: str, folder: Path, depth: int = 0) -> str:
    up = "../" * depth

    def change(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups()
        path = (folder / target).resolve()
        if mark:
            return f"![{text}]({up}{_place(path)})" if not path.is_relative_to(ROOT / "docs") else link.group(0)
        if path == ROOT / "README.md":
            return f"[{text}]({up}index.md{anchor or ''})"
        if path.is_relative_to(ROOT / "docs"):
            return f"[{text}]({up}{path.relative_to(ROOT / 'docs').as_posix()}{anchor or ''})"
        return f"{text} (`{path.relative_to(ROOT).as_posix()}`)"

    return LINK.sub(change, markdown)
