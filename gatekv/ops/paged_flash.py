"""Paged attention by flash-attn's kernel (the `flash` extra): every (sequence, kv head) becomes a sequence."""

import torch

from gatekv.ops import paged_attention
from gatekv.ops.naive import group_queries
from gatekv.ops.page_table import PageTable
from gatekv.ops.scale import cap_of

PAGE_MULTIPLE = 256  # the kernel's own condition on block_size


def paged_segment(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: PageTable, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gatekv.ops.naive.paged_segment`; half precision on CUDA, block_size a multiple of 256."""
    from flash_attn import flash_attn_with_kvcache

    b, h, n, d = q.shape
    # The kernel wants keys as wide as values (thin keys are not) and large pages (quantised tokens' are small).
    if keys.shape[-1] != values.shape[-1] or keys.shape[1] % PAGE_MULTIPLE:
        return paged_attention.paged_segment(q, keys, values, table, scale)
    if not len(table.pages):
        return torch.zeros(b, h, n, d, device=q.device), torch.full((b, h, n), -torch.inf, device=q.device)
    x = group_queries(q, table.rows // b).flatten(0, 1).transpose(1, 2)  # [rows, Q, G, D]
    out, lse = flash_attn_with_kvcache(
        x.contiguous(), keys[:, :, None], values[:, :, None], cache_seqlens=table.lengths,
        block_table=table.block_table, softmax_scale=float(scale), causal=False, return_softmax_lse=True,
        softcap=cap_of(scale) or 0.0,
    )  # fmt: skip
    empty = (table.lengths == 0)[:, None, None]
    out = out.float().transpose(1, 2).masked_fill(empty[..., None], 0)  # [rows, G, Q, D]
    return out.reshape(b, h, n, d), lse.float().masked_fill(empty, -torch.inf).reshape(b, h, n)
