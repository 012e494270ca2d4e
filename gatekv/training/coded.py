"""Training for `rate`: what follows a prompt reads its keys and values as they will be stored.

Which tokens are evicted is the gates' relaxation, as ever. Of those that stay, a token's utility above the cut says how
many bits its key and its value have (`gatekv.policies.rate`), and both are replaced by what would be read of them. That
choice is straight-through: hard forward, and backward as if a token moved smoothly from one width to the next, so that
the task's loss tells a utility what the next bits are worth.
"""

from dataclasses import dataclass
from typing import cast

import torch

from gatekv.attention import sink_tokens
from gatekv.ops.codec import WIDTHS, decode, encode, turn, turn_back
from gatekv.policies.bits import LEAST, rates, steps
from gatekv.policies.rate import Rate

Tensor = torch.Tensor


@dataclass(frozen=True)
class Coding:
    """How one layer's prompt is read.

    Attributes:
        width: the allocation. margin: [batch, kv_heads, prompt], a gate's logits less the threshold at which a token
        enters. whole: [batch, prompt] bool, tokens that stay as they are.
    """

    width: Rate
    margin: Tensor
    whole: Tensor

    @classmethod
    def of(cls, width: Rate, margin: Tensor, valid: Tensor, sinks: int) -> "Coding":
        """Of a prompt with valid [batch, prompt], False at pads, whose sinks and last tokens stay whole."""
        recent = torch.arange(valid.shape[1], 0, -1, device=valid.device) <= width.window
        return cls(width, margin, sink_tokens(valid, max(sinks, width.sinks)) | recent)

    def read(self, keys: Tensor, values: Tensor, q: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kv_heads, prompt, head_dim] as `rate` would store them; the margin gets a gradient.

        q: [batch, heads, n, head_dim], what asks for them, which says how much a key's error matters.
        """
        dims, itemsize = (keys.shape[-1], values.shape[-1]), 2  # bytes are shared out as of bfloat16, in any dtype
        with torch.no_grad():
            w = self.width.key_errors(q, None, keys, scaling).exp()
            (enter, *gains), first = rates(w, self.width.evicted, dims, itemsize)
        above = self.width.slope * self.margin.float()
        read = [_widths(x) for x in (keys, values)]
        out = [found[LEAST] for found in read]
        for step, gain in zip(steps(dims, itemsize)[1:-1], gains):
            of = cast(int, step.of)
            soft = torch.sigmoid(above - (enter / gain).log())
            taken = (soft > 0.5).to(soft) + soft - soft.detach()
            if of == 0:  # what a key has when its token enters
                taken = taken.masked_fill(first >= step.bits, 1.0)
            before = WIDTHS[WIDTHS.index(step.bits) - 1]
            out[of] = out[of] + taken[..., None] * (read[of][step.bits] - read[of][before])
        stays = self.whole[:, None, :, None]
        found = [torch.where(stays, x, coded.to(x.dtype)) for x, coded in zip((keys, values), out)]
        return found[0], found[1]


@torch.no_grad()
def _widths(x: Tensor) -> dict[int, Tensor]:
    """x [batch, kv_heads, tokens, head_dim] as it reads at every width."""
    heads = torch.arange(x.shape[1], device=x.device)[:, None]
    turned = turn(x, heads, x.shape[1])
    kind = torch.promote_types(x.dtype, torch.float32)
    read = {bits: decode(encode(turned, bits, kind), bits, x.shape[-1], kind) for bits in WIDTHS}
    return {bits: turn_back(y, heads, x.shape[1]) for bits, y in read.items()}
