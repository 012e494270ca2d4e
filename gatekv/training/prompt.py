"""Training flags that act after the prompt: what follows it reads the plain model's prompt through the gates.

The prompt attends to all of itself, so its keys and values are the teacher's, from the teacher's own pass; the student
runs over what follows alone. A step costs little more than one forward over the row.
"""

from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from gatekv.attention import AttentionCall, Memory
from gatekv.config import GateSpec
from gatekv.less.maps import Waiting
from gatekv.ops import segments
from gatekv.ops.gated_attention import BLOCK, gated_attention
from gatekv.ops.learned_sinks import with_sinks
from gatekv.ops.naive import causal_mask, gated_segment
from gatekv.training.coded import Coding


class GatedPrompt(Memory, CacheLayerMixin):
    """One layer's prompt, seen by the tokens that follow with the gate's weights; a `gatekv.attention.Memory`."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        weight: torch.Tensor,
        window: int,
        decay: bool,
        coding: Coding | None = None,
    ) -> None:
        """keys, values: [batch, kv_heads, prompt, head_dim]; weight: [batch, kv_heads, prompt] in [0, 1]; coding: how
        they are stored, or None: as they are."""
        super().__init__()
        self.keys, self.values, self.weight, self.window, self.decay = keys, values, weight, window, decay
        self.coding = coding
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to do: the prompt was there first."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the new tokens through; `attend` reads them, and nothing is stored."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, 0

    def attend(
        self,
        call: AttentionCall,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Gated attention of all that follows the prompt, in one call; with low-rank maps, the rest of each token's
        weight goes into their state."""
        old = self.keys, self.values
        if self.coding is not None:
            old = self.coding.read(*old, q.detach(), scaling)
        k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        weight = torch.nn.functional.pad(self.weight, (0, q.shape[2]), value=1.0)
        if call.less is None:
            return gated_attention(q, k, v, weight, window=self.window, scale=scaling, mask=mask, decay=self.decay,
                sinks=call.sinks)  # fmt: skip
        prompt, n = self.keys.shape[2], k.shape[2]
        seen = causal_mask(q.shape[2], n, q.device)[None, None] if mask is None else mask
        blocks = [slice(a, a + BLOCK) for a in range(0, q.shape[2], BLOCK)]
        answers = [  # each block's scores are computed again in the backward pass, never held
            checkpoint(gated_segment, q[:, :, i], k, v, weight[:, :, None], seen[:, :, i], scaling, use_reentrant=False)
            for i in blocks
        ]
        kept = torch.cat([out for out, _ in answers], 2), torch.cat([lse for _, lse in answers], 2)
        psi = call.less.psi(k) * (1 - weight)[..., None]
        left = torch.full(k.shape[:3], n, device=k.device).index_fill_(2, torch.arange(prompt, device=k.device), prompt)
        far = call.less.answer(q, scaling, None, Waiting(psi, k, v, left, mask))
        return with_sinks(segments.merge([kept, *far]), call.sinks)[0].to(q.dtype)


def gated_prompt(
    teacher: DynamicCache,
    split: int,
    weights: dict[int, torch.Tensor],
    spec: GateSpec,
    codings: dict[int, Coding] | None = None,
) -> Cache:
    """The student's cache: the first `split` tokens of the teacher's, layers in `weights` (by index) behind gates, and
    read as `codings` say where there are any."""
    layers: list[Any] = []
    for i, layer in enumerate(cast("list[DynamicLayer]", teacher.layers)):
        assert layer.keys is not None and layer.values is not None
        keys, values = layer.keys[:, :, :split], layer.values[:, :, :split]
        if i in weights:
            coding = None if codings is None else codings[i]
            layers.append(GatedPrompt(keys, values, weights[i], spec.window, spec.relaxation == "decay", coding))
        else:  # a layer with a sliding window: no gate, and its own mask
            layers.append(DynamicLayer())
            layers[-1].update(keys, values)
    return Cache(layers=layers)
