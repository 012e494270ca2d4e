"""What bits cost, what they gain, and who gets them: reverse water-filling over the widths of `gatekv.ops.codec`.

With u_j the utility of a token and D(b) the squared error of b bits as a share of a vector's square,

    minimise  sum_j u_j (w_j D(bits of key j) + D(bits of value j))   under   sum_j bytes_j <= room,

where a token that is gone costs u_j · `evicted`. D is convex, so one price of a byte decides (RDKV, 2605.08317, whose
abstract calls it reverse water-filling): a token takes its next step while u_j · (what the step gains) / (its bytes)
is above that price.
"""

from typing import NamedTuple

import torch

from gatekv.cache.segments.coded import token_bytes
from gatekv.ops.codec import WIDTHS
from gatekv.ops.naive import WHOLE

Tensor = torch.Tensor
Dims = tuple[int, int]  # numbers of a head's key and value
# Of a coded vector: its squared error as a share of its square, measured (docs/lab-notes/bits.md), head_dim 64 to 256.
DISTORTION = {2: 0.11, 3: 0.032, 4: 0.0088, 5: 0.0023, 8: 4e-5, WHOLE: 0.0}
LEAST = WIDTHS[0]
EIGHTHS = 8  # of a byte: what a token costs is a whole number of them, so that sums of many are exact


class Step(NamedTuple):
    """More bits for a token: of which of the two (0: its key, 1: its value, None: both), up to which width; bytes; and
    by how much the key's distortion and the value's shrink."""

    of: int | None
    bits: int
    price: float
    key: float
    value: float


def steps(dims: Dims, itemsize: int) -> list[Step]:
    """From nothing to all bits, for heads whose keys and values have dims numbers of itemsize bytes."""
    cost = lambda *pair: token_bytes(pair, dims, itemsize)  # noqa: E731
    found = [Step(None, LEAST, cost(LEAST, LEAST), 1 - DISTORTION[LEAST], 1 - DISTORTION[LEAST])]
    for a, b in zip(WIDTHS, WIDTHS[1:]):
        gain = DISTORTION[a] - DISTORTION[b]
        found.append(Step(0, b, cost(b, LEAST) - cost(a, LEAST), gain, 0.0))
        found.append(Step(1, b, cost(LEAST, b) - cost(LEAST, a), 0.0, gain))
    high = WIDTHS[-1]
    return [*found, Step(None, WHOLE, cost(WHOLE, WHOLE) - cost(high, high), DISTORTION[high], DISTORTION[high])]


def eighths(bytes: list[float], device: torch.device) -> Tensor:
    """Whole numbers of eighths of a byte, int64."""
    return torch.tensor([round(EIGHTHS * each) for each in bytes], device=device)


def rates(w: Tensor, evicted: float, dims: Dims, itemsize: int) -> tuple[list[Tensor], Tensor]:
    """(what a byte of each of `steps` gains per unit of utility, each as w; the bits of a token's key when it enters).

    w: [...], how much more an error of the key costs than one of the value. A key of few bits may be worse than none,
    its logit is off so far: a token enters, in one piece, at the key bits that gain most a byte, its value at the
    fewest. No token takes a later step before its first.
    """
    each = [(evicted - w * DISTORTION[b] - DISTORTION[LEAST]) / token_bytes((b, LEAST), dims, itemsize) for b in WIDTHS]
    enter, at = torch.stack(each).max(0)
    enter, first = enter.clamp_min(1e-12), torch.tensor(WIDTHS, device=w.device)[at]
    found = [enter]
    for step in steps(dims, itemsize)[1:]:
        gain = torch.minimum((w * step.key + step.value) / step.price, enter)
        if step.bits == WHOLE:
            gain = torch.minimum(gain, torch.minimum(found[-1], found[-2]))
        found.append(torch.where(first >= step.bits, enter, gain) if step.of == 0 else gain)
    return found, first


def allot(log_u: Tensor, log_w: Tensor, least: Tensor, whole: Tensor, room: Tensor, evicted: float, dims: Dims,
          itemsize: int) -> Tensor:  # fmt: skip
    """Bits of key and value, [units, tokens, 2] uint8, of units that each share out room [units] bytes.

    log_u, log_w: [units, tokens], log_u -inf where there is no token; least, whole: [units, tokens] bool, tokens that
    are not evicted, and that stay as they are; they are paid for first.
    """
    path, real = steps(dims, itemsize), log_u > -torch.inf
    gains, first = rates(log_w.exp(), evicted, dims, itemsize)
    found = [log_u + gain.log() for gain in gains]
    found[0] = found[0].masked_fill(least & real, torch.inf)
    # By token, then by step, so that of equal ones each is served whole before the next.
    at = torch.stack([f.masked_fill(whole, torch.inf) for f in found], -1)
    price = eighths([s.price for s in path], at.device).repeat(at.shape[1])
    ranked, order = at.flatten(1).sort(dim=-1, descending=True, stable=True)
    fits = price[order].cumsum(-1) <= EIGHTHS * room[:, None]
    taken = torch.zeros_like(fits).scatter(1, order, fits | (ranked == torch.inf)).view_as(at) & real[..., None]
    bits = torch.zeros(*log_u.shape, 2, dtype=torch.uint8, device=at.device)
    for step, mine in zip(path, taken.unbind(-1)):
        part = slice(None) if step.of is None else slice(step.of, step.of + 1)
        bits[..., part] = torch.where(mine[..., None], step.bits, bits[..., part])
    broken = (bits[..., 0] < first) & ~least  # where the bytes ended within a token's first ones
    return bits.masked_fill(broken[..., None], 0)
