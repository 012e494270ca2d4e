"""A buffer of fixed size per head, for policies that go on evicting while decoding."""

from dataclasses import dataclass, replace

import torch

from gatekv.cache.pages import Pages


@dataclass
class Buffer:
    """How much the heads may hold from the prompt's end on.

    Attributes:
        room: [batch, kv_heads] tokens. recent: [batch] last tokens that stay whatever their score.
    """

    room: torch.Tensor
    recent: torch.Tensor

    def excess(self, stores: list[Pages], worths: list[torch.Tensor], seen: int) -> list[torch.Tensor]:
        """[P, block_size] bool of each store: the tokens of lowest worth that must go until every head fits.

        stores: share the head's room. worths: [P, block_size] of each; ties: the earlier goes. seen: slots so far.
        Returns [] where all fit.
        """
        excess = sum(store.lengths for store in stores) - self.room.flatten()
        if not bool((excess > 0).any()):
            return []
        young = self.recent.repeat_interleave(self.room.shape[1])
        parts = []
        for store, worth in zip(stores, worths):
            rows = store.owners.clamp_min(0).long()[:, None]
            kept = seen - store.positions <= young[rows]
            parts.append(store.unrolled(worth.masked_fill(kept, torch.inf), fill=torch.inf))
        order = torch.cat(parts, -1).argsort(dim=-1, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        gone = (rank < excess[:, None]).split([part.shape[-1] for part in parts], -1)
        return [store.rolled(part) for store, part in zip(stores, gone)]

    def select(self, index: torch.Tensor) -> None:
        """Keep, reorder or repeat sequences: index [new_batch]."""
        self.room, self.recent = self.room.index_select(0, index), self.recent.index_select(0, index)

    def twin(self) -> "Buffer":
        """An independent copy; tensors are never written in place."""
        return replace(self)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        return [self.room, self.recent]
