"""`recall`: repeat spans of the context word for word. Needs most tokens: eviction alone must fail."""

import random
from typing import TYPE_CHECKING

from gatekv.evaluation.tasks.item import Item, encode, placed, prose, token_accuracy
from gatekv.facts import chat_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPANS, CUE, ANSWER = 4, 6, 32  # passages of a context, words that name one, tokens of it to repeat
QUESTION = "Quote the text above word for word, starting from the words:"


def recall(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], mode: str, index: int, seed: int, tokens: int | None = None
) -> Item:
    """768 tokens or `tokens` of text; the cue is the start of a passage, the answer the 32 tokens that follow it.

    Score: `token_accuracy`, teacher-forced: the share of the 32 that are the arg-max, given the true ones before. It is
    above zero without any context, since some words follow from the words before: compare with the full cache.
    Agnostic: 4 passages, each asked on its own; aware: one. Raises ValueError for texts or `tokens` too short.
    """
    rng = random.Random(f"recall/{seed}/{index}")
    frame = chat_frame(tokenizer)
    text = prose(tokenizer, texts, tokens or 768, rng)
    blanks = [i for i, letter in enumerate(text) if letter == " "]
    asks: list[tuple[list[int], list[int]]] = []
    wanted = SPANS if mode == "agnostic" else 1
    for _ in range(200):
        if len(asks) == wanted:
            break
        words = text[rng.choice(blanks) + 1 :].split(" ", CUE) if blanks else []
        if len(words) <= CUE:
            continue
        cue, rest = " ".join(words[:CUE]), " " + words[CUE]
        answer = encode(tokenizer, rest[: ANSWER * 12])[:ANSWER]
        if "\n" in cue or len(answer) < ANSWER:  # a passage is asked for in one line
            continue
        asks.append((encode(tokenizer, f"\n\n{QUESTION} {cue}{frame[1]}{cue}"), answer))
    if len(asks) < wanted:
        raise ValueError(f"no passage of {ANSWER} tokens in a context this short: use --tokens 256 or more.")
    context = encode(tokenizer, frame[0] + text)
    if mode == "aware":
        return placed(mode, context, asks[0][0], [([], asks[0][1])], score=token_accuracy)
    return Item(context, asks, token_accuracy)
