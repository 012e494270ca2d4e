"""Tasks: what is cached, what is then asked of the cache, and how the answer is scored."""

import random
from dataclasses import dataclass
from pathlib import Path

from gatekv.facts import chat_frame, make_sample, paragraph_window
from gatekv.training.data import read_source

HELDOUT = Path(__file__).resolve().parents[2] / "data" / "sample" / "heldout"


@dataclass
class Item:
    """One cached context and the continuations asked of it, all as token ids.

    context: what is prefilled and compressed. asks: (query, answer) pairs, each on its own copy of the cache; the query
    is fed first, the answer is scored token by token, teacher-forced.
    """

    context: list[int]
    asks: list[tuple[list[int], list[int]]]


def heldout_texts(sources: list[str]) -> list[str]:
    """Texts that no gate was trained on: whole sources, or the bundled ones."""
    return [read_source(s) for s in (sources or sorted(str(p) for p in HELDOUT.glob("*.txt")))]


def niah_multikey(
    tokenizer, texts, mode: str, index: int, seed: int, tokens: int | None = None, wordings: str = "heldout"
) -> Item:
    """4 word -> number facts in 600-1000 tokens of real text, or about `tokens`; all are asked, each on its own.

    mode "agnostic": the context is compressed before the question is seen. "aware": the question is part of it; only
    its last token is fed to the compressed cache, so that the first answer token comes from what was kept.
    """
    rng = random.Random(f"niah/{seed}/{index}")
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    text, characters = rng.choice(texts), rng.randrange(2300, 3700)
    if tokens is not None:
        stretch = paragraph_window(text, tokens * 4, rng)
        characters = int(tokens * len(stretch) / max(1, len(encode(stretch))))
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
    context = encode(sample.context)
    asks = [(encode(q.query), encode(q.answer)) for q in sample.questions]
    if mode == "agnostic":
        return Item(context, asks)
    query, answer = asks[0]
    return Item(context + query[:-1], [(query[-1:], answer)])


def niah_seen(tokenizer, texts, mode, index, seed, tokens=None) -> Item:
    """`niah_multikey` in the trained wordings (words and text still held out)."""
    return niah_multikey(tokenizer, texts, mode, index, seed, tokens, wordings="train")


def ppl(tokenizer, texts, mode, index, seed, tokens: int | None = None, continuation: int = 128) -> Item:
    """A stretch of held-out text: 640 or `tokens` of it are compressed, the continuation's log-loss is taken."""
    prefix = tokens or 640
    rng = random.Random(f"ppl/{seed}/{index}")
    text = paragraph_window(rng.choice(texts), (prefix + continuation) * 8, rng)
    ids = tokenizer(text, add_special_tokens=False).input_ids[: prefix + continuation]
    return Item(ids[: prefix - 1], [(ids[prefix - 1 : prefix], ids[prefix:])])


TASKS = {"ppl": ppl, "niah_multikey": niah_multikey, "niah_seen": niah_seen}
MODES = ("agnostic", "aware")
