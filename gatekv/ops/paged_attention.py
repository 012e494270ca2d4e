"""Paged attention in plain torch, any device: pages of all heads in a few batched products, no loop over heads."""

import torch

from gatekv.ops.naive import accumulation_dtype, group_queries
from gatekv.ops.page_table import PageTable
from gatekv.ops.scale import capped
from gatekv.ops.segments import merge, rows_segment

Tensor = torch.Tensor
CHUNK = 1024  # pages whose float32 copy is alive at a time: it should stay in the processor's cache
FEW_QUERIES = 64  # queries of a row (of all heads in a group) up to which an answer per page is cheap
SCORES = 2**24  # of a block of queries that are alive at a time


def paged_segment(q: Tensor, keys: Tensor, values: Tensor, table: PageTable, scale: float) -> tuple[Tensor, Tensor]:
    """See `gatekv.ops.naive.paged_segment`."""
    b, h, n, d = q.shape
    x = (group_queries(q, table.rows // b).to(accumulation_dtype(q)) * scale).reshape(table.rows, -1, d)
    answer = _many_queries if x.shape[1] > FEW_QUERIES else _even_rows if table.even else _page_by_page
    out, lse = answer(x, keys, values, table, scale)
    return out.reshape(b, h, n, -1), lse.reshape(b, h, n)


def paged_mass(q: Tensor, keys: Tensor, table: PageTable, lse: Tensor, scale: float, most: bool = False) -> Tensor:
    """See `gatekv.ops.naive.paged_mass`."""
    b, acc = q.shape[0], accumulation_dtype(q)
    x = (group_queries(q, table.rows // b).to(acc) * scale).reshape(table.rows, -1, q.shape[-1])
    norm, owners = lse.to(acc).reshape(table.rows, -1, 1), table.owners.long()
    out = torch.zeros(keys.shape[:2], dtype=acc, device=keys.device)
    for a in range(0, len(owners), CHUNK):
        span = slice(a, a + CHUNK)
        k, mine = keys.index_select(0, table.pages[span]).to(acc), owners[span]
        s = capped(torch.bmm(x.index_select(0, mine), k.transpose(1, 2)), scale)
        paid = s.sub_(norm.index_select(0, mine)).exp_()
        out[table.pages[span].long()] = paid.amax(1) if most else paid.mean(1)
    unused = torch.arange(keys.shape[1], device=keys.device) >= table.fill[:, None]
    out[table.pages.long()] = out[table.pages.long()].masked_fill(unused, 0)
    return out


def _page_by_page(x: Tensor, keys: Tensor, values: Tensor, table: PageTable, scale: float) -> tuple[Tensor, Tensor]:
    """Each page answers alone; answers of one row are summed. x: [rows, queries, D], scaled."""
    owners, (rows, queries, _) = table.owners.long(), x.shape
    if not len(owners):
        return x.new_zeros(rows, queries, values.shape[-1]), x.new_full(x.shape[:2], -torch.inf)
    spans = [slice(a, a + CHUNK) for a in range(0, len(owners), CHUNK)]
    load = lambda pool, span: pool.index_select(0, table.pages[span]).to(x.dtype)  # noqa: E731
    parts = [torch.bmm(x.index_select(0, owners[span]), load(keys, span).transpose(1, 2)) for span in spans]
    s = capped(parts[0] if len(parts) == 1 else torch.cat(parts), scale)  # [entries, queries, block]
    unused = torch.arange(keys.shape[1], device=x.device) >= table.fill[:, None]
    s = s.masked_fill_(unused[:, None], -torch.inf)
    index = owners[:, None].expand(-1, queries)
    top = x.new_full((rows, queries), torch.finfo(x.dtype).min).scatter_reduce(0, index, s.amax(-1), "amax")
    p = s.sub_(top.index_select(0, owners)[..., None]).exp_()
    total = x.new_zeros(rows, queries).index_add_(0, owners, p.sum(-1))
    out = x.new_zeros(rows, queries, values.shape[-1])
    for span in spans:
        out.index_add_(0, owners[span], torch.bmm(p[span], load(values, span)))
    empty = total == 0
    return out / total.masked_fill(empty, 1)[..., None], (top + total.log()).masked_fill(empty, -torch.inf)


def _even_rows(x: Tensor, keys: Tensor, values: Tensor, table: PageTable, scale: float) -> tuple[Tensor, Tensor]:
    """Rows of equal page counts are a rectangle; spans of it answer and merge."""
    pages, fill, block = (*(t.view(table.rows, -1) for t in (table.pages, table.fill)), keys.shape[1])
    assert table.even is not None
    slots, answers = torch.arange(block, dtype=torch.int32, device=x.device), []
    step = max(1, CHUNK // table.rows)
    for a in range(0, table.even, step):
        part = pages[:, a : a + step]
        k, v = (t.index_select(0, part.flatten()).to(x.dtype).view(table.rows, -1, t.shape[2]) for t in (keys, values))
        hidden = None
        if a + step >= table.even:  # only the last page of a row can be part empty
            hidden = (slots >= fill[:, a : a + step, None]).view(table.rows, 1, 1, -1)
        answers.append(rows_segment(x, k, v, hidden, scale))
    return merge(answers)


def _many_queries(x: Tensor, keys: Tensor, values: Tensor, table: PageTable, scale: float) -> tuple[Tensor, Tensor]:
    """Rows of about as many pages (up to twice) are gathered once and read together, by blocks of queries."""
    out, lse = x.new_zeros(*x.shape[:2], values.shape[-1]), x.new_full(x.shape[:2], -torch.inf)
    pages = [table.even] * table.rows if table.even is not None else table.starts.diff().tolist()
    alike: dict[int, list[int]] = {}
    for row, count in enumerate(pages):
        if count:
            alike.setdefault((count - 1).bit_length(), []).append(row)
    for rows in alike.values():
        index = torch.tensor(rows, device=x.device)
        held = table.block_table.index_select(0, index)[:, : max(pages[row] for row in rows)].flatten()
        k, v = (pool.index_select(0, held).view(len(rows), -1, pool.shape[-1]).to(x.dtype) for pool in (keys, values))
        lengths = table.lengths.index_select(0, index)
        hidden = (torch.arange(k.shape[1], device=x.device) >= lengths[:, None])[:, None, None]
        step, asked = max(1, SCORES // (len(rows) * k.shape[1])), x.index_select(0, index)
        for a in range(0, x.shape[1], step):
            block = slice(a, a + step)
            out[index, block], lse[index, block] = rows_segment(asked[:, block], k, v, hidden, scale)
    return out, lse
