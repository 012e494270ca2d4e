"""What a width looks at when a prompt or turn ends: its last queries, and the tokens that stay as they are."""

from dataclasses import dataclass

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.ops import segments

Tensor = torch.Tensor


@dataclass
class PromptEnd:
    """One layer's end of a prompt or turn.

    Attributes:
        queries: [batch, heads, n, head_dim], the last n columns'. asks: [batch, n] bool, False at pads.
        keys: [batch, kv_heads, t, head_dim], of the window; live: [batch, kv_heads, t] bool, which of it will stay.
        real: [batch, 1], real tokens so far. scaling: factor on the attention logits. sinks: [heads], learned ones, or
        None. bits: [batch, kv_heads, n, 2] uint8, of the key and value of each token since the prompt or turn began,
        where that was decided (`gatekv.policies.rate`).
    """

    queries: Tensor
    asks: Tensor
    keys: Tensor
    live: Tensor
    real: Tensor
    scaling: float
    sinks: Tensor | None = None
    bits: Tensor | None = None

    def old(self, pages: Pages, window: int) -> Tensor:
        """[P, block_size] bool: the tokens of `pages` but for each row's last `window`."""
        return pages.ages(self.real) > window

    def energy(self, pages: Pages) -> Tensor:
        """[batch, kv_heads, head_dim]: squares of the held keys, in pages and tail, summed over tokens."""
        held = pages.keys.float().square() * pages.occupied()[..., None]
        out = held.new_zeros(len(pages.lengths), held.shape[-1])
        out.index_add_(0, pages.owners.clamp_min(0).long(), held.sum(1))
        near = self.keys.float().square() * self.live[..., None]
        return out.view(*near.shape[:2], -1) + near.sum(2)

    def near(self, pages: Pages, window: int) -> tuple[Tensor, Tensor]:
        """(output, log-sum-exp) of the queries among the window's tokens and those of `pages`, which are of the last
        `window`. Causal: these tokens came with the queries."""
        b, kv, t, d = self.keys.shape
        n, last = max(window, t), self.queries.shape[2]
        keys = self.keys.new_zeros(b, kv, n, d)
        live = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
        pages.scatter(keys, pages.keys, self.real)
        pages.scatter(live, True, self.real)
        keys[:, :, n - t :] = self.keys
        live[:, :, n - t :] = self.live
        asked = torch.arange(n - last, n, device=keys.device)
        visible = live[:, :, None] & (asked[:, None] >= torch.arange(n, device=keys.device))
        return segments.dense_segment(self.queries, keys, keys, visible, self.scaling)
