"""What a user hands to `generate`, texts, chats or ids, as rows of token ids: a context, and what is asked of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE, BEHIND = "\n\n", "\nAnswer:"  # a question, where there is no chat template

KINDS = "a text, a list of texts, chat messages (a list of dicts), token ids (a tensor), or what a tokenizer returns"

Inputs = str | list | torch.Tensor | Mapping  # see KINDS
Lazy = Callable[[], "PreTrainedTokenizerBase"]


@dataclass
class Prompts:
    """One batch of prompts.

    Attributes:
        rows: token ids of each prompt, all real. width: of the batch that they came in, or of the longest. asks: token
        ids of what follows each prompt once it has been compressed, or None. text: they were texts, so answers are.
        single: one text, so there is one answer.
    """

    rows: list[list[int]]
    width: int
    asks: list[list[int]] | None
    text: bool
    single: bool

    def padded(self, pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask) [batch, width] of the rows, pads on the left."""
        ids = [[pad] * (self.width - len(row)) + row for row in self.rows]
        mask = [[0] * (self.width - len(row)) + [1] * len(row) for row in self.rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def read_prompts(
    inputs: Inputs,
    question: str | list[str] | list[int] | None,
    tokenizer: Lazy,
    attention_mask: torch.Tensor | None = None,
) -> Prompts:
    """The prompts of one call of `gatekv.generate`, whose arguments these are; tokenizer: () -> the tokenizer.

    Raises:
        ValueError: inputs or a question of another kind, empty ones, pads that do not stand on the left.
    """
    if isinstance(inputs, Mapping):
        attention_mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
        if "input_ids" not in inputs:
            raise ValueError(f"inputs is a mapping without 'input_ids': give {KINDS}.")
        inputs = torch.as_tensor(inputs["input_ids"])
    if isinstance(inputs, torch.Tensor):
        rows, width = _rows_of(inputs, attention_mask)
        asks = None if question is None else _asks_of(question, len(rows), tokenizer)
        return Prompts(rows, width, asks, False, False)
    if attention_mask is not None:
        raise ValueError("attention_mask belongs to token ids; texts and chats get their own: leave it out.")
    chats, single = _chats_of(inputs)
    questions = [None] * len(chats) if question is None else _questions_of(question, len(chats))
    pairs = [encode(tokenizer(), chat, ask) for chat, ask in zip(chats, questions)]
    rows = [context for context, _ in pairs]
    _check_rows(rows)
    asks = None if question is None else [ask for _, ask in pairs]
    return Prompts(rows, max(map(len, rows)), asks, True, single)


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | list[dict], question: str | None
) -> tuple[list[int], list[int]]:
    """Token ids of (the context, the question up to where the answer starts; none without a question).

    prompt: a text, or chat messages, whose last one is then the user's. With a question a text is one too, where the
    tokenizer has a chat template: the question follows it in the same turn.
    """
    if isinstance(prompt, str) and question is None:
        return tokenizer(prompt).input_ids, []
    if isinstance(prompt, str) and not tokenizer.chat_template:
        ask = tokenizer(f"{BEFORE}{question}{BEHIND}", add_special_tokens=False).input_ids
        return tokenizer(prompt).input_ids, ask
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template for messages: give a text, or tokenizer=… with one.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if question is None:
        rendered, cut = _rendered(tokenizer, messages), None
    else:
        last = messages[-1]
        if last["role"] != "user" or not isinstance(last["content"], str):
            raise ValueError("question= goes on with the last message, which must be a text of the user's.")
        asked = f"{BEFORE}{question.strip()}"
        rendered = _rendered(tokenizer, [*messages[:-1], last | {"content": last["content"] + asked}])
        cut = rendered.rfind(asked)
        if cut < 0:
            raise ValueError("the tokenizer's chat template rewrites the question: render both, and pass token ids.")
    parts = (rendered[:cut], "" if cut is None else rendered[cut:])
    first, second = (tokenizer(part, add_special_tokens=False).input_ids for part in parts)
    return first, second


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[dict]) -> str:
    """The chat as the model reads it, up to where its own turn starts."""
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _chats_of(inputs: Any) -> tuple[list[str | list[dict]], bool]:
    """(texts or chats, whether the user gave one alone)."""
    is_chat = lambda x: isinstance(x, list) and bool(x) and all(isinstance(m, Mapping) for m in x)  # noqa: E731
    single = isinstance(inputs, str) or is_chat(inputs)
    found = [inputs] if single else inputs
    if not isinstance(found, (list, tuple)) or not all(isinstance(x, str) or is_chat(x) for x in found):
        raise ValueError(f"inputs must be {KINDS}; got {type(inputs).__name__}.")
    for chat in found:
        if is_chat(chat) and not all("role" in m and "content" in m for m in chat):
            raise ValueError("a chat message is a dict with 'role' and 'content', as for apply_chat_template.")
        if isinstance(chat, str) and not chat:
            raise ValueError("inputs has an empty text: give at least one token.")
    return list(found), single


def _questions_of(question: Any, batch: int) -> list[str]:
    """One for each row of the batch."""
    questions = [question] * batch if isinstance(question, str) else list(question)
    if len(questions) != batch or not all(isinstance(q, str) and q.strip() for q in questions):
        raise ValueError(f"question must be a text, or a list of {batch}, one for each input; got {question!r}.")
    return questions


def _asks_of(question: Any, batch: int, tokenizer: Lazy) -> list[list[int]]:
    """Token ids of what follows token ids: a text as it is written, or ids of its own."""
    if isinstance(question, torch.Tensor):
        rows, _ = _rows_of(question, None)
        return rows * batch if len(rows) == 1 else rows
    return [tokenizer()(q, add_special_tokens=False).input_ids for q in _questions_of(question, batch)]


def _rows_of(ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[list[list[int]], int]:
    """(token ids of each row without its pads, the batch's width)."""
    ids = ids[None] if ids.ndim == 1 else ids
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, device=ids.device).view_as(ids)
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"token ids must be whole numbers [tokens] or [batch, tokens]; got shape {tuple(ids.shape)}.")
    if bool((mask.bool()[:, :-1] & ~mask.bool()[:, 1:]).any()):
        raise ValueError("pads must stand on the left, as for model.generate: use tokenizer.padding_side = 'left'.")
    rows = [row[real].tolist() for row, real in zip(ids, mask.bool())]
    _check_rows(rows)
    return rows, ids.shape[1]


def _check_rows(rows: list[list[int]]) -> None:
    if not rows or not all(rows):
        raise ValueError("inputs has an empty prompt: give at least one token.")
