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
        queries: [batch, heads, n, head_dim], the last n slots'. asks: [batch, n] bool, False at pads.
        keys: [batch, kv_heads, t, head_dim], of the tail; live: [batch, kv_heads, t] bool, which of it will stay.
        seen: slots so far. scaling: factor on the attention logits.
    """

    queries: Tensor
    asks: Tensor
    keys: Tensor
    live: Tensor
    seen: int
    scaling: float

    def energy(self, pages: Pages) -> Tensor:
        """[batch, kv_heads, head_dim]: squares of the held keys, in pages and tail, summed over tokens."""
        held = pages.keys.float().square() * pages.occupied()[..., None]
        out = held.new_zeros(len(pages.lengths), held.shape[-1])
        out.index_add_(0, pages.owners.clamp_min(0).long(), held.sum(1))
        near = self.keys.float().square() * self.live[..., None]
        return out.view(*near.shape[:2], -1) + near.sum(2)

    def near(self, pages: Pages, first: int) -> tuple[Tensor, Tensor]:
        """(output, log-sum-exp) of the queries among the tokens of tail and pages, whose earliest slot is `first`.

        Causal: these tokens came with the queries.
        """
        b, kv, t, d = self.keys.shape
        first = min(first, self.seen - t)
        keys = self.keys.new_zeros(b, kv, self.seen - first, d)
        live = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
        pages.scatter(keys, pages.keys, first)
        pages.scatter(live, True, first)
        keys[:, :, keys.shape[2] - t :] = self.keys
        live[:, :, keys.shape[2] - t :] = self.live
        asked = torch.arange(self.seen - self.queries.shape[2], self.seen, device=keys.device)
        visible = live[:, :, None] & (asked[:, None] >= torch.arange(first, self.seen, device=keys.device))
        return segments.dense_segment(self.queries, keys, keys, visible, self.scaling)
