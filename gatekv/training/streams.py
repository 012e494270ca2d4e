"""Streamed data sets, block by block: a row's documents are a pure function of (seed, index), at bounded memory."""

import math
import random
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from gatekv.textfiles import as_text

if TYPE_CHECKING:
    from datasets import IterableDataset

GAP = "\n\n"
BLOCK = 256  # documents of a stream held at a time
RESERVED = range(10**6, 10**6 + 10**4)  # rows that judge a run, not train it: the probe's and the calibration's


class Corpus:
    """Documents, as one text: `text` joins them by blank lines; corpus[i] is document i. Blank ones are left out."""

    def __init__(self, documents: Iterable[object]) -> None:
        found = [d for d in documents if isinstance(d, str) and d.strip()]
        self.text = GAP.join(found)
        self.ends = list(accumulate(len(d) + len(GAP) for d in found))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        return self.text[self.ends[i - 1] if i else 0 : self.ends[i] - len(GAP)]


class HubSource:
    """A streamed data set of which two blocks are in memory.

    Block b is the (b // shards)-th run of `documents` documents of shard b % shards, the shards in an order drawn from
    the seed. Rows take turns: `rows` consecutive ones read one block. Block 0 is for the RESERVED rows, which so need
    not skip a million rows' text, and training does not read it until a shard is read through and starts over.

    Shards are files, and where the library can (parquet) row groups. With many of them a jump, on resuming, skips
    little; of few, at most CURSORS are made and each stays open, so that reading on skips nothing.

    Args:
        stream: `datasets.IterableDataset`. column: of the text. name: for messages. limit: characters of a document.
    """

    CURSORS, MANY, FOOTERS = 16, 512, 64

    def __init__(
        self,
        stream: "IterableDataset",
        column: str,
        name: str,
        *,
        rows: int,
        seed: int,
        limit: int,
        documents: int = BLOCK,
    ) -> None:
        if hasattr(stream, "reshard") and stream.num_shards <= self.FOOTERS:  # it opens every file
            stream = stream.reshard()
        self.stream, self.column, self.name = stream, column, name
        self.rows, self.limit, self.documents = rows, limit, documents
        self.shards = stream.num_shards if stream.num_shards >= self.MANY else min(stream.num_shards, self.CURSORS)
        self.order = list(range(self.shards))
        random.Random(f"{seed}/shards").shuffle(self.order)
        self.ends: dict[int, int] = {}  # shard -> its number of blocks, once its end was seen
        self.cursors: dict[int, tuple[int, Iterator[str]]] = {}  # shard -> (next block in it, iterator standing there)
        self.held: dict[int, Corpus] = {}
        self.corpus(RESERVED[0])  # a wrong name or column fails now, not in the middle of a run

    def corpus(self, index: int) -> Corpus:
        """What row `index` reads from.

        Raises:
            ValueError: no such column, or no text at all. ConnectionError: the stream broke off.
        """
        block = 0 if index in RESERVED else 1 + index // self.rows
        if block not in self.held:
            if len(self.held) > 1:
                del self.held[next(iter(self.held))]
            self.held[block] = Corpus(self._block(block))
        return self.held[block]

    def _block(self, block: int) -> list[str]:
        for b in range(block, block + self.shards):  # a shard without text is passed over
            shard, turn = self.order[b % self.shards], b // self.shards
            try:
                found = self._take(shard, turn)
            except ValueError:
                raise
            except Exception as error:  # the network client raises a dozen types; all mean the same to the user
                raise ConnectionError(
                    f"data source {self.name!r} broke off in block {block}: {error}; resume from the last checkpoint."
                ) from error
            if found:
                return found
        raise ValueError(f"data source {self.name!r} holds no text in column {self.column!r}: name another column.")

    def _take(self, shard: int, turn: int) -> list[str]:
        """Block `turn` of a shard, counted around its end; [] for a shard without text."""
        if shard in self.ends:
            turn = turn % self.ends[shard] if self.ends[shard] else 0
        at, documents = self.cursors.pop(shard, (0, None))
        if documents is None or at > turn:
            at, documents = 0, texts(self.stream.shard(self.shards, shard), self.column, self.name)
        seen = sum(1 for _ in islice(documents, (turn - at) * self.documents))
        found = [d[: self.limit] for d in islice(documents, self.documents)]
        if self.shards <= self.CURSORS:
            self.cursors[shard] = (turn + 1, documents)
        if len(found) == self.documents:
            return found
        known = shard in self.ends
        self.ends[shard] = at + math.ceil((seen + len(found)) / self.documents)
        return found if found or known or not self.ends[shard] else self._take(shard, turn)


def texts(stream: Iterable[dict], column: str, name: str) -> Iterator[str]:
    """The texts of a stream in order, without blank ones; ValueError when rows lack the column or it is no text."""
    for row in stream:
        if column not in row:
            raise ValueError(
                f"data source {name!r} has no column {column!r}; it has {', '.join(row)}: "
                "name one as name:configuration:column."
            )
        if row[column] is None:
            continue
        text = as_text(row[column], f"data source {name!r}, column {column!r}")
        if text.strip():
            yield text
