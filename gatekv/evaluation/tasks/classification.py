"""`classification`: which choice is likeliest behind the compressed context; generated, or from a JSONL file.

With no file: who owns which thing, four statements written into held-out text. All four owners are the choices of every
question, so that without the context one is as likely as another: chance is .25.
"""

import random
from typing import TYPE_CHECKING

from gatekv.evaluation.tasks.item import Choices, Item, encode, placed, prose, written
from gatekv.facts import WORDS, chat_frame
from gatekv.questions import prompt_ids, read_lines, with_choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWNERS = "Anna Peter Maria George Helen Frank Julia Martin Alice Robert".split()
STATEMENTS = 4
FACT, QUESTION, LEAD = "The {w} belongs to {o}.", "Who does the {w} belong to?", "The {w} belongs to"


def load_choices(path: str) -> list[dict]:
    """Lines of a JSONL file: context, question, choices (a list of texts), answer (its index, or the text itself).

    Raises:
        ValueError: no such file, no line, or a line that is not so, by number.
    """
    return [with_choices(entry, where) for where, entry in read_lines(path, "--choices")]


def _owners(tokenizer: "PreTrainedTokenizerBase", texts: list[str], mode: str, rng: random.Random, tokens: int) -> Item:
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


def classification(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    mode: str,
    index: int,
    seed: int,
    tokens: int | None = None,
    examples: list[dict] | None = None,
) -> Item:
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
    entry = examples[order[index]]
    context, question = prompt_ids(tokenizer, entry["context"], entry["question"])
    asks: list[tuple[list[int], list[int]]] = [([], encode(tokenizer, choice)) for choice in entry["choices"]]
    return placed(mode, context, question, asks, score=Choices(((len(asks), entry["answer"]),)))
