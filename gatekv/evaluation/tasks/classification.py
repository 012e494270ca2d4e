"""`classification`: which choice is likeliest behind the compressed context; generated, or from a JSONL file.

With no file: who owns which thing, four statements written into held-out text. All four owners are the choices of every
question, so that without the context one is as likely as another: chance is .25.
"""

import json
import random
from pathlib import Path

from gatekv.evaluation.tasks.item import Choices, Item, encode, placed, prose, written
from gatekv.facts import WORDS, chat_frame

FIELDS = ("context", "question", "choices", "answer")
OWNERS = "Anna Peter Maria George Helen Frank Julia Martin Alice Robert".split()
STATEMENTS = 4
FACT, QUESTION, LEAD = "The {w} belongs to {o}.", "Who does the {w} belong to?", "The {w} belongs to"


def load_choices(path: str) -> list[dict]:
    """Lines of a JSONL file: context, question, choices (a list of texts), answer (its index, or the text itself).

    Raises:
        ValueError: no such file, no line, or a line that is not so, by number.
    """
    if not Path(path).is_file():
        raise ValueError(f"--choices {path!r} is not a file: give a JSONL file with {', '.join(FIELDS)} in each line.")
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"--choices {path}, line {number} is not JSON: {error}.") from error
        missing = [f for f in FIELDS if not isinstance(entry, dict) or f not in entry]
        if missing:
            raise ValueError(f"--choices {path}, line {number} lacks {', '.join(missing)}.")
        choices, answer = entry["choices"], entry["answer"]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"--choices {path}, line {number}: choices must be a list of at least two texts.")
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"--choices {path}, line {number}: answer must be an index into choices, or one of them.")
        found.append({**{f: entry[f] for f in FIELDS}, "answer": answer})
    if not found:
        raise ValueError(f"--choices {path} has no line: each must be JSON with {', '.join(FIELDS)}.")
    return found


def _owners(tokenizer, texts, mode: str, rng, tokens: int) -> Item:
    frame, things = chat_frame(tokenizer), rng.sample(WORDS["heldout"], STATEMENTS)
    owners = rng.sample(OWNERS, STATEMENTS)
    facts = [FACT.format(w=w, o=o) for w, o in zip(things, owners)]
    text = prose(tokenizer, texts, tokens - len(encode(tokenizer, " ".join([frame[0], *facts]))), rng) + "."
    text = written(text, facts, [rng.random() for _ in facts])
    choices = [encode(tokenizer, f" {o}") for o in sorted(owners)]
    truths = [(STATEMENTS, sorted(owners).index(o)) for o in owners]
    questions = [encode(tokenizer, f"\n\n{QUESTION}{frame[1]}{LEAD}".format(w=w)) for w in things]
    context = encode(tokenizer, frame[0] + text)
    if mode == "aware":
        return placed(mode, context, questions[0], [([], c) for c in choices], score=Choices((truths[0],)))
    return Item(context, [(q, c) for q in questions for c in choices], Choices(tuple(truths)))


def classification(tokenizer, texts, mode: str, index: int, seed: int, tokens: int | None = None,
                   examples: list[dict] | None = None) -> Item:  # fmt: skip
    """A context of about 640 or `tokens` tokens and who owns what in it, or example number `index` of a shuffled file.

    examples: see `load_choices`; they are used whole, whatever `tokens` is. Score: `Choices`, accuracy by summed
    log-likelihood. Generated: agnostic, four questions; aware, one. Raises ValueError for too few examples, or held-out
    texts that are too short.
    """
    if examples is None:
        return _owners(tokenizer, texts, mode, random.Random(f"classification/{seed}/{index}"), tokens or 640)
    if index >= len(examples):
        raise ValueError(f"--choices has {len(examples)} examples, and number {index + 1} is wanted: lower --n.")
    order = random.Random(f"classification/{seed}").sample(range(len(examples)), len(examples))
    entry, frame = examples[order[index]], chat_frame(tokenizer)
    context = encode(tokenizer, frame[0] + entry["context"])
    question = encode(tokenizer, f"\n\n{entry['question']}{frame[1]}")
    asks = [([], encode(tokenizer, choice)) for choice in entry["choices"]]
    return placed(mode, context, question, asks, score=Choices(((len(asks), entry["answer"]),)))
