"""Text files and files of rows, read exactly or refused with the file, the place and the cure.

Every file with data that a user names is opened here: encodings, line ends and compression have one answer.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

TEXT, ROWS = (".txt", ".md"), (".jsonl", ".json", ".csv", ".parquet")
KINDS = (*TEXT, *ROWS)
KNOWN = f"{', '.join(KINDS[:-1])} (each also as .gz) and .parquet"
# The longer marks first: UTF-32's begins with UTF-16's.
MARKS = [(codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig")]
MARKS += [(codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
FIELD_LIMIT = 2**31 - 1  # characters of a CSV field; csv's own limit of 131072 is less than a book


def kind(path: str | Path) -> str:
    """One of KINDS, by the name without its .gz; "" for a file of another kind."""
    name = Path(path).name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in KINDS and not name.endswith(".parquet.gz") else ""


def read_text(path: str | Path, name: str) -> str:
    """The text of a file, gzipped or not, with \\n at the ends of its lines. name: of the file, for messages.

    It is UTF-8 unless it begins with the mark of UTF-16 or UTF-32; a mark is not part of the text.

    Raises:
        ValueError: broken gzip, bytes of another encoding, no text at all. OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":  # by content: browsers and tools unpack, or do not, without renaming
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is gzipped, but broken ({error}): get or compress the file anew.") from error
    encoding = next((encoding for mark, encoding in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        place = f"byte {data[error.start]:#04x} at offset {error.start}"
        if encoding.startswith("utf-8"):
            line = data.count(b"\n", 0, error.start) + 1
            place += f", line {line}"
        raise ValueError(
            f"{name} is no {encoding.removesuffix('-sig').upper()} text ({place}): if it is a text in another "
            "encoding, save it as UTF-8 (iconv -f latin1 -t utf-8); if it is none, leave it out."
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{name} holds NUL characters, as binary files do and UTF-16 without its mark: save it as UTF-8 if it is a "
            "text, else leave it out."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: str | Path, name: str, column: str = "") -> Iterator[tuple[str, object]]:
    """(where it stands, for messages; the row) of each row of a file of one of the kinds ROWS.

    A row is what JSON has there, for .csv an object of texts by the names in the first line. A file of no kind is read
    as JSON lines.

    Args:
        name: of the file, for messages. column: the only one to read, where columns can be read apart (parquet).

    Raises:
        ValueError: as `read_text`; a line that is no JSON, a line of CSV that the header does not fit, no such column.
    """
    suffix = kind(path)
    if suffix == ".parquet":
        return _parquet_rows(path, name, column)
    text = read_text(path, name)
    if suffix == ".csv":
        return iter(_csv_rows(text, name))
    return _json_rows(text, name) if suffix == ".json" else json_lines(text, name)


def json_lines(text: str, name: str) -> Iterator[tuple[str, object]]:
    """(where it stands, value) of each line of JSON that is not blank; ValueError for a line that is none."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold its other separators
        line = line.lstrip("\ufeff")  # files with marks that were joined
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            value = json.loads(line, strict=False)  # tabs and the like in a string are plain enough
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where} is not JSON: {str(error).rstrip('.')}; mend or leave out the line. Each line is whole by "
                "itself; one array over several lines is a .json file."
            ) from error
        if isinstance(value, list):
            raise ValueError(
                f"{where} is no JSON object or text but an array: give each row a line, or name "
                "a file that is one array .json."
            )
        yield where, value


def _json_rows(text: str, name: str) -> Iterator[tuple[str, object]]:
    """Of an array its elements; anything else is one row. Many .json files in use are JSON lines."""
    if not text.strip():
        return iter(())
    try:
        whole = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        first = next(line for line in text.split("\n") if line.strip())
        try:
            lines = isinstance(json.loads(first, strict=False), (dict, str))
        except (ValueError, RecursionError):
            lines = False
        if lines:
            return json_lines(text, name)
        raise ValueError(
            f"{name} is not JSON: {str(error).rstrip('.')}; mend it there. A .json file is one array of rows, or a row "
            "a line."
        ) from error
    rows = whole if isinstance(whole, list) else [whole]
    return ((f"{name}, row {i}", row) for i, row in enumerate(rows, 1))


def _csv_rows(text: str, name: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    limit = csv.field_size_limit(FIELD_LIMIT)  # of the whole process, so nothing may be yielded before it is set back
    # strict: a quote that is never closed would else swallow the rest of the file without a word
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, last = next(reader, []), reader.line_num
        if doubled := sorted({c for c in header if header.count(c) > 1}):
            raise ValueError(f"{name}, line 1 names the column {doubled[0]!r} twice: rename one.")
        for row in reader:
            where, last = f"{name}, line {last + 1}", reader.line_num
            if row and len(row) != len(header):
                raise ValueError(
                    f"{where} has {len(row)} fields where line 1 names {len(header)}: separate by commas, and put "
                    'texts that hold commas or line ends in "quotes".'
                )
            found += [(where, dict(zip(header, row)))] if row else []
    except csv.Error as error:
        raise ValueError(
            f'{name}, line {reader.line_num} is not CSV: {error}; close every quote, and write one in a text as "".'
        ) from error
    finally:
        csv.field_size_limit(limit)
    return found


def _parquet_rows(path: str | Path, name: str, column: str) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{name}: to read .parquet files, pip install gatekv[data].") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column and column not in (names := file.schema_arrow.names):
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(names)}: name one as {path}::column.")
        batches = file.iter_batches(columns=[column] if column else None)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is no parquet file that can be read ({error}): get or write it anew.") from error


def said(value: object) -> str:
    """What a value is, in words for messages."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return f"{'a truth value' if isinstance(value, bool) else 'a number'}, {json.dumps(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value))}" if value else "an empty object"
    if isinstance(value, (list, tuple)):
        return f"a list whose first element is {said(value[0])}" if value else "an empty list"
    return "a text" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def as_text(value: object, where: str) -> str:
    """The text that a value is; of a list of parts, {"type": "text", "text": …}, their texts one after the other.

    Raises:
        ValueError: any other value, a part that is no text (images), half of a surrogate pair; says `where`.
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "".join(_part(part, f"{where}, part {i}") for i, part in enumerate(value, 1))
    if not isinstance(value, str):
        raise ValueError(
            f'{where} is {said(value)}: write it as one text, or as a list of {{"type": "text", "text": …}}.'
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {value[error.start]!a}, half of a character, at {error.start}: write the character whole."
        ) from error
    return value


def _part(part: dict, where: str) -> str:
    kind_, text = part.get("type", "text"), part.get("text")
    if kind_ != "text":
        raise ValueError(f"{where} is of type {kind_!r}: only text can be learned; leave the part or the row out.")
    if not isinstance(text, str):
        raise ValueError(f'{where} is {said(part)}: a part is {{"type": "text", "text": …}}.')
    return text
