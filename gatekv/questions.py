"""Questions with choices: how a line of a JSONL file is checked, and how it is written for the model.

Fine-tuning and evaluation both write them here, so that what is tuned is what is asked.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gatekv.facts import chat_frame
from gatekv.textfiles import TEXT, as_text, json_lines, kind, read_rows, said

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("context", "question", "choices", "answer")


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", context: str, question: str) -> tuple[list[int], list[int]]:
    """Token ids of (the context, the question up to where the answer starts); a choice follows, encoded by itself."""
    frame = chat_frame(tokenizer)
    parts = (frame[0] + context, f"\n\n{question}{frame[1]}")
    return tuple(tokenizer(part, add_special_tokens=False).input_ids for part in parts)


def read_lines(path: str, argument: str) -> list[tuple[str, dict]]:
    """(where it stands, for messages; the object) of each row of a .jsonl, .json, .csv (also .gz) or .parquet file.

    Raises:
        ValueError: no such file, nothing in it, or a row that cannot be read or is no object, by number.
    """
    if not Path(path).is_file():
        raise ValueError(f"{argument} {path!r} is not a file.")
    name = f"{argument} {path}"
    if kind(path) in TEXT:
        raise ValueError(f"{name} is a text, which has no rows: give a .jsonl, .json, .csv or .parquet file.")
    return _objects(read_rows(path, name), name)


def parse_lines(text: str, name: str) -> list[tuple[str, dict]]:
    """As `read_lines`, of the text of a JSONL file, which messages call `name`."""
    return _objects(json_lines(text, name), name)


def _objects(rows: Iterable[tuple[str, object]], name: str) -> list[tuple[str, dict]]:
    found: list[tuple[str, dict]] = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{where} is no JSON object but {said(row)}: write a row as {{"name": value, …}}.')
        found.append((where, row))
    if not found:
        raise ValueError(f"{name} has no line.")
    return found


def with_choices(entry: dict, where: str) -> dict:
    """The FIELDS of an entry, answer as an index into choices. answer: an index, a truth value, or one of the choices.

    Raises:
        ValueError: a field is missing or is not so; says `where`.
    """
    if missing := [f for f in FIELDS if f not in entry]:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    texts = {f: as_text(entry[f], f"{where}: {f}") for f in ("context", "question")}
    choices, answer = entry["choices"], entry["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"{where}: choices must be a list of at least two texts.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer must be an index into choices, or one of them.")
    choices = [as_text(c, f"{where}: choices, number {i}") for i, c in enumerate(choices, 1)]
    return {**texts, "choices": choices, "answer": int(answer)}
