"""RULER's synthetic tasks by its public definition (NVIDIA/RULER, synthetic.yaml): counts, ranges, prompts.

Its words come from a package's lists and its essays from a web site; here both come from the held-out texts. The rest
is as there: what is counted, drawn and said, and that a prompt with what is generated fills a given length.
"""

import math
import random
import re
import string
import uuid
from typing import TYPE_CHECKING, Any, cast

from gatekv.evaluation.tasks.item import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type} for {key} is: {value}."
EXAMPLE = 15  # lines of noise in variable tracking's solved example, which has about 500 tokens
DEPTHS = 40  # evenly spaced places for needles in essays
TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # generated at most
NIAH = {"keys": 1, "values": 1, "queries": 1, "haystack": "essay", "key": "words", "value": "numbers"}
TASKS: dict[str, dict[str, Any]] = {
    "niah_single_1": {"family": "niah", **NIAH, "haystack": "noise"},
    "niah_single_2": {"family": "niah", **NIAH},
    "niah_single_3": {"family": "niah", **NIAH, "value": "uuids"},
    "niah_multikey_1": {"family": "niah", **NIAH, "keys": 4},
    "niah_multikey_2": {"family": "niah", **NIAH, "haystack": "needle"},
    "niah_multikey_3": {"family": "niah", **NIAH, "haystack": "needle", "key": "uuids", "value": "uuids"},
    "niah_multivalue": {"family": "niah", **NIAH, "values": 4},
    "niah_multiquery": {"family": "niah", **NIAH, "keys": 4, "queries": 4},
    "vt": {"family": "vt", "chains": 1, "hops": 4},
    "cwe": {"family": "cwe", "common": 10, "often": 30, "rarely": 3},
    "fwe": {"family": "fwe", "alpha": 2.0, "wanted": 3, "letters": 6},
}
PROMPTS = {  # (before the context, question, start of the answer)
    "niah_one": (
        "A special magic {type} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the {type} afterwards.\n",
        "What is the special magic {type} for {query} mentioned in the provided text?",
        " The special magic {type} for {query} mentioned in the provided text is",
    ),
    "niah_many": (
        "Some special magic {type} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {type} afterwards.\n",
        "What are all the special magic {type} for {query} mentioned in the provided text?",
        " The special magic {type} for {query} mentioned in the provided text are",
    ),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        "Question: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
        "the value {query}, they are: ",
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n",
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
}


def _row(prompt: str, context: str, answer: list[str], **fields: object) -> dict:
    before, question, prefix = (part.format(**fields) for part in PROMPTS[prompt])
    return {"context": before + context + "\n", "question": question, "answer_prefix": prefix, "answer": answer}


def _drawn(kind: str, words: list[str], rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return "-".join(rng.sample(words, 2))


def _niah(
    spec: dict[str, Any], texts: list[str], words: list[str], length: int, rng: random.Random, units: int
) -> dict:
    key, value = (lambda: _drawn(spec["key"], words, rng)), (lambda: _drawn(spec["value"], words, rng))
    facts = [(key(), [value() for _ in range(spec["values"])]) for _ in range(spec["keys"])]
    needles = [NEEDLE.format(type=spec["value"], key=k, value=v) for k, values in facts for v in values]
    rng.shuffle(needles)
    if spec["haystack"] == "essay":
        text = rng.choice(texts).split()
        start = rng.randrange(len(text))
        text = (text[start:] + text * (units // len(text) + 1))[:units]  # from its start again, where it ends
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(text))
        depths = sorted(rng.sample(range(DEPTHS), len(needles)))
        for depth, needle in reversed(list(zip(depths, needles))):
            sentences.insert(len(sentences) * depth // (DEPTHS - 1), needle)
        context = " ".join(sentences)
    else:
        other = lambda: NEEDLE.format(type=spec["value"], key=key(), value=value())  # noqa: E731
        lines = [NOISE if spec["haystack"] == "noise" else other() for _ in range(units)]
        for at, needle in zip(sorted(rng.sample(range(units), len(needles)), reverse=True), needles):
            lines.insert(at, needle)
        context = "\n".join(lines)
    asked = rng.sample(facts, spec["queries"])
    *rest, last = [k for k, _ in asked]
    query = ", ".join(rest) + ", and " + last if rest else last
    one = spec["queries"] * spec["values"] == 1
    kind = spec["value"][:-1] if one else spec["value"]
    answer = [v for _, values in asked for v in values]
    return _row("niah_one" if one else "niah_many", context, answer, type=kind, query=query)


def _chains(spec: dict[str, Any], letters: int, rng: random.Random, units: int) -> dict:
    """One prompt of variable tracking, whose names have so many letters."""
    hops, drawn = spec["hops"], cast("set[str]", set())
    while len(drawn) < spec["chains"] * (hops + 1):
        drawn.add("".join(rng.choices(string.ascii_uppercase, k=letters)))
    names = sorted(drawn)
    rng.shuffle(names)
    chains = [names[i : i + hops + 1] for i in range(0, len(names), hops + 1)]
    values, lines = [str(rng.randrange(10000, 99999)) for _ in chains], [NOISE] * units
    for chain, value in zip(chains, values):
        places = sorted(rng.sample(range(len(lines)), len(chain)))
        said = [f"VAR {chain[0]} = {value}", *[f"VAR {b} = VAR {a} " for a, b in zip(chain, chain[1:])]]
        for shift, (place, line) in enumerate(zip(places, said)):
            lines.insert(place + shift, line)
    return _row("vt", "\n".join(lines), chains[0], query=values[0], count=hops + 1)


def _vt(spec: dict[str, Any], texts: list[str], words: list[str], length: int, rng: random.Random, units: int) -> dict:
    """One chain behind one solved example, whose names have three letters."""
    example, row = _chains(spec, 3, rng, EXAMPLE), _chains(spec, 5, rng, units)
    shown = example["context"] + example["question"] + example["answer_prefix"] + " " + " ".join(example["answer"])
    return row | {"context": f"{shown}\n\n{row['context']}"}


def _list(names: list[str]) -> str:
    return " ".join(f"{i}. {name}" for i, name in enumerate(names, 1))


def _cwe(spec: dict[str, Any], texts: list[str], words: list[str], length: int, rng: random.Random, units: int) -> dict:
    def counted(number: int, often: int, rarely: int) -> dict:
        drawn = rng.sample(words, number)
        common, others = drawn[: spec["common"]], drawn[spec["common"] :]
        listed = common * often + others * rarely
        rng.shuffle(listed)
        return _row("cwe", _list(listed), common)

    short = length < 4096
    example = counted(20, 3, 1) if short else counted(40, 10, 3)
    row = counted(units, 6, 1) if short else counted(units, spec["often"], spec["rarely"])
    shown = example["context"] + example["question"] + example["answer_prefix"] + " " + _list(example["answer"])
    return row | {"context": f"{shown}\n{row['context']}"}


def _fwe(spec: dict[str, Any], texts: list[str], words: list[str], length: int, rng: random.Random, units: int) -> dict:
    """The k-th most frequent of length/50 coded words stands there units · k^-alpha / zeta(alpha) times; the first is
    dots, which do not count."""
    drawn: set[str] = set()
    while len(drawn) < max(spec["wanted"] + 1, (length - TOKENS["fwe"]) // 50):
        drawn.add("".join(rng.choices(string.ascii_lowercase, k=spec["letters"])))
    coded = sorted(drawn)
    rng.shuffle(coded)
    coded[0] = "..."
    zeta = math.pi**2 / 6  # zeta(2)
    counts = [int(units * k ** -spec["alpha"] / zeta) for k in range(1, len(coded) + 1)]
    text = [word for word, count in zip(coded, counts) for _ in range(count)]
    rng.shuffle(text)
    return _row("fwe", " ".join(text), coded[1 : 1 + spec["wanted"]])


FAMILIES = {"niah": _niah, "vt": _vt, "cwe": _cwe, "fwe": _fwe}
FEWEST = {"niah": 4, "vt": 5, "cwe": 20, "fwe": 64}  # units, of lines or words, that leave an answer to find


def make(
    name: str, tokenizer: "PreTrainedTokenizerBase", texts: list[str], length: int, seed: str, frame: int = 0
) -> dict:
    """A row of one of TASKS, as long as fits into `length` tokens with the start of the answer, what is generated, and
    `frame` tokens of a chat template.

    Row: context, question, answer_prefix, answer (a list of references), max_new_tokens.

    Raises:
        ValueError: held-out texts with too few words, or a length too short for the task.
    """
    spec = TASKS[name]
    family = spec["family"]
    words = sorted({word for text in texts for word in re.findall(r"\b[a-z]{4,10}\b", text)})

    def write(units: int) -> dict:
        return FAMILIES[family](spec, texts, words, length, random.Random(seed), units)

    def fits(units: int) -> bool:
        row = write(units)
        return sum(len(encode(tokenizer, row[k])) for k in ("context", "question", "answer_prefix")) <= room

    room, most = length - TOKENS[family] - frame, len(words) if family == "cwe" else length
    low, high = FEWEST[family], max(most, FEWEST[family])
    if len(words) < 40:
        raise ValueError(f"the held-out texts have {len(words)} different words: give longer ones with --data.")
    if not fits(low):
        raise ValueError(f"ruler_{name} does not fit into {length} tokens: use --tokens 1024 or more.")
    while low < high:  # the largest number of units that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return write(low) | {"max_new_tokens": TOKENS[family]}
