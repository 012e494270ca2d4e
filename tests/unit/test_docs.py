"""The documentation is true: its tables are the results', its messages are the code's, its pages are in the menu."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_no_table_is_stale(page):
    assert tables.renewed(page) == page.read_text(encoding="utf-8"), "run python docs/tables.py"


def test_every_table_is_on_a_page():
    named = {match[2] for page in tables.pages() for match in tables.MARKED.finditer(page.read_text(encoding="utf-8"))}
    assert named == set(tables.tables())


def test_a_stale_table_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: frontier-short -->\n\n| old |\n\n<!-- /table -->\nafter\n")
    text = tables.renewed(page)
    assert text != page.read_text() and "| old |" not in text and "`gate+global`" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    page.write_text("<!-- table: frontiers -->\n<!-- /table -->")
    with pytest.raises(ValueError, match="frontiers.*there are frontier-short"):
        tables.renewed(page)


def test_tables_of_results_say_what_they_were_made_with():
    for name, make in tables.tables().items():
        if not name.startswith(("models", "arguments", "example")) and not name.endswith("-options"):
            last = make().strip().splitlines()[-1]
            assert last.startswith("*Made with: machine ") and "dtype " in last and "commit " in last, name


def messages() -> str:
    """Every text in the code, with … where an f-string has a value, a line each."""
    texts = []
    for path in [*ROOT.glob("gatekv/**/*.py"), *ROOT.glob("recipes/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value.replace("{}", "…"))
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_that_the_code_has():
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(quoted) >= 20
    said = messages()
    assert not [text for text in quoted if text not in said]


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = set(re.findall(r"[\w/-]+\.md", str(menu)))
    assert named == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"ablation/table.md"}


def test_the_lab_notes_index_names_every_page_newest_first():
    text = (DOCS / "lab-notes" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[.*\]\((.+?)\) \|$", text, re.M)
    assert {name for _, name in rows} == {p.name for p in (DOCS / "lab-notes").glob("*.md")} - {"index.md"}
    assert [day for day, _ in rows] == sorted((day for day, _ in rows), reverse=True)
    for day, name in rows:
        dates = re.findall(r"^## (\d{4}-\d\d-\d\d)", (DOCS / "lab-notes" / name).read_text(encoding="utf-8"), re.M)
        assert dates[0] == day and dates == sorted(dates, reverse=True), name


def test_the_site_builds(tmp_path):
    """Strict: a broken link, a page outside the menu, a name without a docstring are errors."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    pages = [p.read_text(encoding="utf-8") for p in (tmp_path / "site").rglob("*.html")]
    loaded = [
        src for page in pages for src in re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(https?://[^\" >]+)", page)
    ]
    loaded += [x for page in pages for x in re.findall(r"<link[^>]*stylesheet[^>]*href=\"?(https?://[^\" >]+)", page)]
    assert not loaded, "the site must work without a network"
