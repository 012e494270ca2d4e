"""`passkey`: one number in real text, over a grid of depths and lengths (2305.16300's task, in held-out text)."""

import random
from typing import TYPE_CHECKING

from gatekv.evaluation.tasks.item import Item, encode, numbered, placed, prose, written
from gatekv.facts import chat_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (640, 1280)  # a sixteenth of the shorter still holds 4 sinks and a window of 32
FACT, QUESTION, LEAD = "The pass key is {n}. Remember it.", "What is the pass key?", "The pass key is"


def passkey(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], mode: str, index: int, seed: int, tokens: int | None = None
) -> Item:
    """A key of five digits; samples walk through the grid of depths and lengths (or of depths at `tokens`).

    Score: `exact`, digits only. Raises ValueError when the held-out texts are too short.
    """
    rng = random.Random(f"passkey/{seed}/{index}")
    lengths = (tokens,) if tokens else LENGTHS
    depth, length = DEPTHS[index % len(DEPTHS)], lengths[index // len(DEPTHS) % len(lengths)]
    frame, number = chat_frame(tokenizer), str(rng.randrange(10000, 100000))
    fact = FACT.format(n=number)
    overhead = len(encode(tokenizer, frame[0] + fact))
    text = written(prose(tokenizer, texts, length - overhead, rng) + ".", [fact], [depth])
    question = encode(tokenizer, f"\n\n{QUESTION}{frame[1]}{LEAD}")
    question, answer = numbered(tokenizer, question, number)
    context = encode(tokenizer, frame[0] + text)
    return placed(mode, context, question, [([], answer)], place={"depth": depth, "tokens": length})
