"""Training rows: windows of real text, some with facts written in and asked for. Row i is a pure function of (seed, i),
so that resuming, accumulation and data parallelism are questions of counting."""

import math
import random
from typing import TYPE_CHECKING, cast

import torch

from gatekv.bundled import TRAIN
from gatekv.facts import chat_frame, make_sample, paragraph_window
from gatekv.training.packing import Row, collate, joined
from gatekv.training.sources import Corpus, open_source, weighted
from gatekv.training.sources import read_source as read_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CUE, PASSAGE = 6, 32  # words that ask for a passage, words of it
SHORTEST = 16  # tokens of room that are worth another document


class TrainingData:
    """Deterministic rows of at most `length` tokens.

    Args:
        sources: paths or Hub names, "name=0.3" with a relative weight, "name:configuration:column" for what is not the
            default (see `gatekv.training.sources`); empty: the bundled sample.
        retrieval_share: of rows that carry facts. recite_share: of rows that ask for passages of their own text, word
            for word, whatever it is about (KVzip scores with it, 2505.23416). answer_weight: loss weight of the facts'
            answers (other tokens weigh 1).
        seed: of everything. pack: plain rows are filled with several documents, kept apart; rows with facts are one.

    Raises:
        ValueError: a length without room, a source that cannot be read or a weight that is none.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        sources: list[str],
        length: int,
        *,
        retrieval_share: float,
        answer_weight: float,
        seed: int,
        recite_share: float = 0.0,
        pack: bool = False,
    ) -> None:
        if length < 64:
            raise ValueError(f"sequence_length={length} leaves no room for a context; use at least 64.")
        weights = weighted(sources or [str(p) for p in sorted(TRAIN.glob("*.txt"))])
        if not weights:
            raise ValueError("no training data: the bundled sample is missing, so name files or data sets with --data.")
        self.sources = [open_source(name, length, seed) for name in weights]
        self.weights = list(weights.values())
        self.tokenizer, self.length, self.seed, self.pack = tokenizer, length, seed, pack
        self.retrieval_share, self.recite_share, self.answer_weight = retrieval_share, recite_share, answer_weight
        self.frame = chat_frame(tokenizer)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def __getitem__(self, index: int) -> Row:
        rng = random.Random(f"{self.seed}/{index}")
        if len(set(self.weights)) == 1:  # draws another number of random bits than weights do: recorded runs stay true
            source = rng.choice(self.sources)
        else:
            source = rng.choices(self.sources, self.weights)[0]
        corpus = source.corpus(index)
        kind = rng.random()
        if kind < self.retrieval_share:
            return self._retrieval(corpus.text, rng)
        if kind < self.retrieval_share + self.recite_share:
            return self._recital(corpus.text, rng)
        documents = self._documents(corpus, rng) if self.pack else [self._window(corpus.text, self.length, rng)]
        ids, weights, lengths = joined(documents)
        # A generator of its own: the split changes nothing that was drawn before there were splits.
        low = max(1, math.ceil(0.5 * len(ids)))
        split = random.Random(f"{self.seed}/{index}/split").randint(low, max(low, int(0.9 * len(ids))))
        return Row(ids, weights, split, lengths)

    def _window(self, text: str, room: int, rng: random.Random) -> list[int]:
        return self._tokens(paragraph_window(text, room * 8, rng))[:room]

    def _documents(self, corpus: Corpus, rng: random.Random) -> list[list[int]]:
        """Neighbouring documents, from a random one on, none twice; of one longer than the room left a random part."""
        first, room, found = rng.randrange(len(corpus)), self.length, []
        for i in range(len(corpus)):
            document = corpus[(first + i) % len(corpus)]
            short = len(document) <= room * 8
            ids = self._tokens(document)[:room] if short else self._window(document, room, rng)
            found += [ids] if ids else []
            room -= len(ids)
            if room < SHORTEST:
                break
        return found

    def _recital(self, text: str, rng: random.Random) -> Row:
        """Two thirds of the row are read; then passages of it are asked for by their first words until it is full."""
        ids = self._tokens(self.frame[0]) + self._window(text, self.length * 2 // 3, rng)
        split, weights = len(ids), [1.0] * (len(ids) - 1)
        words = cast(str, self.tokenizer.decode(ids[len(self._tokens(self.frame[0])) :])).split(" ")
        while True:
            start = rng.randrange(max(1, len(words) - CUE - PASSAGE))
            cue, passage = words[start : start + CUE], words[start + CUE : start + CUE + PASSAGE]
            question = f"\n\nRepeat the passage that begins with: {' '.join(cue)}{self.frame[1]}{' '.join(cue)}"
            lead, answer = self._tokens(question), self._tokens(" " + " ".join(passage))
            tail = self._tokens(self.frame[2] + self.frame[0])
            if len(ids) + len(lead) + len(answer) + len(tail) > self.length and len(ids) > split:
                return Row(ids, weights + [0.0], split, [len(ids)])
            ids = ids + lead + answer + tail
            weights += [0.0] * len(lead) + [1.0] * len(answer) + [0.0] * len(tail)
            if len(ids) > self.length:  # one question is longer than a short row has room for
                return Row(ids[: self.length], weights[: self.length - 1] + [0.0], split, [self.length])

    def _retrieval(self, text: str, rng: random.Random) -> Row:
        facts = rng.choice((1, 2, 4, 8))
        characters = self.length * 5
        while True:
            sample = make_sample(
                text, rng, facts=facts, characters=characters, split="train", frame=self.frame, questions=6
            )
            ids = self._tokens(sample.context)
            split, weights = len(ids), [1.0] * (len(ids) - 1)
            for i, question in enumerate(sample.questions):
                lead, answer = self._tokens(question.query), self._tokens(question.answer)
                tail = self._tokens("." + self.frame[2] + (self.frame[0] if i + 1 < len(sample.questions) else ""))
                ids += lead + answer + tail
                weights += [1.0] * len(lead) + [self.answer_weight] * len(answer) + [1.0] * len(tail)
            if len(ids) <= self.length:
                return Row(ids, weights + [0.0], split, [len(ids)])
            if characters <= 200:  # facts and questions alone do not fit
                facts, characters = max(1, facts // 2), self.length * 5
            characters = int(characters * min(0.95, self.length / len(ids)))

    def batch(self, first: int, rows: int, align: bool = False) -> dict[str, torch.Tensor]:
        """Rows first … first + rows - 1: input_ids, attention_mask, weights, position_ids [rows, tokens]; split [rows].

        split: the column at which questions start (rows with facts), or one drawn at 50 to 90 % of the row. With `pack`
        also segments [rows, tokens]; see `gatekv.training.packing.collate`, for `align` too.
        """
        out = collate([self[i] for i in range(first, first + rows)], align)
        if not self.pack:
            del out["segments"]
        return out


def check_length(length: int, config: "PretrainedConfig") -> None:
    """ValueError when rows are longer than the positions a model was trained for."""
    limit = config.get_text_config(decoder=True).max_position_embeddings
    if length > limit:
        raise ValueError(f"sequence_length={length} exceeds the model's {limit} positions: use at most {limit}.")
