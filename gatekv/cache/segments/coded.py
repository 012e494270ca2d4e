"""Tokens in few bits, without a gap: for every pair of widths one stream of records, row after row."""

from typing import cast

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.prompt_end import PromptEnd
from gatekv.cache.segments.segment import Shape, Shown
from gatekv.cache.segments.width import Narrow
from gatekv.ops import backends, segments
from gatekv.ops.codec import encode, record_bytes, turn, turn_back
from gatekv.ops.coded_attention import Codes, decoded
from gatekv.ops.naive import WHOLE
from gatekv.ops.page_table import PageTable
from gatekv.parts import below

Tensor = torch.Tensor
Pair = tuple[int, int]  # bits of a key, of a value
BLOCK = 32  # whole tokens of a row that attention reads side by side
NEAR = 1 << 16  # positions below it fit into two bytes
TABLE_BYTES = 12  # of a block, in the table by which attention reads whole tokens


def token_bytes(pair: Pair, dims: tuple[int, int], itemsize: int) -> float:
    """Of a token of one head whose key and value have dims numbers: its records and its position; whole, its share of
    the table too."""
    return _record_bytes(pair, dims, itemsize) + 2 + (TABLE_BYTES / BLOCK if pair[0] == WHOLE else 0)


def _record_bytes(pair: Pair, dims: tuple[int, int], itemsize: int) -> int:
    sizes = (record_bytes(bits, dim, itemsize) if bits < WHOLE else dim * itemsize for bits, dim in zip(pair, dims))
    return sum(sizes)


class Stream:
    """The tokens of every row at one pair of widths. Nothing in it is written in place, so copies share it.

    Attributes:
        records: [n, bytes] uint8, row after row, a key's record and then its value's. positions: [n] int16 (the lower
        two bytes) or int32, number among its row's real tokens. counts: [rows] int32, tokens of each row.
    """

    def __init__(self, records: Tensor, positions: Tensor, counts: Tensor) -> None:
        if positions.dtype != torch.int16 and (not len(positions) or int(positions.max()) < NEAR):
            positions = positions.to(torch.int16)
        self.records, self.positions, self.counts = records, positions, counts.int()

    def __len__(self) -> int:
        return len(self.positions)

    def numbers(self) -> Tensor:
        """[n] int64: positions."""
        return self.positions.long() & NEAR - 1 if self.positions.dtype == torch.int16 else self.positions.long()

    def owners(self) -> Tensor:
        """[n] int64: the row of each token."""
        rows = torch.arange(len(self.counts), device=self.counts.device)
        return torch.repeat_interleave(rows, self.counts.long(), output_size=len(self))

    def places(self, first: Tensor) -> Tensor:
        """[n] int64: where each token stands, if those of row r stand side by side from first[r] on."""
        before = self.counts.long().cumsum(0) - self.counts
        shift = torch.repeat_interleave(first - before, self.counts.long(), output_size=len(self))
        return shift + torch.arange(len(self), device=shift.device)

    def joined(self, other: "Stream") -> "Stream":
        """Both, the other's tokens behind one's own in each row."""
        order = torch.cat([self.owners(), other.owners()]).argsort(stable=True)
        positions = torch.cat([self.numbers(), other.numbers()])[order].int()
        return Stream(torch.cat([self.records, other.records])[order], positions, self.counts + other.counts)

    def rows(self, index: Tensor) -> "Stream":
        """Those of rows index [new_rows], in that order."""
        counts = self.counts[index].long()
        first = (self.counts.long().cumsum(0) - self.counts)[index]
        total = int(counts.sum())
        shift = torch.repeat_interleave(first - (counts.cumsum(0) - counts), counts, output_size=total)
        at = shift + torch.arange(total, device=shift.device)
        return Stream(self.records[at], self.numbers()[at].int(), counts)


class Coded(Narrow):
    """Kept tokens of one layer, each at the bits that its utility bought (`gatekv.policies.rate`).

    Attributes:
        streams: bits of key and value -> the tokens that have them; (WHOLE, WHOLE): as they came, and not turned.
        table: of the whole ones, as they lie while attention reads them; None without any.
        dims, dtype: of what was coded. kv_heads: of the layer. backend: of paged attention.
    """

    def __init__(self, pages: Pages) -> None:
        """An empty one beside `pages`, whose tokens it will take."""
        self.streams: dict[Pair, Stream] = {}
        self.table: PageTable | None = None
        self.dims, self.dtype = (pages.keys.shape[-1], pages.values.shape[-1]), pages.values.dtype
        self.kv_heads, self.backend = pages.kv_heads, pages.backend

    def __len__(self) -> int:
        return sum(map(len, self.streams.values()))

    def tensors(self) -> list[Tensor]:
        own = [t for s in self.streams.values() for t in (s.records, s.positions, s.counts)]
        return own + (self.table.tensors() if self.table is not None else [])

    def absorb(self, pages: Pages, end: PromptEnd) -> None:
        """Take all tokens of `pages`, at the bits that were decided at this end."""
        if not len(pages):
            return
        bits, held = pages.gathered(cast(Tensor, end.bits), end.real), pages.occupied()
        for pair in bits[held].unique(dim=0).tolist():
            rows, number, counts, sources = pages.picked((bits == bits.new_tensor(pair)).all(-1))
            order = rows.argsort(stable=True)
            keys, values, positions = (t[order] for t in sources[:3])
            new = Stream(self._encoded((keys, values), tuple(pair), rows[order]), positions, counts)
            old = self.streams.get(tuple(pair))
            self.streams[tuple(pair)] = new if old is None else old.joined(new)
        pages.evict(held)
        pages.shrink()
        self._index()

    def _encoded(self, tokens: tuple[Tensor, Tensor], pair: Pair, rows: Tensor) -> Tensor:
        """Records [n, bytes] of keys and values [n, head_dim] of rows [n]."""
        if pair[0] == WHOLE:
            return torch.cat([t.contiguous().view(torch.uint8) for t in tokens], -1)
        heads = rows % self.kv_heads
        return torch.cat([encode(turn(t, heads, self.kv_heads), b, self.dtype) for t, b in zip(tokens, pair)], -1)

    def _index(self) -> None:
        """Make the table, after what is held has changed."""
        whole = self.streams.get((WHOLE, WHOLE))
        self.table = None if whole is None else _table(whole.counts)

    def _codes(self) -> list[Codes]:
        return [Codes(s.records, s.counts, *pair) for pair, s in self.streams.items() if pair[0] < WHOLE]

    def _whole(self, table: PageTable) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, BLOCK, head_dim] of the whole tokens, as their table has them."""
        stream = self.streams[WHOLE, WHOLE]
        at, found = stream.places(table.starts[:-1].long() * BLOCK), []
        for part in stream.records.split([d * self.dtype.itemsize for d in self.dims], -1):
            tokens = part.clone(memory_format=torch.contiguous_format).view(self.dtype)
            # Zeros, not garbage: an unused slot has weight 0, and 0 · NaN would not be 0.
            blocks = tokens.new_zeros(len(table.pages) * BLOCK, tokens.shape[1])
            found.append(blocks.index_copy_(0, at, tokens).unflatten(0, (-1, BLOCK)))
        return found[0], found[1]

    def heads_of(self, x: Tensor) -> Tensor:
        """The KV head of each vector of x [batch, heads, n, head_dim]: [1, heads, 1] int64."""
        return torch.arange(x.shape[1], device=x.device)[None, :, None] // (x.shape[1] // self.kv_heads)

    def attend(self, q: Tensor, scale: float, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        answers = []
        if codes := self._codes():
            heads = self.heads_of(q)
            asked = turn(q, heads, self.kv_heads)
            answer = backends.load_coded(self.backend)
            out, lse = answer(asked, codes, self.kv_heads, self.dims, self.dtype, scale)
            answers.append((turn_back(out, heads, self.kv_heads), lse))
        if self.table is not None:
            answers.append(backends.load(self.backend)(q, *self._whole(self.table), self.table, scale))
        return segments.merge(answers)

    def mark(self, bits: Tensor, real: Tensor) -> None:
        for pair, stream in self.streams.items():
            rows = stream.owners()
            age = real.flatten()[rows // self.kv_heads] - stream.numbers()
            bits.flatten(0, 1)[rows, bits.shape[2] - age] = bits.new_tensor(pair)

    def shown(self, probe: Tensor) -> list[Shown]:
        found = []
        if codes := self._codes():
            *tokens, table = decoded(codes, self.dims, self.dtype)
            heads = torch.arange(table.rows, device=probe.device)[:, None] % self.kv_heads
            keys, values = (turn_back(_rows(t[:, None], table), heads, self.kv_heads) for t in tokens)
            found.append((keys, values, table))
        if self.table is not None:
            keys, values = (_rows(t, self.table) for t in self._whole(self.table))
            found.append((keys, values, self.table))
        places = torch.arange(max((keys.shape[1] for keys, _, _ in found), default=0), device=probe.device)
        return [(keys, values, places[: keys.shape[1]] < table.lengths[:, None]) for keys, values, table in found]

    def stores(self) -> list[Pages]:
        return []

    def reads(self, q: Tensor) -> list:
        return []

    def rectangles(self, q: Tensor) -> None:
        """It answers by itself: its queries and its output are turned."""
        return None

    def index_select(self, index: Tensor) -> None:
        rows = (index[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=index.device)).flatten()
        self.streams = {pair: stream.rows(rows) for pair, stream in self.streams.items()}
        self._index()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{key}.{value}.{name}": t
            for (key, value), stream in self.streams.items()
            for name, t in vars(stream).items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for pair in sorted({tuple(name.split(".")[:2]) for name in tensors}):
            mine = below(tensors, ".".join(pair))
            bits, n = (int(pair[0]), int(pair[1])), len(mine["positions"])
            size = _record_bytes(bits, self.dims, self.dtype.itemsize)
            if mine["records"].shape != (n, size) or int(mine["counts"].sum()) != n:
                raise ValueError(
                    f"{'.'.join(pair)}: {tuple(mine['records'].shape)} are not {n} records of {size} bytes."
                )
            self.streams[bits] = Stream(mine["records"], mine["positions"], mine["counts"])
        self._index()

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float, each: float = 0.0) -> int:
        """each: bytes of a token on average."""
        return round(shape.rows * tokens * each)


def _rows(blocks: Tensor, table: PageTable) -> Tensor:
    """[blocks, BLOCK, head_dim] -> [rows, most, head_dim], anything behind a row's end."""
    return blocks[table.block_table.long()].flatten(1, 2)


def _table(counts: Tensor) -> PageTable:
    """Rows of counts [rows] tokens, in blocks, row after row."""
    pages = (counts.long() + BLOCK - 1) // BLOCK
    fewest, most, least, longest, total = torch.stack(
        [pages.min(), pages.max(), counts.min().long(), counts.max().long(), pages.sum()]
    ).tolist()
    owners = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), pages, output_size=total)
    number = torch.arange(total, device=counts.device)
    ordinals = number - (pages.cumsum(0) - pages)[owners]
    fill = (counts.long()[owners] - ordinals * BLOCK).clamp(max=BLOCK)
    even, each = most if fewest == most > 0 else None, longest if least == longest else None
    return PageTable(number.int(), owners.int(), fill.int(), len(counts), even, each, most)
