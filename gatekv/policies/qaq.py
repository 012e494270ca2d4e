"""QAQ (arXiv 2403.04643): old tokens are stored in fewer bits, each key and value in as many as its error is worth."""

import math
from dataclasses import dataclass, replace

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.quantised import PAGE, PAIRS, TOKEN_BYTES, Quantised
from gatekv.cache.segments.segment import Shape
from gatekv.ops.naive import WHOLE
from gatekv.ops.quantise import record_bytes
from gatekv.policies.parts import Width

WIDTHS = (2, 4, 8, WHOLE)
KNOTS = (2, 8, WHOLE)


@dataclass
class Bits(Width):
    """No token goes; a token's key and value get the fewest bits that keep the attention output within a tolerance.

    Per KV head, with a_j the most attention that the last `window` queries give to token j (the paper's attention
    window: what mattered to one of them may matter again), an error of at most D in each number of
        value j moves the output by               a_j · D                                (value cache, linear)
        key j moves its logit by                  |q| · scaling · D                      (|q| <= sqrt(head_dim) · q_max)
        and the attention to an old token i by    x_j = max_i |a_i (1[i = j] - a_j)|     (softmax's derivative)
    times that. An affine code of b bits over a range R has D = R / (2 (2^b - 1)), so b = log2(R / (2 D) + 1), rounded
    up to 2, 4, 8, or WHOLE: the vector as it came. `outliers` of each vector's numbers, the farthest from its mean,
    stay what they are and are left out of R.

    Ours, where the paper has hyper-parameters: it is given one tolerance for keys and one for values, here errors of
    attention count in units of the output (times the size of the head's values), so that there is one, and that one
    is found for each row and layer so that the bits are `bits` on average. The last `window` tokens, of which too few
    queries have told, and all later ones stay whole. Sensitivity is by KV head: the most over the heads of a group.

    Ours altogether is `floor`. Where the last queries do not look, the rule gives 2 bits; later queries look elsewhere,
    and a key of 2 bits may then draw what it likes. So no a_j counts as less than `floor` times an even share of the
    attention to the old tokens; docs/lab-notes/few-bits.md has what it buys. 0: the paper's rule.

    Args:
        bits: mean over the numbers of old keys and values, 2 to 16; 16: nothing is lost. outliers: share of each
        vector, an even number of them, rounded up (paper: 1 %, half at each end). window: observed queries, and recent
        tokens that stay whole. floor: in even shares, at least 0.
    """

    bits: float = 3.0
    outliers: float = 0.01
    window: int = 32
    floor: float = 8.0

    def __post_init__(self) -> None:
        if not WIDTHS[0] <= self.bits <= WHOLE:
            raise ValueError(f"bits is a mean over numbers of {WIDTHS} bits, between 2 and 16; got {self.bits}.")
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"outliers is the share of numbers that stay whole, in [0, .5); got {self.outliers}.")
        if self.window < 1:
            raise ValueError(f"window counts the queries that say which tokens matter, at least 1; got {self.window}.")
        if self.floor < 0:
            raise ValueError(f"floor counts even shares of the attention, at least 0; got {self.floor}.")

    def segment(self, pages: Pages) -> Quantised:
        """Where old tokens go in one layer, beside its pages."""
        return Quantised(self, pages)

    def forecast_bytes(self, shape: Shape, tokens: float) -> int:
        """Bytes of one layer's old tokens, so many a head."""
        each = sum(self.mean_bytes(d, shape.dtype.itemsize) for d in shape.dims) / 2 + shape.beside - 4
        return Quantised.forecast_bytes(shape, tokens, each)

    def apart(self, head_dim: int) -> int:
        """Outliers of a vector of head_dim numbers.

        Raises:
            ValueError: where a channel's number does not fit into a byte.
        """
        if self.outliers and head_dim > 256:
            raise ValueError(f"outliers are found by a byte, and head_dim is {head_dim}, above 256: use outliers=0.")
        return 2 * math.ceil(self.outliers / 2 * head_dim)

    def sensitivity(
        self,
        attention: torch.Tensor,
        held: torch.Tensor,
        key_range: torch.Tensor,
        value_range: torch.Tensor,
        value_size: torch.Tensor,
        query_size: torch.Tensor,
    ) -> torch.Tensor:
        """How far a code of one step over its range would move the output: [2, rows, tokens], keys then values.

        attention, key_range, value_range: [rows, tokens]; held: [rows, tokens] bool, False where there is no token;
        value_size [rows, 1]: of the numbers of a head's values; query_size [rows, 1]: scaling · |q|. A row is a
        sequence's KV head.
        """
        even = self.floor / held.sum(-1, keepdim=True).clamp_min(1)
        attention = torch.maximum(attention, even.clamp_max(0.5)) * held  # at 1 the softmax would seem saturated
        first, second = torch.nn.functional.pad(attention, (0, 2)).topk(2, dim=-1).values.split(1, dim=-1)
        other = torch.where(attention == first, second, first)
        change = attention * torch.maximum(1 - attention, other)
        return torch.stack([change * query_size * value_size * key_range, attention * value_range])

    def allot(self, sensitivity: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Bits of each vector, as many as fit: [batch, vectors] int64, of which `held` are real.

        A tolerance t asks of a vector of sensitivity s more than b bits iff s / (2^b - 1) > t. So all steps from one
        width to the next are sorted by the tolerance at which they are taken, and taken until the bits are spent.
        """
        n = sensitivity.shape[1]
        levels = torch.tensor(WIDTHS, device=held.device)
        at = torch.cat([sensitivity / (2**low - 1) for low in WIDTHS[:-1]], 1)
        price = levels.diff().repeat_interleave(n) * held.repeat(1, len(WIDTHS) - 1)
        order = at.masked_fill(price == 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        spent = price.gather(-1, order).cumsum(-1)
        room = (self.bits - WIDTHS[0]) * held.sum(-1, keepdim=True)
        taken = torch.zeros_like(price).scatter(-1, order, price.gather(-1, order) * (spent <= room))
        return WIDTHS[0] + taken.view(len(held), -1, n).sum(1)

    def token_bytes(self, bits: int, head_dim: int, itemsize: int) -> float:
        """Of an old token of one head with key and value at one of WIDTHS, position and tables included."""
        return 2 * record_bytes(bits, self.apart(head_dim), head_dim, itemsize) + TOKEN_BYTES

    def mean_bytes(self, head_dim: int, itemsize: int) -> float:
        """As `token_bytes`, at `bits` on average; between 2, 8 and 16 bits bytes grow in proportion."""
        low, high = KNOTS[1:] if self.bits > KNOTS[1] else KNOTS[:2]
        share = (self.bits - low) / (high - low)
        least, most = (self.token_bytes(b, head_dim, itemsize) for b in (low, high))
        return least + share * (most - least)

    def fit(self, ratio: float, length: int, head_dim: int, itemsize: int, evicts: bool) -> tuple["Bits", float]:
        """See `Width.fit`. Tokens go until the others fit at `bits`; where none need go, or may, bits take the room."""
        old, ends = max(length - self.window, 0), PAIRS * PAGE / 2
        room = (ratio * length - self.window) * 2 * head_dim * itemsize
        cost = self.mean_bytes(head_dim, itemsize)
        if evicts and room < (old + ends) * cost:
            fitting = room / cost - ends
            if fitting <= 0:
                raise ValueError(f"budget {ratio} is unreachable: {self.window} of {length} tokens stay whole.")
            return self, (fitting + self.window) / length
        if not old:
            return self, 1.0
        costs = [self.token_bytes(b, head_dim, itemsize) for b in KNOTS]
        first = room / (old + ends) > costs[1]
        share = (room / (old + ends) - costs[first]) / (costs[first + 1] - costs[first])
        if share < 0:
            raise ValueError(f"budget {ratio} is unreachable: all tokens cost more, at {KNOTS[0]} bits.")
        return replace(self, bits=min(KNOTS[first] + share * (KNOTS[first + 1] - KNOTS[first]), WHOLE)), 1.0
