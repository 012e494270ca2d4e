"""A layer of latents (MLA, see `gatekv.latent`): one head, whose values are the first numbers of its keys."""

from typing import Any

import torch

from gatekv.attention import AttentionCall
from gatekv.cache.config import CacheConfig
from gatekv.cache.layer import KVLayer
from gatekv.precision import attended
from gatekv.support import LATER

Tensor = torch.Tensor


class LatentKVLayer(KVLayer):
    """It holds what the model caches, and answers queries that are turned to it.

    Attributes:
        taken: [batch, 1, n, rank + rope_dim], the new tokens, until `attend`.
    """

    def __init__(self, config: CacheConfig, layer_idx: int, rank: int) -> None:
        self.latent = rank
        super().__init__(config, layer_idx)

    def reset(self) -> None:
        super().reset()
        self.taken: Tensor = LATER

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: latents and rotated keys [batch, 1, n, …], which the model goes on with."""
        self.taken = attended(torch.cat([key_states, value_states], -1))
        super().update(self.taken, self.taken[..., :0], *args, **kwargs)
        return key_states, value_states

    @torch.compiler.disable
    def attend(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """q, k, v: of the new tokens, expanded: what a prompt's first call attends to without any latent."""
        latent, taken, end = call.latent, self.taken, self.config.prompt_tokens
        assert latent is not None
        call.silent = self.seen == 0 and self.stage.whole and (end is None or q.shape[2] <= end)
        own = latent.plain() if call.silent else None
        out = super().attend(call, latent.absorbed(q), taken, taken[..., :0], mask, scaling)
        self.taken = LATER
        return latent.expanded(out) if own is None else own
