"""Where text comes from: files held in memory, Hub sets streamed block by block."""

import json
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from gatekv.training.streams import Corpus, HubSource, texts

if TYPE_CHECKING:
    from datasets import IterableDataset

FILES = (".txt", ".md", ".jsonl", ".parquet")
BLOCK_TOKENS = 1 << 16  # that rows take from a block of a Hub set before the next one's turn; about a third of its text


class LocalSource:
    """A file or folder, all of it in memory, the same for every row."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def corpus(self, index: int) -> Corpus:
        """What row `index` reads from."""
        return self._corpus


def _parts(source: str) -> tuple[str, str, str]:
    """(name, configuration, column) of "name:configuration:column", of which the last two may be missing or empty."""
    if Path(source).exists():
        return source, "", "text"
    name, configuration, column, *rest = *source.split(":"), "", ""
    if any(rest):
        raise ValueError(f"data source {source!r} has too many colons; it may have name:configuration:column.")
    return name, configuration, column or "text"


def _read_local(name: str, column: str, source: str) -> list[str] | None:
    path = Path(name)
    if path.is_dir():
        return [p.read_text(errors="replace") for p in sorted(path.glob("*.txt"))]
    if path.suffix in FILES and not path.is_file():
        raise ValueError(f"data source {source!r} is not a file; give .txt, .md, .jsonl, .parquet or a Hub name.")
    if path.suffix in (".txt", ".md"):
        return [path.read_text(errors="replace")]
    if path.suffix == ".jsonl":
        return [json.loads(line).get(column) for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        if column not in (names := pyarrow.parquet.read_schema(path).names):
            raise ValueError(f"data source {source!r} has no column {column!r}; it has {', '.join(names)}: "
                             "name one as file.parquet::column.")  # fmt: skip
        return pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    return None


def _open_stream(name: str, configuration: str, source: str) -> "IterableDataset":
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"data source {source!r} is not a file; for Hub names: pip install gatekv[data].") from error
    try:
        return load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # the Hub client raises a dozen types; all mean the same to the user
        raise ValueError(
            f"data source {source!r} is neither a file nor a data set that can be loaded: {error}"
        ) from error


def _corpus(documents: Iterable[object], source: str) -> Corpus:
    corpus = Corpus(documents)
    if not corpus.text:
        raise ValueError(f"data source {source!r} holds no text: check the path, and that rows have a 'text' field.")
    return corpus


def read_source(source: str, max_documents: int = 20000) -> str:
    """All text of a .txt/.md/.jsonl/.parquet file or a folder of .txt files; of a Hub set the first documents.

    Args:
        source: path or Hub name; "name:configuration:column" picks what is not the default and the column "text".

    Raises:
        ValueError: nothing there, or no text in it.
    """
    name, configuration, column = _parts(source)
    local = _read_local(name, column, source)
    if local is None:
        stream = _open_stream(name, configuration, source)
        return _corpus(islice(texts(stream, column, source), max_documents), source).text
    return _corpus(local, source).text


def open_source(source: str, length: int, seed: int) -> LocalSource | HubSource:
    """A source of text for rows of `length` tokens; names and errors as in `read_source`."""
    name, configuration, column = _parts(source)
    local = _read_local(name, column, source)
    if local is not None:
        return LocalSource(_corpus(local, source))
    rows = max(1, BLOCK_TOKENS // length)
    stream = _open_stream(name, configuration, source)
    return HubSource(stream, column, source, rows=rows, seed=seed, limit=max(1 << 16, 8 * length))


def weighted(entries: list[str]) -> dict[str, float]:
    """Sources and their weights from entries "source" and "source=weight"; weights are relative, 1 where none is given.

    Raises:
        ValueError: naming the entry whose weight is no number or negative; all weights zero.
    """
    weights: dict[str, float] = {}
    for entry in entries:
        name, sign, text = (entry, "", "1") if Path(entry).exists() else entry.rpartition("=")
        if not sign:
            name, text = entry, "1"
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not name or not 0 <= weight < math.inf:
            raise ValueError(f"data source {entry!r}: write its weight as a number of at least 0, as in name=0.3.")
        weights[name] = weights.get(name, 0.0) + weight
    if entries and not any(weights.values()):
        raise ValueError(f"data sources {', '.join(map(repr, entries))} all have weight 0: give one a weight above 0.")
    return {name: weight for name, weight in weights.items() if weight}
