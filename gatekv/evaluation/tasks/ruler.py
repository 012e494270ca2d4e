"""`ruler`: our own generators of RULER's families (2404.06654); samples cycle through them.

RULER counts how many references a generated answer contains. Here the answer is teacher-forced (see `item`): the
question fixes the order of the references, and one is found if each of its tokens is the arg-max behind the true ones
before it. Common words have no order, so each of them is asked with the others given.
"""

import random
import uuid
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from gatekv.evaluation.tasks.item import Item, References, Scores, encode, placed, prose, references, written
from gatekv.facts import WORDS, chat_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (context, question, asks, scorer)
Drawn = tuple[list[int], list[int], list[tuple[list[int], list[int]]], Callable[..., Scores]]
FACT = "One of the special magic numbers for {w} is {n}."
NAMES = WORDS["heldout"]
KEYS, VALUES, HOPS, COMMON, FREQUENT = 4, 4, 4, 3, 3
COMMON_SHARE = 0.5  # of the list's words that are common ones; RULER's .5 (10 words 30 times, 100 words 3 times)
ZETA = 2.0  # frequent words: the k-th most frequent is drawn in proportion to k ** -ZETA, as in RULER


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10000, 100000))


def _hidden(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    tokens: int,
    rng: random.Random,
    facts: list[str],
    question: str,
    lead: str,
) -> tuple[list[int], list[int]]:
    """(context, question) of facts at random depths of real text, in the order given."""
    room = tokens - len(encode(tokenizer, "\n".join(facts)))
    text = prose(tokenizer, texts, max(room, 16), rng) + "."
    text = written(text, facts, sorted(rng.random() for _ in facts))
    return _asked(tokenizer, text, question, lead)


def _asked(tokenizer: "PreTrainedTokenizerBase", text: str, question: str, lead: str) -> tuple[list[int], list[int]]:
    frame = chat_frame(tokenizer)
    return encode(tokenizer, frame[0] + text), encode(tokenizer, f"\n\n{question}{frame[1]}{lead}")


def _with(
    asked: tuple[list[int], list[int]], lead: list[int], answer: list[int], score: Callable[..., Scores]
) -> Drawn:
    """(context, question, asks, score) of a question that one answer follows."""
    context, question = asked
    return context, question + lead, [([], answer)], score


def _single(tokenizer: "PreTrainedTokenizerBase", texts: list[str], tokens: int, rng: random.Random) -> Drawn:
    word, number = rng.choice(NAMES), _number(rng)
    what = f"the special magic number for {word}"
    asked = _hidden(
        tokenizer, texts, tokens, rng, [FACT.format(w=word, n=number)], f"What is {what}?", f"T{what[1:]} is"
    )
    return _with(asked, *references(tokenizer, [""], [number]))


def _multikey(tokenizer: "PreTrainedTokenizerBase", texts: list[str], tokens: int, rng: random.Random) -> Drawn:
    pairs = [(w, str(uuid.UUID(int=rng.getrandbits(128), version=4))) for w in rng.sample(NAMES, KEYS)]
    facts = [FACT.format(w=k, n=v).replace("numbers", "uuids") for k, v in pairs]
    key, value = rng.choice(pairs)
    what = f"the special magic uuid for {key}"
    asked = _hidden(tokenizer, texts, tokens, rng, facts, f"What is {what}?", f"T{what[1:]} is")
    return _with(asked, *references(tokenizer, [""], [value]))


def _multivalue(tokenizer: "PreTrainedTokenizerBase", texts: list[str], tokens: int, rng: random.Random) -> Drawn:
    word, numbers = rng.choice(NAMES), [_number(rng) for _ in range(VALUES)]
    facts = [FACT.format(w=word, n=n) for n in numbers]
    what = f"the special magic numbers for {word}"
    question = f"What are all {what}, in the order of the text?"
    asked = _hidden(tokenizer, texts, tokens, rng, facts, question, f"T{what[1:]} are, in the order of the text,")
    return _with(asked, *references(tokenizer, ["", *[","] * (VALUES - 1)], numbers))


def _multiquery(tokenizer: "PreTrainedTokenizerBase", texts: list[str], tokens: int, rng: random.Random) -> Drawn:
    words, numbers = rng.sample(NAMES, KEYS), [_number(rng) for _ in range(KEYS)]
    facts = [FACT.format(w=w, n=n) for w, n in zip(words, numbers)]
    order = rng.sample(range(KEYS), KEYS)
    names = [words[i] for i in order]
    question = f"What are the special magic numbers for {', '.join(names[:-1])} and {names[-1]}?"
    asked = _hidden(tokenizer, texts, tokens, rng, facts, question, f"The special magic number for {names[0]} is")
    pieces = ["", *[f". The special magic number for {w} is" for w in names[1:]]]
    return _with(asked, *references(tokenizer, pieces, [numbers[i] for i in order]))


def _variable_tracking(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], tokens: int, rng: random.Random
) -> Drawn:
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(HOPS + 1)]
    number = _number(rng)
    facts = [f"VAR {a} = {b}." for a, b in zip(names, [number, *[f"VAR {n}" for n in names]])]
    question = f"Find all variables that are assigned the value {number} in the text above, in the order of the text."
    lead = f"The variables that are assigned the value {number} are: VAR"
    asked = _hidden(tokenizer, texts, tokens, rng, facts, question, lead)
    return _with(asked, *references(tokenizer, ["", *[", VAR"] * HOPS], names))


def _counted(
    tokenizer: "PreTrainedTokenizerBase", tokens: int, draw: Callable[[], str], after: str, wanted: int
) -> tuple[list[str], list[str]]:
    """(words, the `wanted` most frequent of them): draw()'s words, about `tokens` tokens with `after` and a blank each.

    Drawn again while words tie for these places, since the answer would not be the only one.
    """
    for _ in range(200):
        words, used = [], 0
        while used < tokens:
            words.append(draw())
            used += len(encode(tokenizer, f"{after} {words[-1]}"))
        ranked = Counter(words).most_common(wanted + 1)
        if len({count for _, count in ranked}) == wanted + 1:
            return words, [word for word, _ in ranked[:wanted]]
    raise ValueError(f"words tie for frequency in contexts this short (tokens={tokens}): use --tokens 256 or more.")


def _common_words(tokenizer: "PreTrainedTokenizerBase", texts: list[str], tokens: int, rng: random.Random) -> Drawn:
    names = rng.sample(NAMES, len(NAMES))
    draw = lambda: rng.choice(names[:COMMON] if rng.random() < COMMON_SHARE else names[COMMON:])  # noqa: E731
    words, common = _counted(tokenizer, tokens, draw, ",", COMMON)
    question = f"What are the {COMMON} most common words in the list above?"
    lead = "The most common words are:"
    context, asked = _asked(tokenizer, "Below is a list of words: " + ", ".join(words) + ".", question, lead)
    asks, spans = [], []
    for i, word in enumerate(common):
        others = "".join(f" {n}. {w}" for n, w in enumerate(common[:i] + common[i + 1 :], 1)) + f" {COMMON}."
        answer = encode(tokenizer, f" {word}")
        asks.append((encode(tokenizer, others), answer))
        spans.append((i, 0, len(answer)))
    return context, asked, asks, References(tuple(spans))


def _frequent_words(tokenizer: "PreTrainedTokenizerBase", texts: list[str], tokens: int, rng: random.Random) -> Drawn:
    coded = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(60)]
    weights = [(k + 1) ** -ZETA for k in range(len(coded))]
    words, top = _counted(tokenizer, tokens, lambda: rng.choices(coded, weights)[0], "", FREQUENT)
    question = f"What are the {FREQUENT} most frequent words in the coded text above, the most frequent first?"
    asked = _asked(tokenizer, "Read this coded text: " + " ".join(words), question, "The most frequent words are: 1.")
    return _with(asked, *references(tokenizer, ["", *[f" {n}." for n in range(2, FREQUENT + 1)]], top))


FAMILIES = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}


def ruler(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], mode: str, index: int, seed: int, tokens: int | None = None
) -> Item:
    """A sample of family number `index` mod 7, about 768 or `tokens` long; needles lie in held-out text.

    Score: `References`, the share found. Raises ValueError when the held-out texts or `tokens` are too short.
    """
    family = list(FAMILIES)[index % len(FAMILIES)]
    rng = random.Random(f"ruler/{seed}/{index}")
    context, question, asks, score = FAMILIES[family](tokenizer, texts, tokens or 768, rng)
    return placed(mode, context, question, asks, score=score, place={"family": family})
