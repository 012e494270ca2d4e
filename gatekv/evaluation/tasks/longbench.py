"""`longbench_*`: LongBench (2308.14508) with its prompts, truncation, metrics and exceptions; answers are generated.

longbench.json has, for each data set, its prompt, how many tokens are generated, its metric, and whether LongBench-E
has it too. Agnostic: the question is what the prompt says behind the context.
"""

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gatekv.evaluation.tasks.generated import Generated, chat_parts, picked, prompted
from gatekv.evaluation.tasks.item import encode
from gatekv.evaluation.tasks.text_metrics import METRICS, check_packages
from gatekv.questions import parse_lines, read_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "THUDM/LongBench"
SETS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PREFIX = "longbench_"
NAMES = [PREFIX + name for name in SETS] + [f"{PREFIX}{name}_e" for name, entry in SETS.items() if entry["e"]]
NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # examples or code, which go on as they are
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # of the answer, is scored
FIELDS = ("context", "input", "answers", "all_classes", "length")


def _lines(name: str, source: str) -> list[tuple[str, dict]]:
    if source and Path(source).is_dir():
        return read_lines(str(Path(source) / f"{name}.jsonl"), "--longbench")
    from huggingface_hub import hf_hub_download

    hub = source or HUB
    try:
        archive = hf_hub_download(hub, "data.zip", repo_type="dataset")
    except Exception as error:  # the Hub client raises a dozen types; all mean the same to the user
        raise ValueError(
            f"LongBench's data.zip cannot be had from {hub!r} ({error}): where there is a network, download it, unpack "
            "it, and name the folder of its .jsonl files with --longbench."
        ) from error
    with zipfile.ZipFile(archive) as file:
        member = next((m for m in file.namelist() if Path(m).name == f"{name}.jsonl"), None)
        if member is None:
            raise ValueError(f"data.zip of {hub!r} has no {name}.jsonl.")
        return parse_lines(file.read(member).decode("utf-8"), f"{hub} {member}")


def load_longbench(task: str, source: str = "") -> list[dict]:
    """All examples of a task, with FIELDS.

    Args:
        task: one of NAMES. source: a folder of LongBench's .jsonl files, or a Hub repository with its data.zip (data
            sets that need a script of their own are loaded by no `datasets` since 4.0); empty: the original one.

    Raises:
        ValueError: no such files, a line that is not so, or a package missing that the task's metric is.
    """
    name = task.removeprefix(PREFIX)
    check_packages(SETS[name.removesuffix("_e")]["metric"], task)
    lines = _lines(name, source)
    for where, entry in lines:
        if missing := [f for f in FIELDS if f not in entry]:
            raise ValueError(f"{where} lacks {', '.join(missing)}: it is no file of LongBench.")
    return [entry for _, entry in lines]


def truncated(tokenizer: "PreTrainedTokenizerBase", text: str, behind: int, limit: int) -> tuple[str, str]:
    """(context, question) of a text whose last `behind` characters are the question, its middle left out as text.

    Of more than `limit` tokens the first and the last half of as many are kept, decoded, and put together.
    """
    ids = tokenizer(text).input_ids
    if len(ids) > limit:
        half = limit // 2
        head, tail = (cast(str, tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:half], ids[-half:]))
        text, behind = head + tail, min(behind, len(tail))
    cut = len(text) - behind
    return text[:cut], text[cut:]


def longbench(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    mode: str,
    index: int,
    seed: int,
    tokens: int | None = None,
    *,
    task: str,
    examples: list[dict],
    room: int,
) -> Generated:
    """Example number `index` of a shuffled data set.

    Args:
        tokens: a prompt's at most, before the chat template; None: what is left of `room` for it.
        task: one of NAMES. examples: see `load_longbench`. room: tokens that the model can hold.

    Score: the best of the references by the data set's metric. Raises ValueError for too few examples, or a room that
    holds no prompt.
    """
    name = task.removeprefix(PREFIX)
    base = name.removesuffix("_e")
    entry, spec, chat = picked(examples, task, index, seed), SETS[base], base not in NO_CHAT
    frame = sum(len(encode(tokenizer, part)) for part in chat_parts(tokenizer)) if chat else 0
    limit = tokens or room - spec["tokens"] - frame
    if limit < 64:
        raise ValueError(f"{task} leaves {limit} tokens of {room} for a prompt: use a model with a longer context.")
    before, behind = spec["prompt"].split("{context}")
    question = behind.replace("{input}", entry["input"])
    parts = truncated(tokenizer, before + entry["context"] + question, len(question), limit)
    context, query = prompted(tokenizer, mode, *parts, chat)

    def score(ids: list[int]) -> float:
        said = cast(str, tokenizer.decode(ids, skip_special_tokens=True))
        if base in FIRST_LINE:
            said = said.lstrip("\n").split("\n")[0]
        return max(METRICS[spec["metric"]](said, answer, entry["all_classes"]) for answer in entry["answers"])

    stops = tuple(encode(tokenizer, "\n")[-1:]) if base == "samsum" else ()  # models go on with another dialogue
    words = "0-4k" if entry["length"] < 4000 else "4-8k" if entry["length"] < 8000 else "8k+"
    place = {"words": words} if name.endswith("_e") else None  # LongBench-E reports by length
    return Generated(context, query, spec["tokens"], score, stops, place)
