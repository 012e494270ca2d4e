"""mkdocs: files from the repository's root, as pages of the site, and links to files that are no pages, as text."""

import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
BORROWED = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def _as_page(text: str) -> str:
    """A root file's Markdown with its links as a page of docs/ would have them; other files' links become text."""

    def link(match: re.Match) -> str:
        target = match[2].removeprefix("docs/")
        page = match[2].startswith("docs/") and (ROOT / "docs" / target).is_file()
        there = page or target in BORROWED and (ROOT / target).is_file()
        return f"[{match[1]}]({target}{match[3] or ''})" if there else match[1]

    return LINK.sub(link, text)


def on_files(files, config):
    """Add the root's own pages."""
    for name in BORROWED:
        if (ROOT / name).is_file():
            text = _as_page((ROOT / name).read_text(encoding="utf-8"))
            files.append(File.generated(config, name, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown, page, config, files):
    """`../CONTRIBUTING.md`, as a reader of the repository follows it, is a page here; where it is missing, text."""
    for name in BORROWED:
        here = name if (ROOT / name).is_file() else None
        markdown = re.sub(rf"\[([^\]]+)\]\(\.\./{name}\)", rf"[\1]({here})" if here else r"\1", markdown)
    return markdown
