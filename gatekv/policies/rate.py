"""Bits are the budget: what a token is worth buys it 0, 2, 3, 4, 5, 8 or all bits of its key, and of its value."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gatekv.cache.segments.coded import Coded, token_bytes
from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.segment import Shape
from gatekv.ops.codec import WIDTHS
from gatekv.ops.naive import WHOLE
from gatekv.policies.parts import Width
from gatekv.policies.scorer import Scorer, View

Tensor = torch.Tensor
# Of a coded vector: its squared error as a share of its square, measured (docs/lab-notes/rate.md), head_dim 64 to 256.
DISTORTION = {2: 0.11, 3: 0.032, 4: 0.0088, 5: 0.0023, 8: 4e-5, WHOLE: 0.0}
HEAD_BYTES = 64  # of a head, whatever it holds: counts of its streams, the last block of its tables


class Step(NamedTuple):
    """More bits for a token: of which of the two (0: its key, 1: its value, None: both), up to which width; bytes; and
    by how much the key's distortion and the value's shrink."""

    of: int | None
    bits: int
    price: float
    key: float
    value: float


def steps(dims: tuple[int, int], itemsize: int) -> list[Step]:
    """From nothing to all bits, for heads whose keys and values have dims numbers of itemsize bytes."""
    cost = lambda *pair: token_bytes(pair, dims, itemsize)  # noqa: E731
    low, high = WIDTHS[0], WIDTHS[-1]
    found = [Step(None, low, cost(low, low), 1 - DISTORTION[low], 1 - DISTORTION[low])]
    for a, b in zip(WIDTHS, WIDTHS[1:]):
        gain = DISTORTION[a] - DISTORTION[b]
        found.append(Step(0, b, cost(b, low) - cost(a, low), gain, 0.0))
        found.append(Step(1, b, cost(low, b) - cost(low, a), 0.0, gain))
    last = DISTORTION[high]
    return [*found, Step(None, WHOLE, cost(WHOLE, WHOLE) - cost(high, high), last, last)]


@dataclass
class Rate(Width):
    """Every token of every head gets the bits that its utility buys under one budget of bytes; 0 bits: it is evicted.

    With u_j the utility of a token and D(b) the squared error of b bits as a share of a vector's square (D(0) = 1),
        minimise  sum_j u_j (w_j D(bits of key j) + D(bits of value j))   under   sum_j bytes_j <= budget,
    where a token that is gone costs u_j · `evicted`,
    is solved by one price of a byte for all tokens that share the budget (`Rule.scope`: a head, a layer, the model): a
    token takes the next step up while log u_j + log(its gain) - log(its bytes) is above the price (RDKV, 2605.08317,
    calls it reverse water-filling; methods.md §6). The last `window` tokens and the sinks stay whole; the rest of the
    adapter's window is coded, and never evicted.

    Args:
        slope: log u = slope · (a log-attention, or a gate's score).
        key_weight: w_j, how much more an error of a key costs than one of its value, before `measured`.
        measured: exponent of what the layer's own queries say of it: w_j is multiplied by
            (scaling² · |q|² · |k_j|² / head_dim) to that power, the variance of its logit per unit of distortion.
        norms: exponent of |v_j|², of its head's mean, in u_j.
        evicted: distortion of a token that is gone, in squares of its value.
        window: last tokens that stay whole, and queries that are asked for `measured`. sinks: first tokens that stay
        whole, where the scorer protects fewer.
    """

    slope: float = 1.0
    key_weight: float = 4.0
    measured: float = 0.0
    norms: float = 0.0
    evicted: float = 1.0
    window: int = 8
    sinks: int = 4
    allots = True

    def __post_init__(self) -> None:
        for name in ("slope", "key_weight", "evicted"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a factor above 0; got {getattr(self, name)}.")
        if self.window < 1:
            raise ValueError(f"window counts the last tokens that stay whole, at least 1; got {self.window}.")
        if self.sinks < 0:
            raise ValueError(f"sinks counts first tokens that stay whole, at least 0; got {self.sinks}.")

    def least(self, protected: Tensor, head_dim: int, itemsize: int) -> Tensor:
        """See `Width.least`."""
        coded = (protected - self.window).clamp_min(0)
        return protected.clamp_max(self.window) + (coded * self.share(head_dim, itemsize)).ceil().long()

    def segment(self, pages: Pages) -> Coded:
        """See `Width.segment`."""
        return Coded(pages)

    def share(self, head_dim: int, itemsize: int) -> float:
        """See `Width.share`; of a token of the fewest bits."""
        return token_bytes((WIDTHS[0], WIDTHS[0]), (head_dim, head_dim), itemsize) / (2 * head_dim * itemsize)

    def fit(self, ratio: float, length: int, head_dim: int, itemsize: int, evicts: bool) -> tuple["Rate", float]:
        """See `Width.fit`: its budget is of bytes already."""
        return self, ratio

    def forecast_bytes(self, shape: Shape, tokens: float) -> int:
        """See `Width.forecast_bytes`; tokens: as many whole ones as would cost what is spent."""
        return Coded.forecast_bytes(shape, tokens, shape.token_bytes)

    def weights(self, scorer: Scorer, view: View, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(log u, log w), both [batch, kv_heads, tokens]; scores: the scorer's of these tokens."""
        log_u = self.slope * scorer.log_utility(scores)
        size = lambda x: x.float().square().sum(-1).clamp_min(1e-12)  # noqa: E731
        if self.norms:
            v = size(view.values)
            log_u = log_u + self.norms * (v / v.mean(-1, keepdim=True)).log()
        log_w = torch.full_like(log_u, math.log(self.key_weight))
        if self.measured:
            q = size(view.queries).mean(-1).unflatten(1, (log_u.shape[1], -1)).amax(-1)[..., None]
            log_w = log_w + self.measured * (q * size(view.keys) * view.scaling**2 / view.keys.shape[-1]).log()
        return log_u, log_w

    def _entrance(self, w: Tensor, dims: tuple[int, int], itemsize: int) -> tuple[Tensor, Tensor]:
        """(the most that a byte of a token's first bits can gain per unit of its utility, the bits of its key then).

        Its value has the fewest bits there. A key of few bits may be worse than none: its logit is off so far.
        """
        low = WIDTHS[0]
        each = [
            (self.evicted - w * DISTORTION[b] - DISTORTION[low]) / token_bytes((b, low), dims, itemsize) for b in WIDTHS
        ]
        best, at = torch.stack(each).max(0)
        return best.clamp_min(1e-12), torch.tensor(WIDTHS, device=w.device)[at]

    def allot(self, log_u: Tensor, log_w: Tensor, least: Tensor, whole: Tensor, room: Tensor, dims: tuple[int, int],
              itemsize: int) -> Tensor:  # fmt: skip
        """Bits of key and value, [units, tokens, 2] uint8, of units that each share out room [units] bytes.

        log_u, log_w: [units, tokens], log_u -inf where there is no token; least, whole: [units, tokens] bool, tokens
        that are not evicted, and that stay as they are; they are paid for first.
        """
        path, w = steps(dims, itemsize), log_w.double().exp()
        enter, first = self._entrance(w, dims, itemsize)
        found = [enter]
        for step in path[1:]:  # no token takes a later step before its first
            worth = torch.minimum((w * step.key + step.value) / step.price, enter)
            found.append(torch.where(first >= step.bits, enter, worth) if step.of == 0 else worth)
        found = [log_u.double() + f.log() for f in found]
        found[0] = found[0].masked_fill(least & (log_u > -torch.inf), torch.inf)
        # By token, then by step, so that of equal ones each is served whole before the next.
        at = torch.stack([f.masked_fill(whole, torch.inf) for f in found], -1)
        price = torch.tensor([s.price for s in path], dtype=torch.float64, device=at.device).repeat(at.shape[1])
        ranked, order = at.flatten(1).sort(dim=-1, descending=True, stable=True)
        fits = price[order].cumsum(-1) <= room.double()[:, None]
        taken = torch.zeros_like(fits).scatter(1, order, fits | (ranked == torch.inf)).view_as(at)
        taken &= (log_u > -torch.inf)[..., None]
        bits = torch.zeros(*log_u.shape, 2, dtype=torch.uint8, device=at.device)
        for step, mine in zip(path, taken.unbind(-1)):
            part = slice(None) if step.of is None else slice(step.of, step.of + 1)
            bits[..., part] = torch.where(mine[..., None], step.bits, bits[..., part])
        broken = (bits[..., 0] < first) & ~least  # where the bytes ended within a token's first bits
        return bits.masked_fill(broken[..., None], 0)
