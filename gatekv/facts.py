"""Retrieval samples: facts (word -> number) written at random depths into real text, and questions about them.

Words and wordings come in two disjoint sets, so that evaluation asks for nothing the gates were trained on.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = {
    "train": (
        "river candle garden silver window pepper rocket blanket harbor violin lantern marble pillow tunnel basket "
        "falcon meadow button anchor spider copper teapot ladder saddle walnut mirror canyon helmet ribbon turtle "
        "barrel feather orchard pirate quartz shovel temple umbrella wagon zebra acorn bottle cactus dragon engine "
        "fabric guitar hammer island jacket kettle lemon magnet needle oyster parrot rabbit saucer trumpet velvet "
        "whistle almond bridge cheese donkey eagle flower ginger honey insect jungle knight leopard mango nickel"
    ).split(),
    "heldout": (
        "castle planet monkey carpet butter pencil desert forest hotel market winter doctor ticket school bicycle "
        "camera dinner pocket puzzle salmon thunder tomato valley wizard yellow cotton banjo cherry compass coral "
        "crystal dolphin emerald fountain glacier hazel igloo jasmine koala lobster"
    ).split(),
}

# (fact, question, start of the answer)
WORDINGS = {
    "train": [
        ("The code for {w} is {n}.", "What is the code for {w}?", "The code for {w} is"),
        ("Note: the number of {w} is {n}.", "What is the number of {w}?", "The number of {w} is"),
        ("Remember that {w} has the value {n}.", "Which value does {w} have?", "{W} has the value"),
        ("The password of the {w} account is {n}.", "What is the password of the {w} account?",
         "The password of the {w} account is"),
        ("In the register, {w} stands under {n}.", "Under which number does {w} stand in the register?",
         "In the register, {w} stands under"),
        ("Room {n} belongs to the {w} team.", "Which room belongs to the {w} team?", "The {w} team has room"),
        ("To open the {w} box, dial {n}.", "What must be dialled to open the {w} box?", "To open the {w} box, dial"),
        ("{W}: {n}.", "What is written next to {w}?", "{W}:"),
    ],
    "heldout": [
        ("One of the special magic numbers for {w} is {n}.", "What is the special magic number for {w}?",
         "The special magic number for {w} is"),
        ("The secret key of {w} is {n}.", "What is the secret key of {w}?", "The secret key of {w} is"),
        ("{W} costs exactly {n} coins.", "How many coins does {w} cost?", "{W} costs exactly"),
    ],
}  # fmt: skip


@dataclass
class Question:
    """query: text that follows the context, up to the answer; answer: the number, with its leading space."""

    query: str
    answer: str


@dataclass
class RetrievalSample:
    """context: the text that is cached, chat header included; questions about it, each to be asked on its own."""

    context: str
    questions: list[Question]


CHAT = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
BARE = ("", "\nAnswer: ", "\n")


def chat_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str, str]:
    """(before the context, before the answer, after the answer) of the tokenizer's chat format, ChatML or none."""
    return CHAT if "<|im_start|>" in (tokenizer.chat_template or "") else BARE


def paragraph_window(text: str, characters: int, rng: random.Random) -> str:
    """A random stretch of about `characters`, cut at blanks."""
    start = rng.randrange(max(1, len(text) - characters))
    start = text.find(" ", start) + 1
    return text[start : start + characters].rsplit(" ", 1)[0]


def make_sample(
    text: str,
    rng: random.Random,
    *,
    facts: int,
    characters: int,
    split: str,
    frame: tuple[str, str, str],
    wordings: str | None = None,
    questions: int = 1,
) -> RetrievalSample:
    """Write `facts` facts into a stretch of `text`.

    Args:
        text: the source. rng: decides everything. characters: of prose, before the facts.
        split: "train" or "heldout" words. wordings: split of the wordings, default the same.
        frame: see `chat_frame`. questions: how many of the facts are asked.
    """
    prose = paragraph_window(text, characters, rng)
    fact, question, lead = rng.choice(WORDINGS[wordings or split])
    words = rng.sample(WORDS[split], facts)
    numbers = [str(rng.randrange(10000, 100000)) for _ in words]
    sentences = prose.split(". ")
    for word, number in zip(words, numbers):
        at = rng.randrange(len(sentences) + 1)
        sentences.insert(at, fact.format(w=word, W=word.capitalize(), n=number).removesuffix("."))
    asked = rng.sample(range(facts), min(questions, facts))
    items = []
    for i in asked:
        names = {"w": words[i], "W": words[i].capitalize()}
        items.append(Question(f"\n\n{question.format(**names)}{frame[1]}{lead.format(**names)}", f" {numbers[i]}"))
    return RetrievalSample(frame[0] + ". ".join(sentences) + ".", items)
