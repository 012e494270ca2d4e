"""Which page holds which tokens: what every paged attention backend reads, beside the pages themselves."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

from gatekv.parts import Part

Tensor = torch.Tensor


@dataclass(frozen=True)
class PageTable(Part):
    """Pages in use, sorted by owner and, within an owner, full ones first; rows are (sequence, kv head) pairs.

    Attributes:
        pages: [N] int32, index into the pool [P, block_size, head_dim]. owners: [N] int32, row of each entry,
        ascending. fill: [N] int32, tokens in each page. rows: number of rows; rows without an entry are empty.
        even: pages of every row where all have the same number, else None; each: the same of tokens. most: pages of the
        longest row, or None: nobody has counted.
    """

    pages: Tensor
    owners: Tensor
    fill: Tensor
    rows: int
    even: int | None = None
    each: int | None = None
    most: int | None = None

    @cached_property
    def starts(self) -> Tensor:
        """[rows + 1] int32: entries starts[r]:starts[r + 1] belong to row r."""
        rows = torch.arange(self.rows + 1, dtype=torch.int32, device=self.owners.device)
        return torch.searchsorted(self.owners, rows, out_int32=True)

    @cached_property
    def lengths(self) -> Tensor:
        """[rows] int32: tokens of each row."""
        empty = torch.zeros(self.rows, dtype=torch.int32, device=self.fill.device)
        return empty.index_add(0, self.owners, self.fill)

    @cached_property
    def longest(self) -> int:
        """Pages of the longest row."""
        return int(self.starts.diff().max()) if self.most is None else self.most

    @cached_property
    def block_table(self) -> Tensor:
        """[rows, longest] int32, as flash-attn and vLLM take it; entries beyond a row's end are 0."""
        if self.even is not None:
            return self.pages.view(self.rows, -1)
        table = torch.zeros(self.rows, self.longest, dtype=torch.int32, device=self.pages.device)
        place = torch.arange(len(self.pages), device=self.pages.device) - self.starts.long()[self.owners.long()]
        table[self.owners.long(), place] = self.pages
        return table

    def fork(self) -> Self:
        """Itself: a table is never changed."""
        return self
