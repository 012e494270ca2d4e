"""ThinK (arXiv 2407.21018): old keys are stored without the channels that recent queries make least of."""

from dataclasses import dataclass

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.segment import Shape
from gatekv.cache.segments.thin import Thin
from gatekv.ops.naive import group_queries
from gatekv.policies.parts import Width


@dataclass
class Channels(Width):
    """Per KV head, channel score = ||Q_obs[:, i]|| · ||K[:, i]|| (§3.2, q² averaged over the group); the int(prune ·
    head_dim) lowest key channels of what the prompt leaves are dropped, and the channels stay the same while decoding.

    The last `window` tokens of the prompt and all later ones keep their full width; values are untouched (the paper
    finds pruning them weaker). Logits keep the scale of the whole head. Saves prune / 2 of the old tokens' bytes.

    Args:
        prune: lambda, share of key channels (paper: .4). window: observed queries, and recent tokens (paper: 32).
    """

    prune: float = 0.4
    window: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune is the share of key channels to drop, at least 0 and below 1; got {self.prune}.")
        if self.window < 1:
            raise ValueError(
                f"window counts the queries that say which channels matter, at least 1; got {self.window}."
            )

    def segment(self, pages: Pages) -> Thin:
        """Where old tokens go in one layer, beside its pages."""
        return Thin(self, pages)

    def forecast_bytes(self, shape: Shape, tokens: float) -> int:
        """Bytes of one layer's old tokens, so many a head."""
        return Thin.forecast_bytes(shape, tokens, shape.head_dim - int(shape.head_dim * self.prune))

    def kept(self, queries: torch.Tensor, energy: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Indices of the channels that stay, ascending: [batch, kv_heads, head_dim - int(prune · head_dim)].

        queries: [batch, heads, >= window, head_dim], the prompt's last; valid: [batch, >= window] bool, False at pads;
        energy: [batch, kv_heads, head_dim], squares of the held keys, summed over tokens.
        """
        d = energy.shape[-1]
        q = group_queries(queries[:, :, -self.window :], energy.shape[1]).float().square()
        q = q.masked_fill(~valid[:, None, None, -q.shape[3] :, None], 0)
        scores = q.sum(3).mean(2) * energy
        return scores.topk(d - int(d * self.prune), dim=-1).indices.sort(-1).values

    def share(self, head_dim: int, itemsize: int) -> float:
        """See `Width.share`."""
        return 1 - int(head_dim * self.prune) / head_dim / 2
