"""Ragged storage: the kept tokens of one layer, each (sequence, KV head) with its own count, in flat tensors."""

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass
class RaggedStore:
    """Kept tokens, sorted by (sequence, head) and then by position. Immutable: operations return a new store.

    Attributes:
        keys, values: [N, head_dim]. positions: [N] int32, slot in the sequence as fed (pads counted).
        offsets: rows offsets[r]:offsets[r + 1] belong to r = sequence * kv_heads + head.
        scores: [N] float32 while a later trim still needs them, else None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    offsets: list[int]
    scores: Tensor | None = None

    @classmethod
    def empty(cls, like: Tensor, with_scores: bool) -> "RaggedStore":
        """No tokens yet; `like` [batch, kv_heads, tokens, head_dim] gives shapes, dtype and device."""
        b, kv, _, d = like.shape
        flat = like.new_empty(0, d)
        positions = torch.empty(0, dtype=torch.int32, device=like.device)
        scores = torch.empty(0, device=like.device) if with_scores else None
        return cls(flat, flat.clone(), positions, [0] * (b * kv + 1), scores)

    def __len__(self) -> int:
        return self.offsets[-1]

    def owners(self) -> Tensor:
        """[N] int64: the (sequence, head) row each token belongs to."""
        counts = torch.tensor(self.offsets, device=self.keys.device).diff()
        return torch.repeat_interleave(counts)

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [t for t in (self.keys, self.values, self.positions, self.scores) if t is not None]

    def append(self, keys: Tensor, values: Tensor, keep: Tensor, start: int, scores: Tensor | None) -> "RaggedStore":
        """Add the flagged tokens of a dense piece.

        keys, values: [batch, kv_heads, n, head_dim]; keep: [batch, kv_heads, n] bool; start: slot of the first;
        scores: [batch, kv_heads, n] or None.
        """
        rows, slots = keep.flatten(0, 1).nonzero(as_tuple=True)
        if len(rows) == 0:
            return self
        new_k, new_v = keys.flatten(0, 1)[rows, slots], values.flatten(0, 1)[rows, slots]
        owners = torch.cat([self.owners(), rows])
        order = owners.sort(stable=True).indices
        return RaggedStore(
            torch.cat([self.keys, new_k])[order],
            torch.cat([self.values, new_v])[order],
            torch.cat([self.positions, (slots + start).to(torch.int32)])[order],
            self._offsets(owners),
            None if self.scores is None else torch.cat([self.scores, scores.flatten(0, 1)[rows, slots].float()])[order],
        )

    def _offsets(self, owners: Tensor) -> list[int]:
        counts = torch.bincount(owners, minlength=len(self.offsets) - 1)
        return [0, *counts.cumsum(0).tolist()]

    def filter(self, keep: Tensor) -> "RaggedStore":
        """Drop what keep [batch, kv_heads, slots] does not flag, and the scores with it."""
        owners = self.owners()
        held = keep.flatten(0, 1)[owners, self.positions.long()]
        return RaggedStore(self.keys[held], self.values[held], self.positions[held], self._offsets(owners[held]))

    def select(self, sequences: Tensor, kv: int) -> "RaggedStore":
        """The store of a reordered, repeated or reduced batch: sequences [new_batch] index the old, of kv heads."""
        rows = (sequences[:, None] * kv + torch.arange(kv, device=sequences.device)).flatten().tolist()
        spans = [torch.arange(self.offsets[r], self.offsets[r + 1], device=self.keys.device) for r in rows]
        index = torch.cat(spans)
        offsets = [0]
        for span in spans:
            offsets.append(offsets[-1] + len(span))
        scores = None if self.scores is None else self.scores[index]
        return RaggedStore(self.keys[index], self.values[index], self.positions[index], offsets, scores)

    def scatter(self, into: Tensor, source: Tensor | bool | float) -> None:
        """Write `source` ([N] or a scalar) into the slots [batch, kv_heads, slots] that are held."""
        into.flatten(0, 1)[self.owners(), self.positions.long()] = source
