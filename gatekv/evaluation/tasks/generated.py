"""Items whose answer is generated: a public benchmark's prompt behind the model's own chat template, scored as text."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Generated:
    """One cached context, a query behind it and a greedy answer.

    Attributes:
        context: token ids that are prefilled and compressed. query: fed to the compressed cache.
        tokens: generated at most. stops: token ids that end the answer besides the model's own, but not as its first.
        score: new token ids -> score in 0..1. place: as in `Item`.
    """

    context: list[int]
    query: list[int]
    tokens: int
    score: Callable[[list[int]], float]
    stops: tuple[int, ...] = ()
    place: dict | None = None


def chat_parts(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """(before, after) a user's message in the model's own template, without thinking; empty where it has none."""
    if not tokenizer.chat_template:
        return "", ""
    mark = "<the message>"
    text = cast(
        str,
        tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        ),
    )
    before, _, after = text.partition(mark)
    return before, after


def prompted(
    tokenizer: "PreTrainedTokenizerBase", mode: str, context: str, question: str, chat: bool, lead: str = ""
) -> tuple[list, list]:
    """Token ids (context, query) of a prompt: in mode "aware" of all of it, and only its last token is the query.

    chat: whether the chat template goes around it; without, the tokenizer's own first token goes before it.
    lead: the start of the answer.
    """
    before, after = chat_parts(tokenizer) if chat else ("", "")

    def first(text: str) -> list[int]:
        return list(tokenizer(before + text, add_special_tokens=not before).input_ids)

    if mode == "aware":
        ids = first(context + question + after + lead)
        return ids[:-1], ids[-1:]
    return first(context), list(tokenizer(question + after + lead, add_special_tokens=False).input_ids)


def picked(examples: list[dict], name: str, index: int, seed: int) -> dict:
    """Example number `index` of a data set in the order of a seed.

    Raises:
        ValueError: there are not so many.
    """
    if index >= len(examples):
        raise ValueError(f"{name} has {len(examples)} examples, and number {index + 1} is wanted: lower --n.")
    return examples[random.Random(f"{name}/{seed}").sample(range(len(examples)), len(examples))[index]]
