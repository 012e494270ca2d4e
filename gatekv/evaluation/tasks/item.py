"""What a task hands over: a cached context, what is asked of it, and how the answers are scored.

Everything is scored teacher-forced, in one forward behind the cached context: each answer token is judged given the
true tokens before it. That asks what greedy generation asks as long as it is right, and needs no stop tokens and no
parsing. Scorers take, per ask, float32 log-probabilities [answer tokens, vocabulary], the answers' ids, and the full
cache's log-probabilities; they return (scores, KLs in nats per token), one score per question.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gatekv.facts import paragraph_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scores = tuple[list[float], list[float]]


def _right(log_p: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """[answer tokens] bool: which are the arg-max."""
    return log_p.argmax(-1) == torch.tensor(answer, device=log_p.device)


def _log_likelihood(log_p: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """[answer tokens] log-probabilities of the answer."""
    return log_p.gather(-1, torch.tensor(answer, device=log_p.device)[:, None])[:, 0]


def exact(log_p: list[torch.Tensor], answers: list[list[int]], full: list[torch.Tensor]) -> Scores:
    """1 per ask whose every token is the arg-max, else 0. Shapes: see the module."""
    return [float(_right(p, a).all()) for p, a in zip(log_p, answers)], []


def token_accuracy(log_p: list[torch.Tensor], answers: list[list[int]], full: list[torch.Tensor]) -> Scores:
    """Per ask the share of answer tokens that are the arg-max. Shapes: see the module."""
    return [float(_right(p, a).float().mean()) for p, a in zip(log_p, answers)], []


def _kl(p: torch.Tensor, full: torch.Tensor) -> float:
    """Mean over tokens of KL(full || p), by few tokens at a time: their vocabularies stay in the processor's cache."""
    parts = [(f.exp() * (f - q)).sum(-1) for q, f in zip(p.split(4), full.split(4))]
    return float(torch.cat(parts).mean())


def log_loss(log_p: list[torch.Tensor], answers: list[list[int]], full: list[torch.Tensor]) -> Scores:
    """Per ask the nats per token lost against the full cache, and the KL from it. Shapes: see the module."""
    losses = [_log_likelihood(f, a).mean() - _log_likelihood(p, a).mean() for p, f, a in zip(log_p, full, answers)]
    return [float(x) for x in losses], [_kl(p, f) for p, f in zip(log_p, full)]


@dataclass(frozen=True)
class References:
    """One score: the share of references found. spans: (ask, first, behind the last answer token) of each reference.

    A reference is found when each token of its span is the arg-max given the true tokens before it, earlier references
    among them; what stands between references is not scored.
    """

    spans: tuple[tuple[int, int, int], ...]

    def __call__(self, log_p: list[torch.Tensor], answers: list[list[int]], full: list[torch.Tensor]) -> Scores:
        right = [_right(p, a) for p, a in zip(log_p, answers)]
        return [sum(float(right[ask][a:b].all()) for ask, a, b in self.spans) / len(self.spans)], []


@dataclass(frozen=True)
class Choices:
    """One score per question: 1 if the true choice has the highest summed log-likelihood, else 0.

    Summed over a choice's tokens and not divided by their number, which is `acc` in lm-evaluation-harness. Each ask
    is a choice; questions follow each other. truths: (choices of a question, number of the true one).
    """

    truths: tuple[tuple[int, int], ...]

    def __call__(self, log_p: list[torch.Tensor], answers: list[list[int]], full: list[torch.Tensor]) -> Scores:
        sums = iter([float(_log_likelihood(p, a).sum()) for p, a in zip(log_p, answers)])
        scores = []
        for count, truth in self.truths:
            choices = [next(sums) for _ in range(count)]
            scores.append(float(max(range(count), key=choices.__getitem__) == truth))
        return scores, []


@dataclass
class Item:
    """One cached context and the continuations asked of it, all as token ids.

    Attributes:
        context: what is prefilled and compressed.
        asks: (query, answer) pairs, each on its own copy of the cache; the query is fed first.
        score: makes scores of the answers' log-probabilities; see the module.
        place: where in a task's grid the sample lies, or None.
    """

    context: list[int]
    asks: list[tuple[list[int], list[int]]]
    score: Callable[..., Scores] = exact
    place: dict | None = None


def placed(
    mode: str, context: list[int], question: list[int], asks: list[tuple[list[int], list[int]]], **kwargs: Any
) -> Item:
    """An Item whose `question` is fed behind the compressed context ("agnostic") or is part of it ("aware").

    asks: (ids between question and answer, answer). Of a question in the context only the last token is fed to the
    compressed cache, so that the first answer token comes from what was kept.
    """
    held = len(question) - 1 if mode == "aware" else 0
    return Item(context + question[:held], [(question[held:] + rest, answer) for rest, answer in asks], **kwargs)


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def prose(tokenizer: "PreTrainedTokenizerBase", texts: list[str], tokens: int, rng: random.Random) -> str:
    """At most `tokens` tokens of one of the texts, nearly as many, from a random place, cut at blanks.

    Raises:
        ValueError: when the text drawn is too short.
    """
    stretch = paragraph_window(rng.choice(texts), tokens * 8, rng)
    count = len(encode(tokenizer, stretch))
    if count < 0.9 * tokens:
        raise ValueError(
            f"a held-out text has {count} tokens where {tokens} are wanted: give longer ones with --data, or lower "
            "--tokens."
        )
    if count <= tokens:
        return stretch
    edges = [i for i, letter in enumerate(stretch) if letter == " "] or range(1, len(stretch))
    fits = bisect_right(edges, tokens, key=lambda end: len(encode(tokenizer, stretch[:end])))
    return stretch[: edges[max(fits - 1, 0)]]


def written(text: str, facts: list[str], depths: list[float]) -> str:
    """`text` with each fact written in at the end of the sentence or line nearest to its depth (share of characters).

    Facts that land at the same place stand there in the order given.
    """
    edges = [0, *(match.end() for match in re.finditer(r"[.!?;:]\S?\s+|\n+", text)), len(text)]
    places = [min(edges, key=lambda edge: abs(edge - depth * len(text))) for depth in depths]
    out, end = "", 0
    for place, _, fact in sorted(zip(places, range(len(facts)), facts)):
        out += text[end:place]
        out += fact if out[-1:] in ("", " ", "\n") else f" {fact}"
        end = place
        out += " " if end < len(text) else ""
    return out + text[end:]


def numbered(tokenizer: "PreTrainedTokenizerBase", before: list[int], reference: str) -> tuple[list[int], list[int]]:
    """(ids before, ids of the reference): a blank that is a token of its own, as before digits, goes with the former.

    Whether a blank or, say, " a" follows "The code is" is a matter of style and not of what the cache holds.
    """
    blank, ids = encode(tokenizer, " "), encode(tokenizer, f" {reference}")
    bare = encode(tokenizer, reference)
    return (before + blank, bare) if blank + bare == ids else (before, ids)


def references(
    tokenizer: "PreTrainedTokenizerBase", pieces: list[str], found: list[str]
) -> tuple[list[int], list[int], References]:
    """(first ids, which belong to the question, the answer's ids, the scorer) of an answer with several references.

    pieces: text before each reference, the first one's in the question already; found: references, without a blank.
    """
    lead, answer = numbered(tokenizer, [], found[0])
    spans = [(0, 0, len(answer))]
    for piece, reference in zip(pieces[1:], found[1:]):
        answer, ids = numbered(tokenizer, answer + encode(tokenizer, piece), reference)
        spans.append((0, len(answer), len(answer) + len(ids)))
        answer = answer + ids
    return lead, answer, References(tuple(spans))
