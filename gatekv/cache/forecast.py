"""What a cache will hold, told from shapes alone: no weights are read and no token is seen.

The decision's own counts (`gatekv.cache.decision.admit`) put into the storage's own layout. Heads that compete have
page ends that depend on the text: half a page each is assumed.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from gatekv.cache.decision import admit, rooms
from gatekv.cache.judge import FOLD
from gatekv.cache.kvcache import KVCache
from gatekv.cache.layer import KVLayer
from gatekv.cache.plan import Plan
from gatekv.less.maps import LessMaps
from gatekv.modules import GatedAttention, base_model, wrappers
from gatekv.policies.budgets import Decay, Uniform
from gatekv.policies.qaq import PAGE as NARROW_PAGE
from gatekv.policies.qaq import PAIRS, Bits
from gatekv.policies.think import Channels
from gatekv.support import kv_heads

EVEN = (Uniform, Decay)  # rules under which the heads of a layer hold the same number of tokens
PAGE = 5 * 4  # bytes beside a page's slots: owner and ordinal, and the table's page, owner and fill
LONGEST = 1 << 24  # tokens: no prompt that a budget wants is searched for beyond


@dataclass(frozen=True)
class Forecast:
    """What is held of prompts of one length.

    Attributes:
        tokens: per evicting layer, of a head on average, at the prompt's end. bytes, full_bytes: there, as
            `KVCache.memory` counts them. bytes_end, full_bytes_end: after the new tokens.
        at_most: how much goes depends on the text: bytes are what is held if nothing does.
        at_most_end: the same of bytes_end alone: new tokens are judged one by one.
    """

    tokens: list[int]
    bytes: int
    full_bytes: int
    bytes_end: int
    full_bytes_end: int
    at_most: bool
    at_most_end: bool

    @property
    def ratio(self) -> float:
        return self.bytes / self.full_bytes

    @property
    def ratio_end(self) -> float:
        return self.bytes_end / self.full_bytes_end


@torch.no_grad()
def forecast(cache: KVCache, length: int, new_tokens: int = 0, batch: int = 1) -> Forecast:
    """What an empty cache will hold of `batch` prompts of `length` real tokens, and of `new_tokens` behind each.

    cache: of a model on any device, meta too; nothing in it is changed.

    Raises:
        BudgetError: as the end of such a prompt will, in a strict cache.
    """
    plan, config = cache.plan, base_model(cache.model).config.get_text_config(decoder=True)
    dtype, rows, layers = base_model(cache.model).dtype, batch * kv_heads(config), wrappers(cache.model)
    counts = iter(admit(plan, len(layers), length)[0])
    gated = {w.layer_idx: w for w in layers}
    tokens: list[int] = []
    sums = [0, 0, 0, 0]
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, KVLayer):
            head_dim = gated[i].module.head_dim
            token = rows * 2 * head_dim * dtype.itemsize
            tokens.append(next(counts))
            shape = _Shape(plan, gated[i], rows, batch, head_dim, dtype)
            found = shape.bytes(tokens[-1], length), shape.bytes(tokens[-1], length, new_tokens)
            full = length * token, (length + new_tokens) * token
        else:  # a sliding layer's first view still holds the whole prompt's storage
            token = rows * 2 * layers[0].module.head_dim * dtype.itemsize
            window = cast(DynamicSlidingWindowLayer, layer).sliding_window
            later = min(window, length + new_tokens) if new_tokens else length
            found = full = length * token, later * token
        sums = [a + b for a, b in zip(sums, (found[0], full[0], found[1], full[1]))]
    free = plan.policy.budget is None
    held, full_held, end, full_end = sums
    return Forecast(tokens, held, full_held, end, full_end, free, bool(new_tokens) and plan.later_leave)


def shortest(cache: KVCache, length: int) -> int | None:
    """The shortest prompt, longer than `length`, that the cache's budget can be kept for; None where there is none."""

    def fits(n: int) -> bool:
        return rooms(cache.plan, len(cache.evicting()), n)[1] is None

    low, high = length, 2 * length
    while not fits(high):
        low, high = high, 2 * high
        if high > LONGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class _Shape:
    """Sizes of one layer's cache. rows: sequences · KV heads."""

    plan: Plan
    wrapper: GatedAttention
    rows: int
    batch: int
    head_dim: int
    dtype: torch.dtype

    def bytes(self, count: int, length: int, new: int = 0) -> int:
        """Held when `count` tokens a head are left of `length`, and `new` ones have followed."""
        plan, rows = self.plan, self.rows
        buffered = plan.streams or (plan.decays and not plan.keep_later)
        near = min(length, max(plan.grace - 1, 0))
        old = max(count - near, 0)
        waiting = 0 if plan.streams else new % FOLD
        room = waiting and FOLD + 1  # a new buffer of the tail has room for what folds next
        more, narrow = new // FOLD * FOLD, self._thin(old, near)
        if (
            buffered
        ):  # what comes is stored before the lowest leave, and their pages stay; thin ones make no room for it
            more = min(new, narrow + 1) if plan.streams else min(more, FOLD)
        total = self._pages(old - narrow + more, self.head_dim, buffered)
        width = plan.policy.width
        if isinstance(width, Channels):
            kept = self.head_dim - int(self.head_dim * width.prune)
            total += self._pages(narrow, kept, buffered) + rows * kept * 8
        elif isinstance(width, Bits) and narrow:
            each = width.mean_bytes(self.head_dim, self.dtype.itemsize) + (4 if buffered else 0)
            total += round(rows * (narrow + PAIRS * NARROW_PAGE / 2) * each)
        total += rows * (near + room) * 2 * self.head_dim * self.dtype.itemsize
        total += (near + waiting) * (rows * (5 if buffered else 1) + self.batch) + 9 * self.batch
        total += (8 * (rows + self.batch) if buffered else 0) + self._gate(near + waiting)
        return total

    def _pages(self, tokens: int, key_dim: int, scores: bool) -> int:
        policy, size = self.plan.policy, self.plan.block_size
        even = isinstance(policy.rule, EVEN) or policy.budget == 1
        number = math.ceil(tokens / size) if even else tokens / size + 0.5 * (1 - 1 / size)
        beside = 4 + 4 * scores + 4 * self.plan.merges  # position, score, how many tokens it stands for
        slots = size * ((key_dim + self.head_dim) * self.dtype.itemsize + beside) + PAGE
        return round(self.rows * (number * slots + 12)) if tokens else self.rows * 8

    def _thin(self, old: int, near: int) -> int:
        """Tokens a head whose keys are narrowed: all but the prompt's last, taken to be kept."""
        width = self.plan.policy.width
        return 0 if width is None else max(old - max(width.window - near, 0), 0)

    def _gate(self, tail: int) -> int:
        """The gate's own memory, what it measures later tokens by, and a low-rank state."""
        plan, total = self.plan, 0
        gate, maps = cast(Any, self.wrapper.gate()), cast(LessMaps, self.wrapper.less())
        if plan.learned and gate.reads == "hidden":
            weight = gate.norm.weight
            _, state = gate(weight.new_empty(self.batch, 1, len(weight)))
            total += sum(t.numel() * t.element_size() for t in state or ())
            total += 4 * self.rows if plan.later_leave and plan.policy.rule.scope != "token" else 0
        if plan.remembers:
            acc = torch.promote_types(self.dtype, torch.float32).itemsize
            total += self.rows * maps.spec.state_numbers(self.head_dim) * acc
            total += self.rows * tail * maps.spec.less_rank * acc if plan.later_leave else 0
        return total
