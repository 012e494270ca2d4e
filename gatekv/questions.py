"""Questions with choices: how a line of a JSONL file is checked, and how it is written for the model.

Fine-tuning and evaluation both write them here, so that what is tuned is what is asked.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from gatekv.facts import chat_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("context", "question", "choices", "answer")


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", context: str, question: str) -> tuple[list[int], list[int]]:
    """Token ids of (the context, the question up to where the answer starts); a choice follows, encoded by itself."""
    frame = chat_frame(tokenizer)
    parts = (frame[0] + context, f"\n\n{question}{frame[1]}")
    return tuple(tokenizer(part, add_special_tokens=False).input_ids for part in parts)


def read_lines(path: str, argument: str) -> list[tuple[str, dict]]:
    """(where it stands, for messages; the object) of each line of a JSONL file.

    Raises:
        ValueError: no such file, nothing in it, or a line that is no JSON object, by number.
    """
    if not Path(path).is_file():
        raise ValueError(f"{argument} {path!r} is not a file.")
    return parse_lines(Path(path).read_text(encoding="utf-8"), f"{argument} {path}")


def parse_lines(text: str, name: str) -> list[tuple[str, dict]]:
    """As `read_lines`, of the text of such a file, which messages call `name`."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold its other separators
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is no JSON object.")
        found.append((where, entry))
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
    choices, answer = entry["choices"], entry["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"{where}: choices must be a list of at least two texts.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer must be an index into choices, or one of them.")
    return {**{f: entry[f] for f in FIELDS}, "answer": int(answer)}
