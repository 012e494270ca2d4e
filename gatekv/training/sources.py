"""Where text comes from: files held in memory, Hub sets streamed block by block."""

import math
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from gatekv.textfiles import KNOWN, TEXT, as_text, kind, read_rows, read_text, said
from gatekv.training.streams import Corpus, HubSource, texts

if TYPE_CHECKING:
    from datasets import IterableDataset

BLOCK_TOKENS = 1 << 16  # that rows take from a block of a Hub set before the next one's turn; about a third of its text
NAMED = 10  # files that were left out, of which a warning gives the names


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


def _read_local(name: str, configuration: str, column: str, source: str) -> Iterable[str] | None:
    path = Path(name)
    if not path.exists():
        if kind(path):
            raise ValueError(f"data source {source!r} is not a file; give one of {KNOWN}, a folder, or a Hub name.")
        return None
    if configuration:
        raise ValueError(f"data source {source!r}: a file has no configuration; name a column as {name}::column.")
    if path.is_dir():
        return (text for file in _files(path) for text in _documents(file, column))
    if not kind(path):
        raise ValueError(f"data source {source!r} is a file of no known kind; known are {KNOWN}: rename or convert it.")
    if kind(path) in TEXT and column != "text":
        raise ValueError(f"data source {source!r}: a {kind(path)} file has no columns; leave {column!r} out.")
    return _documents(path, column)


def _files(folder: Path) -> list[Path]:
    """Files of known kinds in a folder and those below it, in the order of their paths; the others are warned of."""
    found, left = [], []
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            continue
        hidden = any(part.startswith(".") for part in inner.parts)
        if path.is_file() and kind(path) and not hidden:
            found.append(path)
        else:
            left.append(inner.as_posix())
    if left:
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        warnings.warn(
            f"data source {str(folder)!r}: left out {', '.join(left[:NAMED])}{more}; what is read is {KNOWN}, and no "
            "hidden files or links to folders.",
            stacklevel=2,
        )
    return found


def _documents(path: Path, column: str) -> Iterator[str]:
    """The texts of a file: itself, or its rows' column; rows that are null there are left out, as blank ones are."""
    name = f"data source {str(path)!r}"
    if kind(path) in TEXT:
        yield read_text(path, name)
        return
    for where, row in read_rows(path, name, column):
        if isinstance(row, dict):
            if column not in row:
                raise ValueError(
                    f"{where} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}: name one as "
                    f"{path}::column, or move what is no text elsewhere."
                )
            row, where = row[column], f"{where}, column {column!r}"
        elif row is not None and not isinstance(row, str):
            raise ValueError(f'{where} is {said(row)}: a row is a text, or an object with one as {{"{column}": …}}.')
        if row is not None:
            yield as_text(row, where)


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
    """All text of a file or of a folder's files, also deeper ones; of a Hub set the first documents.

    Files are .txt, .md, .jsonl, .json, .csv (each also as .gz) and .parquet; a folder's others are named in a warning.

    Args:
        source: path or Hub name; "name:configuration:column" picks what is not the default and the column "text".

    Raises:
        ValueError: nothing there, no text in it, or what cannot be read rightly: bytes that are no text, a broken line,
            a value that is none; says file, place and cure.
    """
    name, configuration, column = _parts(source)
    local = _read_local(name, configuration, column, source)
    if local is None:
        stream = _open_stream(name, configuration, source)
        return _corpus(islice(texts(stream, column, source), max_documents), source).text
    return _corpus(local, source).text


def open_source(source: str, length: int, seed: int) -> LocalSource | HubSource:
    """A source of text for rows of `length` tokens; names and errors as in `read_source`."""
    name, configuration, column = _parts(source)
    local = _read_local(name, configuration, column, source)
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
