"""Readable references: one function per fast path in this folder, same signature, plain autograd.

Shape letters, here and everywhere: B batch, H query heads, K key-value heads, G = H/K, Q queries, T keys, D head dim.
"""

from typing import TYPE_CHECKING

import torch

from gatekv.ops.scale import capped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gatekv.ops.coded_attention import Codes
    from gatekv.ops.page_table import PageTable
    from gatekv.ops.rectangle import Rectangle

Tensor = torch.Tensor
WHOLE = 16  # bits of a number that is stored as it came, whatever its dtype


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 when the model itself is float64."""
    return torch.promote_types(x.dtype, torch.float32)


def group_queries(q: Tensor, num_kv_heads: int) -> Tensor:
    """[B, H, Q, D] -> [B, K, G, Q, D]: the queries that read one KV head stand together."""
    b, h, n, d = q.shape
    return q.reshape(b, num_kv_heads, h // num_kv_heads, n, d)


def causal_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """[Q, T] bool; the last query sees the last key."""
    i = torch.arange(num_keys - num_queries, num_keys, device=device)
    return i[:, None] >= torch.arange(num_keys, device=device)


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    window: int,
    scale: float,
    mask: Tensor | None = None,
    decay: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in which key j weighs ``gate_j * exp(s_ij)`` once it is `window` tokens behind query i.

    Args:
        q: [B, H, Q, D], the last Q tokens of a sequence; k, v: [B, K, T, D], all of it; Q <= T.
        gate: [B, K, T] in [0, 1]; 1 = kept, 0 = evicted. The gradient is exact, also where the gate is 0:
            d out_i / d gate_j = exp(s_ij - lse_i) (v_j - out_i)   (Attention-Gate, arXiv 2410.12876, straight-through).
        window: keys with i - j < max(window, 1) ignore their gate.
        decay: the weight is gate_j^(i - j): a key fades with its distance (TRIM-KV), at a rate of its own.
        scale: of the logits, a `gatekv.ops.scale.Scale` where they are capped.
        mask: [B, 1, Q, T] bool, True = may attend; None = causal.
        sinks: [H], learned logits of what stands for nothing (see `with_sinks`), or None.

    Returns:
        [B, H, Q, D] in q's dtype; rows that may attend to nothing (pads) are 0.
    """
    n, m = k.shape[2], q.shape[2]
    i, j = torch.arange(n - m, n, device=q.device)[:, None], torch.arange(n, device=q.device)
    weight = gate[:, :, None].to(accumulation_dtype(q))
    if decay:
        weight = weight ** (i - j).clamp_min(0)
    weight = torch.where(i - j < max(window, 1), weight.new_ones(()), weight)
    seen = causal_mask(m, n, q.device)[None, None] if mask is None else mask
    return with_sinks(gated_segment(q, k, v, weight, seen, scale), sinks)[0].to(q.dtype)


def with_sinks(answer: tuple[Tensor, Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """An answer (out [B, H, Q, D], lse [B, H, Q]) merged with that of learned sinks [H], (0, s); None: as it was."""
    if sinks is None:
        return answer
    out, lse = answer
    return merge([answer, (torch.zeros_like(out), sinks.to(lse)[:, None].expand_as(lse))])


def gated_segment(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in which key j weighs ``weight_ij * exp(s_ij)``, answered as (output, log-sum-exp).

    q: [B, H, Q, D]; k, v: [B, K, T, D]; weight: [B, K, Q or 1, T] in [0, 1]; mask: [B, 1, Q, T] bool. The gradient is
    exact where a weight is 0 too. Returns out [B, H, Q, D] in the accumulation dtype and lse [B, H, Q]; a query for
    which nothing weighs anything gets (0, -inf).
    """
    b, h, m, _ = q.shape
    acc, kv = accumulation_dtype(q), k.shape[1]
    s = capped(torch.einsum("bkgqd,bktd->bkgqt", group_queries(q, kv).to(acc), k.to(acc)) * scale, scale)
    allowed = mask[:, :, None].expand(b, 1, 1, m, k.shape[2])
    # The maximum runs over evicted keys too: they may outweigh every live one, and their gradient must stay finite.
    top = s.masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True).detach().clamp_min(torch.finfo(acc).min)
    e = torch.where(allowed, weight[:, :, None].to(acc), 0) * torch.exp((s - top).masked_fill(~allowed, -torch.inf))
    out, lse = normalised(torch.einsum("bkgqt,bktd->bkgqd", e, v.to(acc)), e.sum(-1))
    return out.reshape(b, h, m, -1), (lse + top[..., 0]).reshape(b, h, m)


def received_attention(
    q: Tensor, k: Tensor, *, window: int, scale: float, mask: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Per key, the largest probability that any query at least `window` tokens later gives it: what evicting it risks.

    q: [B, H, T, D]; k: [B, K, T, D]; mask as in `gated_attention`. Maximum over queries and over the heads of a group
    (the score of KVzip, arXiv 2505.23416, over the text itself). Returns [B, K, T] float32; 0 where no query is left.
    """
    b, kv, n, _ = k.shape
    s = capped(torch.einsum("bkgqd,bktd->bkgqt", group_queries(q, kv).float(), k.float()) * scale, scale)
    allowed = (causal_mask(n, n, q.device) if mask is None else mask).expand(b, 1, n, n)[:, :, None]
    asks = allowed.diagonal(dim1=-2, dim2=-1)[..., None]  # a pad sees real keys but not itself: its query is no query
    p = _softmax(s.masked_fill(~allowed, -torch.inf), sinks).masked_fill(~(allowed & asks), 0)
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)
    return p.masked_fill(i - j < max(window, 1), 0).amax((2, 3))


def _softmax(s: Tensor, sinks: Tensor | None) -> Tensor:
    """Of scores [B, K, G, Q, T], beside learned sinks [H] or None."""
    if sinks is None:
        return s.softmax(-1)
    own = sinks.to(s).view(1, s.shape[1], -1, 1, 1).expand(*s.shape[:-1], 1)
    return torch.cat([s, own], -1).softmax(-1)[..., :-1]


def _paid(q: Tensor, k: Tensor, scale: float, valid: Tensor, asks: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities [B, K, G, Q, T] of the last Q tokens' queries over all keys; zero for pads and who does not ask."""
    acc = accumulation_dtype(q)
    s = capped(torch.einsum("bkgqd,bktd->bkgqt", group_queries(q, k.shape[1]).to(acc), k.to(acc)) * scale, scale)
    seen = causal_mask(q.shape[2], k.shape[2], q.device) & (asks[:, :, None] & valid[:, None])[:, None, None]
    return _softmax(s.masked_fill(~seen, -torch.inf), sinks).masked_fill(~seen, 0)


def attention_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    valid: Tensor,
    asks: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Per key, the probability that a causal prompt's last queries give it, summed over queries, mean over a group.

    q: [B, H, Q, D]; k: [B, K, T, D]; valid: [B, T] bool, pads neither ask nor receive; asks: [B, Q] bool, whose queries
    count, real ones only; None = all real ones; sinks: [H] learned ones, which take their share. Returns [B, K, T] in
    the accumulation dtype (H2O, arXiv 2306.14048).
    """
    return _paid(q, k, scale, valid, valid[:, -q.shape[2] :] if asks is None else asks, sinks).sum(-2).mean(2)


def local_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    valid: Tensor,
    near: Tensor,
    beside: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, K]: the probability that all queries of a causal prompt give their last keys, those `beside` left out.

    Shapes as for `attention_mass`, Q = T; near: [B], query i finds keys j with i - j < near; beside: [B, K, T] bool.
    Summed over queries and keys, mean over a group.
    """
    at = torch.arange(k.shape[2], device=k.device)
    close = (at[:, None] - at < near[:, None, None])[:, None] & ~beside[:, :, None]
    return (_paid(q, k, scale, valid, valid, sinks) * close[:, :, None]).sum((-1, -2)).mean(2)


def dense_segment(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over a rectangular memory, answered as (output, log-sum-exp).

    q: [B, H, Q, D]; k, v: [B, K, T, D]; mask: [B, 1 or K, Q, T] bool or None = all is seen.
    Returns out [B, H, Q, D] in the accumulation dtype and lse [B, H, Q]; a query that sees nothing gets (0, -inf).
    """
    b, h, n, _ = q.shape
    kv, acc = k.shape[1], accumulation_dtype(q)
    s = capped(torch.einsum("bkgqd,bktd->bkgqt", group_queries(q, kv).to(acc), k.to(acc)) * scale, scale)
    if mask is not None:
        s = s.masked_fill(~mask[:, :, None], -torch.inf)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = torch.einsum("bkgqt,bktd->bkgqd", p, v.to(acc))
    return out.reshape(b, h, n, -1), lse.reshape(b, h, n)


def joint_attention(
    q: Tensor, memories: "list[Rectangle]", scale: float, blind: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One softmax over several rectangular memories (`gatekv.ops.rectangle.Rectangle`), in the accumulation dtype.

    q: [B, H, Q, D]; R rows of sequence · kv_heads + head, G query heads in a group, a row's queries ordered (group, Q).
    blind: a query may see nothing, and gets 0. Returns out [B, H, Q, D], scores [R, G · Q, all tokens] with -inf where
    a query does not see, and the probabilities that each memory's tokens get [R, G · Q, its tokens].
    """
    b, h, n, _ = q.shape
    rows, acc = len(memories[0].keys), accumulation_dtype(q)
    said, values = [], []
    for keys, value, hidden, own in memories:
        x = (q if own is None else own).to(acc).reshape(rows, b * h // rows, n, -1)
        s = capped(torch.einsum("rgqd,rtd->rgqt", x, keys.to(acc)) * scale, scale)
        said.append(s if hidden is None else s.masked_fill(hidden[:, None], -torch.inf))
        values.append(value.to(acc))
    s = torch.cat(said, -1)
    lse = s.logsumexp(-1, keepdim=True)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0))
    out = torch.einsum("rgqt,rtd->rgqd", p, torch.cat(values, 1))
    parts = p.flatten(1, 2).split([part.shape[-1] for part in said], -1)
    return out.reshape(b, h, n, -1), s.flatten(1, 2), list(parts)


def normalised(total_value: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ w v [..., D], Σ w [...]) with weights w >= 0 -> (output, log-sum-exp); a total of 0 gives (0, -inf).

    Totals below the smallest normal number count as 0, so that gradients stay finite.
    """
    held = total > torch.finfo(total.dtype).tiny
    total = torch.where(held, total, 1)
    return torch.where(held[..., None], total_value / total[..., None], 0), torch.where(held, total.log(), -torch.inf)


def remainder_reach(
    q: Tensor, k: Tensor, psi: Tensor, left: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ_j ψ(k_j) (q_i·k_j) and Σ_j ψ(k_j) over the tokens that query i finds, as in `remainder_segment`.

    q: [B, H, Q, D], of the last Q of T tokens; k: [B, K, T, D]; psi: [B, K, T, R]. Returns both [B, H, Q, R] in the
    accumulation dtype: their quotient is what q_i says to the centroids of the keys, ψ being the weights.
    """
    b, kv, n, r = psi.shape
    acc, m = torch.promote_types(accumulation_dtype(k), psi.dtype), q.shape[2]
    gone = _found(left, m, n, mask)
    said = torch.einsum("bkgqd,bktd->bkgqt", group_queries(q, kv).to(acc), k.to(acc))
    reach = torch.einsum("bkgqt,bktr->bkgqr", torch.where(gone[:, :, None], said, 0), psi.to(acc))
    mass = torch.einsum("bkqt,bktr->bkqr", gone.expand(b, kv, m, n).to(acc), psi.to(acc))
    return reach.reshape(b, -1, m, r), mass.repeat_interleave(q.shape[1] // kv, 1)


def _found(left: Tensor, queries: int, n: int, mask: Tensor | None) -> Tensor:
    """[B, K, Q, T] bool: which keys the last queries find in the remainder."""
    i, j = torch.arange(n - queries, n, device=left.device)[:, None], torch.arange(n, device=left.device)
    gone = (i >= left[:, :, None]) & (i > j)
    return gone if mask is None else gone & mask


def remainder_segment(
    phi: Tensor, psi: Tensor, v: Tensor, left: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens that have left, with φ(q_i)·ψ(k_j) for e^{s_ij}: LESS (arXiv 2402.09398) in parallel.

    Args:
        phi: [B, H, Q, R], of the last Q of T tokens; psi: [B, K, T, R]; both >= 0. v: [B, K, T, D].
        left: [B, K, T] int; query i, counted from 0 over the T tokens, finds key j in the remainder iff i >= left_j
            (and i > j: no token leaves before it was attended to). T or more = never. Constants: no gradient.
        mask: [B, 1, Q, T] bool, True = may attend; None = causal. Causal and pads, nothing else.

    Returns:
        out [B, H, Q, D] in the accumulation dtype and lse [B, H, Q]; a query that finds nothing gets (0, -inf).
    """
    b, kv, n, _ = psi.shape
    acc, m = torch.promote_types(accumulation_dtype(v), phi.dtype), phi.shape[2]
    gone = _found(left, m, n, mask)
    weight = torch.einsum("bkgqr,bktr->bkgqt", group_queries(phi, kv).to(acc), psi.to(acc))
    weight = torch.where(gone[:, :, None], weight, 0)
    out, lse = normalised(torch.einsum("bkgqt,bktd->bkgqd", weight, v.to(acc)), weight.sum(-1))
    return out.reshape(b, -1, m, v.shape[-1]), lse.reshape(b, -1, m)


def paged_segment(q: Tensor, keys: Tensor, values: Tensor, table: "PageTable", scale: float) -> tuple[Tensor, Tensor]:
    """Attention over a paged memory in which every (sequence, kv head) row has its own tokens.

    q: [B, H, Q, D]; keys [P, block, D], values [P, block, D'], the pool; table: a `PageTable` over B·K rows.
    Every query sees every token of its row, whatever the order. Returns as `dense_segment`.
    """
    b, h, n, d = q.shape
    acc = accumulation_dtype(q)
    heads = group_queries(q, table.rows // b).to(acc).flatten(0, 1)  # [B*K, G, Q, D]
    outs, lses = [], []
    for r in range(table.rows):
        mine = [(p, f) for p, o, f in zip(*(t.tolist() for t in (table.pages, table.owners, table.fill))) if o == r]
        k, v = (torch.cat([t[:0, 0], *(t[p, :f] for p, f in mine)]).to(acc) for t in (keys, values))
        s = capped(heads[r] @ k.T * scale, scale)
        lse = s.logsumexp(-1)
        outs.append(torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None]) @ v)
        lses.append(lse)
    return torch.stack(outs).reshape(b, h, n, -1), torch.stack(lses).reshape(b, h, n)


def paged_mass(q: Tensor, keys: Tensor, table: "PageTable", lse: Tensor, scale: float, most: bool = False) -> Tensor:
    """The attention that each token of a paged memory receives: [P, block], mean over queries and heads of a group.

    q: [B, H, Q, D]; lse: [B, H, Q], log-sum-exp over everything the query saw, infinite for one that does not count;
    keys, table as in `paged_segment`; most: the maximum, not the mean. Slots that hold no token get 0. In the
    accumulation dtype.
    """
    b, acc = q.shape[0], accumulation_dtype(q)
    heads = group_queries(q, table.rows // b).to(acc).flatten(0, 1).flatten(1, 2)  # [B*K, G*Q, D]
    norm = group_queries(lse[..., None], table.rows // b).to(acc).flatten(0, 1).flatten(1, 2)  # [B*K, G*Q, 1]
    out = torch.zeros(keys.shape[:2], dtype=acc, device=keys.device)
    for p, r, f in zip(*(t.tolist() for t in (table.pages, table.owners, table.fill))):
        paid = torch.exp(capped(heads[r] @ keys[p, :f].to(acc).T * scale, scale) - norm[r])
        out[p, :f] = paid.amax(0) if most else paid.mean(0)
    return out


def quantise(x: Tensor, bits: int, outliers: int) -> Tensor:
    """Vectors [..., D] -> records [..., bytes] uint8, laid out as `gatekv.ops.quantise` says.

    bits: 2, 4, 8 or WHOLE; outliers: so many numbers of each vector, farthest from its mean, stay what they are, and
    codes span the range of the others.
    """
    if bits == WHOLE:
        return x.contiguous().view(torch.uint8)
    records, d = [], x.shape[-1]
    for vector in x.reshape(-1, d):
        wide = vector.to(accumulation_dtype(x))
        apart = sorted((wide - wide.mean()).abs().topk(outliers).indices.tolist())
        rest = torch.stack([wide[i] for i in range(d) if i not in apart])
        zero, scale = rest.min().to(x.dtype), ((rest.max() - rest.min()) / (2**bits - 1)).to(x.dtype)
        packed = 0
        for i, number in enumerate(wide):
            code = 0 if scale == 0 else int(((number - zero) / scale.to(wide.dtype)).round())
            packed |= min(max(code, 0), 2**bits - 1) << i * bits
        numbers = torch.stack([scale, zero, *(vector[i] for i in apart)]).view(torch.uint8).tolist()
        records.append([*packed.to_bytes(-(-d * bits // 8), "little"), *numbers, *apart])
    return torch.tensor(records, dtype=torch.uint8).view(*x.shape[:-1], -1)


def dequantise(records: Tensor, bits: int, outliers: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Records [..., bytes] of `quantise`, of vectors of head_dim numbers of dtype -> vectors [..., head_dim]."""
    if bits == WHOLE:
        return records.view(dtype)
    vectors, length = [], -(-head_dim * bits // 8)
    for record in records.reshape(-1, records.shape[-1]):
        packed = int.from_bytes(bytes(record[:length].tolist()), "little")
        codes = torch.tensor([packed >> i * bits & 2**bits - 1 for i in range(head_dim)])
        scale, zero, *apart = record[length : len(record) - outliers].clone().view(dtype)
        acc = accumulation_dtype(scale)
        vector = (zero.to(acc) + codes.to(acc) * scale.to(acc)).to(dtype)
        for channel, number in zip(record[len(record) - outliers :].tolist(), apart):
            vector[channel] = number
        vectors.append(vector)
    flat = torch.stack(vectors) if vectors else torch.empty(0, head_dim, dtype=dtype, device=records.device)
    return flat.view(*records.shape[:-1], head_dim)


def encode(y: Tensor, bits: int, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Turned vectors [..., D] -> records [..., bytes] uint8, laid out as `gatekv.ops.codec` says.

    bits: 2, 3, 4, 5 or 8; levels [2^bits], ascending, symmetric around 0; dtype: of the scale.
    """
    records, d, half = [], y.shape[-1], 2 ** (bits - 1)
    for vector in y.reshape(-1, d):
        wide = vector.to(accumulation_dtype(y))
        size = wide.square().mean().sqrt()
        unit = wide / size if size > 0 else wide
        codes = [int((number - levels).abs().argmin()) for number in unit]
        found = levels[codes].to(wide.dtype)
        scale = (found @ wide / (found @ found)).to(dtype)
        if bits in (2, 4, 8):
            streams = [(bits, codes)]
        else:  # 3, 5: how far from the middle, then on which side
            streams = [
                (bits - 1, [c - half if c >= half else half - 1 - c for c in codes]),
                (1, [c >= half for c in codes]),
            ]
        record: list[int] = []
        for width, numbers in streams:
            packed = sum(int(number) << i * width for i, number in enumerate(numbers))
            record += packed.to_bytes(-(-d * width // 8), "little")
        records.append(record + scale.view(1).view(torch.uint8).tolist())
    return torch.tensor(records, dtype=torch.uint8).view(*y.shape[:-1], -1)


def decode(records: Tensor, bits: int, levels: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Records [..., bytes] of `encode` -> the turned vectors [..., head_dim], float32 or wider; dtype: of the scale."""
    vectors, half, wide = [], 2 ** (bits - 1), torch.promote_types(dtype, torch.float32)
    for record in records.reshape(-1, records.shape[-1]):
        at, streams = 0, []
        for width in (bits,) if bits in (2, 4, 8) else (bits - 1, 1):
            end = at + -(-head_dim * width // 8)
            packed = int.from_bytes(bytes(record[at:end].tolist()), "little")
            streams.append([packed >> i * width & 2**width - 1 for i in range(head_dim)])
            at = end
        codes = streams[0] if len(streams) == 1 else [half + c if up else half - 1 - c for c, up in zip(*streams)]
        vectors.append(levels[codes].to(wide) * record[at:].clone().view(dtype).to(wide))
    flat = torch.stack(vectors) if vectors else torch.empty(0, head_dim, dtype=wide)
    return flat.view(*records.shape[:-1], head_dim)


def coded_segment(
    q: Tensor, streams: "Sequence[Codes]", kv_heads: int, dims: tuple[int, int], dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over tokens in few bits, of which every (sequence, kv head) row has its own (`gatekv.ops.codec`).

    q: [B, H, Q, D], turned as the keys were; streams: tokens by their widths, `gatekv.ops.coded_attention.Codes` of
    B · kv_heads rows; dims: numbers of a key and of a value; dtype: of the scales. Every query sees every token of its
    row. Returns out [B, H, Q, D'], still to be turned back, in the accumulation dtype, and lse [B, H, Q]; a row without
    tokens gets (0, -inf).
    """
    from gatekv.ops.codec import levels, record_bytes

    b, h, n, _ = q.shape
    acc = accumulation_dtype(q)
    heads = group_queries(q, kv_heads).to(acc).flatten(0, 1)  # [B*K, G, Q, D]
    answers = []
    for row in range(b * kv_heads):
        keys, values = [heads.new_zeros(0, dims[0])], [heads.new_zeros(0, dims[1])]
        for records, counts, key_bits, value_bits in streams:
            mine = records[int(counts[:row].sum()) :][: int(counts[row])]
            size = record_bytes(key_bits, dims[0], dtype.itemsize)
            keys.append(decode(mine[:, :size], key_bits, levels(key_bits), dims[0], dtype).to(acc))
            values.append(decode(mine[:, size:], value_bits, levels(value_bits), dims[1], dtype).to(acc))
        s = capped(heads[row] @ torch.cat(keys).T * scale, scale)
        lse = s.logsumexp(-1)
        p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        answers.append((p @ torch.cat(values), lse))
    out, lses = (torch.stack(t) for t in zip(*answers))
    return out.reshape(b, h, n, -1), lses.reshape(b, h, n)


def merge(segments: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge (output, lse) answers of several memories into one; associative; two empty ones give (0, -inf)."""
    outs, lses = torch.stack([o for o, _ in segments]), torch.stack([s for _, s in segments])
    lse = lses.logsumexp(0)
    share = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0))
    return (outs * share[..., None]).sum(0), lse
