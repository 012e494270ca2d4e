"""`niah_multikey` and `niah_seen`: word -> number facts in real text."""

import random
from typing import TYPE_CHECKING

from gatekv.evaluation.tasks.item import Item, encode, placed
from gatekv.facts import chat_frame, make_sample, paragraph_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def niah_multikey(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    mode: str,
    index: int,
    seed: int,
    tokens: int | None = None,
    wordings: str = "heldout",
) -> Item:
    """4 word -> number facts in 600-1000 tokens of real text, or about `tokens`; all are asked, each on its own.

    mode "agnostic": the context is compressed before the question is seen. "aware": the question is part of it; only
    its last token is fed to the compressed cache, so that the first answer token comes from what was kept.
    """
    rng = random.Random(f"niah/{seed}/{index}")
    text, characters = rng.choice(texts), rng.randrange(2300, 3700)
    if tokens is not None:
        stretch = paragraph_window(text, tokens * 4, rng)
        characters = int(tokens * len(stretch) / max(1, len(encode(tokenizer, stretch))))
    sample = make_sample(
        text,
        rng,
        facts=4,
        characters=characters,
        split="heldout",
        wordings=wordings,
        frame=chat_frame(tokenizer),
        questions=4 if mode == "agnostic" else 1,
    )
    context = encode(tokenizer, sample.context)
    asks = [(encode(tokenizer, q.query), encode(tokenizer, q.answer)) for q in sample.questions]
    if mode == "agnostic":
        return Item(context, asks)
    query, answer = asks[0]
    return placed(mode, context, query, [([], answer)])


def niah_seen(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], mode: str, index: int, seed: int, tokens: int | None = None
) -> Item:
    """`niah_multikey` in the trained wordings (words and text still held out)."""
    return niah_multikey(tokenizer, texts, mode, index, seed, tokens, wordings="train")
