"""`ruler_<name>`: RULER's own tasks (2404.06654), its prompts, lengths and metrics, generated and scored as text.

A sample is a row {context, question, answer_prefix, answer, max_new_tokens}: of a set made before (`load_ruler`), or
made here by the public definition (`ruler_definition`). The task `ruler` has the same families, shorter, and is
teacher-forced.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from gatekv.evaluation.tasks.generated import Generated, chat_parts, picked, prompted
from gatekv.evaluation.tasks.item import encode
from gatekv.evaluation.tasks.ruler_definition import TASKS, TOKENS, make
from gatekv.evaluation.tasks.text_metrics import references_found
from gatekv.questions import read_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "ruler_"
FROM_SETS = ("qa_1", "qa_2")  # SQuAD and HotpotQA: their documents do not come with this library
NAMES = [PREFIX + name for name in (*TASKS, *FROM_SETS)]
COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens")
QUESTIONS = ("What is the special magic", "What are all the special magic", "Question:")


def _row(entry: dict, name: str, where: str) -> dict:
    """A row of a published set, or of a line that RULER's own scripts wrote: input, outputs, answer_prefix or none."""
    if all(column in entry for column in COLUMNS):
        return {column: entry[column] for column in COLUMNS}
    if "input" not in entry or "outputs" not in entry:
        raise ValueError(f"{where} lacks {', '.join(COLUMNS)}, and input and outputs too: it is no line of RULER.")
    text = entry["input"]
    cut = max(text.rfind(question) for question in QUESTIONS)
    if cut < 0:
        raise ValueError(f"{where}: no question of RULER's is in its input.")
    row = {"context": text[:cut], "question": text[cut:], "answer_prefix": entry.get("answer_prefix", "")}
    family = TASKS[name]["family"] if name in TASKS else "qa"
    return {**row, "answer": entry["outputs"], "max_new_tokens": TOKENS[family]}


def load_ruler(task: str, source: str) -> list[dict] | None:
    """All rows of one of NAMES; without a source None, which is to say that rows are made by the definition.

    Args:
        source: a folder with NAME/validation.jsonl or NAME.jsonl in it, as RULER's scripts write them, or a data set of
            the Hub with a column `task`, as simonjegou/ruler:4096 (name:configuration).

    Raises:
        ValueError: nothing there, no row of this task, a row that is not so, or no source where one is needed.
    """
    name = task.removeprefix(PREFIX)
    if not source:
        if name in FROM_SETS:
            raise ValueError(f"{task} needs documents that gatekv does not bring: load a set with --ruler.")
        return None
    if Path(source).is_dir():
        nested = Path(source) / name / "validation.jsonl"
        path = nested if nested.is_file() else Path(source) / f"{name}.jsonl"
        return [_row(entry, name, where) for where, entry in read_lines(str(path), "--ruler")]
    hub, _, configuration = source.partition(":")
    try:
        from datasets import load_dataset

        rows = load_dataset(hub, configuration or None, split="test")
    except Exception as error:  # no package, no network, no such set: all mean the same to the user
        raise ValueError(
            f"--ruler {source!r} is neither a folder nor a data set that can be loaded ({error}): pip install "
            "gatekv[eval], and name one as simonjegou/ruler:4096."
        ) from error
    rows = [_row(row, name, f"{source}, row {i}") for i, row in enumerate(rows) if row.get("task") == name]
    if not rows:
        raise ValueError(f"--ruler {source!r} has no row whose task is {name!r}.")
    return rows


def ruler_set(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    mode: str,
    index: int,
    seed: int,
    tokens: int | None = None,
    *,
    task: str,
    examples: list[dict] | None,
    room: int,
) -> Generated:
    """A sample of one of NAMES: row number `index` of shuffled `examples`, or, for None, one made by the definition.

    tokens: of a prompt that is made, chat template and what is generated included; None: 4096, RULER's shortest, or
    `room` if that is less.
    room: tokens that the model can hold.

    Score: the share of the references that stand in the answer, for qa_1 and qa_2 whether any does. Raises ValueError
    for too few examples, texts or `tokens` too short, and a prompt that the model cannot hold.
    """
    name = task.removeprefix(PREFIX)
    if examples is None:
        frame = sum(len(encode(tokenizer, part)) for part in chat_parts(tokenizer))
        row = make(name, tokenizer, texts, tokens or min(4096, room), f"{task}/{seed}/{index}", frame)
    else:
        row = picked(examples, task, index, seed)

    def score(ids: list[int]) -> float:
        found = references_found(cast(str, tokenizer.decode(ids, skip_special_tokens=True)), row["answer"])
        return float(any(found)) if name in FROM_SETS else sum(found) / len(found)

    context, query = prompted(tokenizer, mode, row["context"], row["question"], True, row["answer_prefix"])
    if (wanted := len(context) + len(query) + row["max_new_tokens"]) > room:
        raise ValueError(f"{task} needs {wanted} tokens of a model that holds {room}: use a shorter set, or --tokens.")
    return Generated(context, query, row["max_new_tokens"], score)
