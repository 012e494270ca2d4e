"""Examples to fine-tune on, from files of rows or data sets by name: a prompt, of which a part is to be compressed, and
the completion that follows it, which alone is learned. Row i is a pure function of (seed, i)."""

import random
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from gatekv.facts import chat_frame
from gatekv.questions import FIELDS, prompt_ids, read_lines, with_choices
from gatekv.textfiles import kind, said
from gatekv.training.conversation import conversation, written
from gatekv.training.packing import Row, collate
from gatekv.training.streams import RESERVED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODES = ("aware", "agnostic")
FORMS = "context + question + choices + answer, prompt + completion (texts or lists of messages), or messages"
HELD_SHARE, HELD_MOST = 0.1, 64  # of the examples that judge a run and calibrate it, and are never trained on


@dataclass(frozen=True)
class Example:
    """Token ids that follow each other. Without a question, context is the whole prompt."""

    context: list[int]
    question: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.question) + len(self.completion)


def read_entries(source: str, fields: dict, split: str = "train") -> list[tuple[str, dict]]:
    """(where it stands, entry) of each row of a file, or of a data set "name" or "name:configuration".

    Files are .jsonl, .json, .csv (each also as .gz) and .parquet.

    fields: how an entry is made of a line or row, field by field; see `filled`. Empty: it is one.

    Raises:
        ValueError: nothing there, a row that cannot be read or is no object, a column that does not exist.
    """
    if kind(source) or Path(source).is_file():
        rows = read_lines(source, "--data")
    else:
        rows = [(f"data set {source}, row {i}", row) for i, row in enumerate(_load(source, split))]
    return [(where, filled(fields, row, where)) for where, row in rows] if fields else rows


def _load(source: str, split: str) -> Iterable[dict]:
    name, _, configuration = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"--data {source!r} is no file; for Hub names: pip install gatekv[data].") from error
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the Hub client raises a dozen types; all mean the same to the user
        raise ValueError(f"--data {source!r} is neither a file nor a data set to be had: {error}") from error


def filled(fields: dict, row: dict, where: str) -> dict:
    """An entry made of a row. A text is a template over the row's columns, "{premise}" or "{choices[text]}"; a template
    that is one column and nothing else stands for its value, a list or number too.

    fields["labels"], if there is one, says what the row's `answer` may be, in the order of the choices.

    Raises:
        ValueError: a column that the row does not have, an answer that is none of the labels; says `where`.
    """

    def fill(value: object) -> object:
        if isinstance(value, list):
            return [fill(v) for v in value]
        if not isinstance(value, str):
            return value
        parts = list(string.Formatter().parse(value))
        if len(parts) == 1 and parts[0][0] == "" and parts[0][1]:
            return string.Formatter().get_field(parts[0][1], (), row)[0]
        for _, name, _, _ in parts:  # it would be written out as "None"
            if name and string.Formatter().get_field(name, (), row)[0] is None:
                raise ValueError(f"{name} is null")
        return value.format(**row)

    try:
        entry: dict[str, Any] = {name: fill(value) for name, value in fields.items()}
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{where} has no column {error} that `fields` names; it has {', '.join(map(str, row))}."
        ) from error
    except (AttributeError, TypeError, ValueError) as error:  # a null within a path, a brace that is not closed
        raise ValueError(f"{where} does not fit `fields` ({error}): mend the row or the template.") from error
    if "labels" in entry:
        labels = entry.pop("labels")
        if not isinstance(labels, list):
            raise ValueError(f"{where}: labels is {said(labels)}: let `fields` name a list, in the order of choices.")
        if entry.get("answer") not in labels:
            raise ValueError(f"{where}: answer {entry.get('answer')!r} is none of the labels {labels}.")
        entry["answer"] = labels.index(entry["answer"])
    return entry


def tokenised(tokenizer: "PreTrainedTokenizerBase", entry: dict, where: str) -> Example:
    """An entry as token ids.

    With choices it is written as `recipes/evaluate.py --tasks classification` asks it; a prompt or messages, with
    their tool calls, by the tokenizer's chat template, of which the last assistant message is learned.
    All end with the turn's end.

    Raises:
        ValueError: an entry of none of the FORMS, an empty prompt or completion, images, a template that does not write
            what is there or rewrites the prompt once an answer is there; says `where`. A tokenizer that knows no end.
    """
    frame = chat_frame(tokenizer)
    null = [str(name) for name, value in entry.items() if value is None]  # so tables have what other rows only have
    entry = {name: value for name, value in entry.items() if value is not None}
    talk = "messages" in entry or ("prompt" in entry and "completion" in entry)
    if all(field in entry for field in FIELDS) or (not talk and any(field in entry for field in FIELDS)):
        entry = with_choices(entry, where)
        context, question = prompt_ids(tokenizer, entry["context"], entry["question"])
        text = entry["choices"][entry["answer"]]
        end = _ids(tokenizer, frame[2].strip()) or _end(tokenizer)
        return Example(context, question, _ids(tokenizer, text) + end)
    if not talk:
        nothing = f" (and null: {', '.join(null)})" if null else ""
        alone = "; a text alone has no completion to learn: recipes/cpt.py trains on those" if "text" in entry else ""
        raise ValueError(
            f"{where} has {', '.join(map(str, entry)) or 'nothing'}{nothing}: give {FORMS}, or say with `fields` what "
            f"stands for them{alone}."
        )
    prompt, completion = written(tokenizer, conversation(entry, where), frame, where)
    end = [] if tokenizer.chat_template else _end(tokenizer)
    return Example(_ids(tokenizer, prompt), [], _ids(tokenizer, completion) + end)


def _end(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has neither a chat template nor an end-of-text token, so that no completion "
                         "could end: set tokenizer.eos_token, and save it with the model.")  # fmt: skip
    return [tokenizer.eos_token_id]


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


class Examples:
    """Rows of one example each, in an order drawn anew for every pass over them.

    A tenth of them, 64 at most, are never trained on: rows from RESERVED on read these, to judge and calibrate the run.

    Args:
        sources: see `read_entries`; fields, split: too.
        length: tokens of a row, at most. too_long: what to do with longer examples, "error" or "skip".
        mode: what of a prompt is compressed: "aware": all but its last token; "agnostic": the context, before the
            question is seen. seed: of the order.

    Raises:
        ValueError: examples that cannot be read, are too long or too few, or have no question to be agnostic of.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        sources: list[str],
        length: int,
        *,
        mode: str,
        seed: int,
        fields: dict | None = None,
        split: str = "train",
        too_long: str = "error",
    ) -> None:
        if not sources:
            raise ValueError("nothing to fine-tune on: name a file or a data set with --data.")
        self.mode, self.seed = mode, seed
        found = []
        for where, entry in (pair for source in sources for pair in read_entries(source, fields or {}, split)):
            example = tokenised(tokenizer, entry, where)
            if mode == "agnostic" and not example.question:
                raise ValueError(f"{where} has no question beside its context: use mode='aware'.")
            found.append(example)
        long = [len(e) for e in found if len(e) > length]
        if long and too_long == "error":
            raise ValueError(
                f"{len(long)} of {len(found)} examples are longer than sequence_length={length}, the longest has "
                f"{max(long)} tokens: raise it, or leave them out with --too_long skip."
            )
        found = [e for e in found if len(e) <= length]
        if len(found) < 2:
            raise ValueError(f"{len(found)} examples of at most {length} tokens are too few to train on and judge by.")
        random.Random("held").shuffle(found)  # whatever the seed: runs are judged by the same
        held = min(HELD_MOST, max(1, int(HELD_SHARE * len(found))))
        self.held, self.examples = found[:held], found[held:]
        self._order: tuple[int, list[int]] = -1, []

    @property
    def length(self) -> int:
        """Tokens of a usual row, from which calibration takes how much sinks and window weigh."""
        return int(median(len(e) for e in self.held))

    def _ordered(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            count = len(self.examples)
            self._order = epoch, random.Random(f"{self.seed}/{epoch}").sample(range(count), count)
        return self._order[1]

    def __getitem__(self, index: int) -> Row:
        if index in RESERVED:
            example = self.held[(index - RESERVED[0]) % len(self.held)]
        else:
            epoch, place = divmod(index, len(self.examples))
            example = self.examples[self._ordered(epoch)[place]]
        prompt, ids = (
            len(example.context) + len(example.question),
            example.context + example.question + example.completion,
        )
        weights = [0.0] * (prompt - 1) + [1.0] * len(example.completion) + [0.0]
        # The prompt's last token is never compressed: it is fed to what was kept and says the completion's first.
        split = len(example.context) if self.mode == "agnostic" else prompt - 1
        return Row(ids, weights, split, [len(ids)])

    def batch(self, first: int, rows: int, align: bool = False) -> dict[str, torch.Tensor]:
        """Rows first … first + rows - 1, as `gatekv.training.data.TrainingData.batch` gives them."""
        out = collate([self[i] for i in range(first, first + rows)], align)
        del out["segments"]
        return out
