"""Training rows: windows of real text, some with facts written in and asked for. Row i is a pure function of (seed, i),
so that resuming, accumulation and data parallelism are questions of counting."""

import json
import random
from pathlib import Path

import torch

from gatekv.facts import chat_frame, make_sample, paragraph_window

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample" / "train"


def read_source(source: str, max_documents: int = 20000) -> str:
    """All text of a .txt/.md/.jsonl/.parquet file, a folder of .txt files, or a `datasets` name (column "text").

    Raises:
        ValueError: nothing there, or no text in it.
    """
    path = Path(source)
    if path.is_dir():
        documents = [p.read_text(errors="replace") for p in sorted(path.glob("*.txt"))]
    elif path.suffix in (".txt", ".md") and path.is_file():
        documents = [path.read_text(errors="replace")]
    elif path.suffix == ".jsonl" and path.is_file():
        documents = [json.loads(line).get("text", "") for line in path.read_text().splitlines() if line.strip()]
    elif path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        documents = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    elif path.suffix:
        raise ValueError(f"data source {source!r} is not a file; give .txt, .md, .jsonl, .parquet or a Hub name.")
    else:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"data source {source!r} is not a file; for Hub names: pip install gatekv[eval]."
            ) from error
        try:
            documents = [row["text"] for row in load_dataset(source, split="train", streaming=True).take(max_documents)]
        except Exception as error:  # the Hub client raises a dozen types; all mean the same to the user
            raise ValueError(
                f"data source {source!r} is neither a file nor a data set that can be loaded: {error}"
            ) from error
    text = "\n\n".join(d for d in documents if d.strip())
    if not text.strip():
        raise ValueError(f"data source {source!r} holds no text: check the path, and that rows have a 'text' field.")
    return text


class TrainingData:
    """Deterministic rows of at most `length` tokens.

    Args:
        sources: see `read_source`; empty: the bundled sample. retrieval_share: of rows that carry facts.
        answer_weight: loss weight of answer tokens (others weigh 1). seed: of everything.
    """

    def __init__(self, tokenizer, sources: list[str], length: int, *, retrieval_share: float, answer_weight: float,
                 seed: int):  # fmt: skip
        if length < 64:
            raise ValueError(f"sequence_length={length} leaves no room for a context; use at least 64.")
        files = sources or [str(p) for p in sorted(SAMPLE.glob("*.txt"))]
        if not files:
            raise ValueError("no training data: the bundled sample is missing, so name files or data sets with --data.")
        self.texts = [read_source(s) for s in files]
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.retrieval_share, self.answer_weight = retrieval_share, answer_weight
        self.frame = chat_frame(tokenizer)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def __getitem__(self, index: int) -> tuple[list[int], list[float]]:
        """(token ids, weights): weights[t] is the loss weight of predicting token t + 1."""
        rng = random.Random(f"{self.seed}/{index}")
        text = rng.choice(self.texts)
        if rng.random() < self.retrieval_share:
            return self._retrieval(text, rng)
        ids = self._tokens(paragraph_window(text, self.length * 8, rng))[: self.length]
        return ids, [1.0] * (len(ids) - 1) + [0.0]

    def _retrieval(self, text: str, rng: random.Random) -> tuple[list[int], list[float]]:
        facts = rng.choice((1, 2, 4, 8))
        characters = self.length * 5
        while True:
            sample = make_sample(
                text, rng, facts=facts, characters=characters, split="train", frame=self.frame, questions=6
            )
            ids, weights = self._tokens(sample.context), []
            weights = [1.0] * (len(ids) - 1)
            for i, question in enumerate(sample.questions):
                lead, answer = self._tokens(question.query), self._tokens(question.answer)
                tail = self._tokens("." + self.frame[2] + (self.frame[0] if i + 1 < len(sample.questions) else ""))
                ids += lead + answer + tail
                weights += [1.0] * len(lead) + [self.answer_weight] * len(answer) + [1.0] * len(tail)
            if len(ids) <= self.length:
                return ids, weights + [0.0]
            if characters <= 200:  # facts and questions alone do not fit
                facts, characters = max(1, facts // 2), self.length * 5
            characters = int(characters * min(0.95, self.length / len(ids)))

    def batch(self, first: int, rows: int) -> dict[str, torch.Tensor]:
        """Rows first … first + rows - 1, right-padded: input_ids, attention_mask, weights [rows, tokens]."""
        items = [self[i] for i in range(first, first + rows)]
        width = max(len(ids) for ids, _ in items)
        out = {
            "input_ids": torch.zeros(rows, width, dtype=torch.long),
            "attention_mask": torch.zeros(rows, width, dtype=torch.long),
            "weights": torch.zeros(rows, width),
        }
        for r, (ids, weights) in enumerate(items):
            out["input_ids"][r, : len(ids)] = torch.tensor(ids)
            out["attention_mask"][r, : len(ids)] = 1
            out["weights"][r, : len(ids)] = torch.tensor(weights)
        return out


def check_length(length: int, config) -> None:
    """ValueError when rows are longer than the positions a model was trained for."""
    limit = config.get_text_config(decoder=True).max_position_embeddings
    if length > limit:
        raise ValueError(f"sequence_length={length} exceeds the model's {limit} positions: use at most {limit}.")
