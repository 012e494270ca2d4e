"""Rows into tensors: padding, alignment, and several documents in one row whose borders are respected."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass
class Row:
    """One training row.

    Attributes:
        ids: token ids. weights: weights[t] is the loss weight of predicting token t + 1.
        split: tokens of the part that is to be compressed, from the row's start.
        lengths: tokens of each document in the row.
    """

    ids: list[int]
    weights: list[float]
    split: int
    lengths: list[int]


class RowSource(Protocol):
    """What the loop reads: `gatekv.training.data.TrainingData` or `gatekv.training.examples.Examples`."""

    def batch(self, first: int, rows: int, align: bool = False) -> dict[str, torch.Tensor]:
        """Rows first … first + rows - 1, as `collate` makes them."""
        ...


def joined(documents: list[list[int]]) -> tuple[list[int], list[float], list[int]]:
    """(ids, weights, lengths) of documents in one row: a document's last token predicts nothing."""
    weights = [w for d in documents for w in [1.0] * (len(d) - 1) + [0.0]]
    return [i for d in documents for i in d], weights, [len(d) for d in documents]


def collate(rows: list[Row], align: bool = False) -> dict[str, torch.Tensor]:
    """Rows as tensors [rows, tokens].

    Args:
        align: move rows so that all splits stand at one column: what is before it is left-padded, what follows
            right-padded, so that the batch may be wider than its longest row. Otherwise all is right-padded.

    Returns input_ids, attention_mask, weights; position_ids, from 0 in each document, 0 at pads (so transformers keeps
    documents apart by itself where no attention mask is given); segments, the document's number
    in its row, -1 for pads; split [rows]: the column at which the row's second part starts.
    """
    column = max(r.split for r in rows)
    starts = [column - r.split if align else 0 for r in rows]
    shape = len(rows), max(start + len(r.ids) for start, r in zip(starts, rows))
    out = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "position_ids")}
    out |= {"weights": torch.zeros(shape), "segments": torch.full(shape, -1)}
    for i, (start, row) in enumerate(zip(starts, rows)):
        place = i, slice(start, start + len(row.ids))
        out["input_ids"][place] = torch.tensor(row.ids)
        out["attention_mask"][place] = 1
        out["weights"][place] = torch.tensor(row.weights)
        out["position_ids"][place] = torch.cat([torch.arange(n) for n in row.lengths])
        out["segments"][place] = torch.arange(len(row.lengths)).repeat_interleave(torch.tensor(row.lengths))
    out["split"] = torch.tensor([start + r.split for start, r in zip(starts, rows)])
    return out
