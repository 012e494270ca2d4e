"""What a cache will hold, told from shapes alone: no weights are read and no token is seen.

The decision's own counts (`gatekv.cache.decision.admit`) put into the storage's own layout. Heads that compete have
page ends that depend on the text: half a page each is assumed.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from gatekv.cache.config import CacheConfig
from gatekv.cache.decision import admit, rooms
from gatekv.cache.eviction import Evictor
from gatekv.cache.gate_stream import FOLD
from gatekv.cache.kvcache import KVCache
from gatekv.cache.layer import KVLayer
from gatekv.cache.ranking import evictor_of
from gatekv.cache.segments.foreign import Foreign
from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.segment import Shape
from gatekv.cache.segments.window import RecentWindow
from gatekv.cache.states import state_bytes
from gatekv.geometry import attention_modules, geometry_of
from gatekv.modules import GatedAttention, base_model, wrappers

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
    settings = cache.config
    policy, layers = settings.policy, wrappers(cache.model)
    dtype = settings.dtype or base_model(cache.model).dtype
    counts = iter(admit(settings, length)[0])
    gated = {w.layer_idx: w for w in layers}
    every = {m.layer_idx: geometry_of(m) for _, m in attention_modules(base_model(cache.model))}
    evictor = evictor_of(settings).successor()
    beside = 4 + 4 * evictor.page_scores + 4 * policy.remainder_segment().counts  # position, score, count
    even = policy.rule.even or policy.budget == 1
    tokens: list[int] = []
    sums = [0, 0, 0, 0]
    for held in state_bytes(base_model(cache.model)).values():
        sums = [total + batch * held for total in sums]
    for i, layer in enumerate(cache.layers):
        sizes = every.get(i, layers[0].geometry)
        key_dim, value_dim = sizes.stored
        apart = None if value_dim == key_dim else value_dim
        shape = Shape(batch, sizes.kv_heads, key_dim, dtype, settings.block_size, even, beside, apart)
        token = Foreign.forecast_bytes(shape, 1)
        if isinstance(layer, KVLayer):
            tokens.append(next(counts))
            told = _Layer(settings, gated[i], evictor, shape, bool(layer.readers))
            found = told.bytes(tokens[-1], length), told.bytes(tokens[-1], length, new_tokens)
            full = length * token, (length + new_tokens) * token
        elif not isinstance(layer, DynamicSlidingWindowLayer):  # a state, counted above; images, not known
            continue
        else:  # a sliding layer's first view still holds the whole prompt's storage
            window = layer.sliding_window
            later = min(window, length + new_tokens) if new_tokens else length
            found = full = length * token, later * token
        sums = [a + b for a, b in zip(sums, (found[0], full[0], found[1], full[1]))]
    free = policy.budget is None
    held, full_held, end, full_end = sums
    return Forecast(tokens, held, full_held, end, full_end, free, bool(new_tokens) and evictor.evicts)


def shortest(cache: KVCache, length: int) -> int | None:
    """The shortest prompt, longer than `length`, that the cache's budget can be kept for; None where there is none."""

    def fits(n: int) -> bool:
        return rooms(cache.config, n)[1] is None

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
class _Layer:
    """One layer's cache, as far as shapes tell. evictor: who will be in charge behind the prompt. shared: later layers
    read its keys and values."""

    config: CacheConfig
    wrapper: GatedAttention
    evictor: Evictor
    shape: Shape
    shared: bool = False

    def bytes(self, count: int, length: int, new: int = 0) -> int:
        """Held when `count` tokens a head are left of `length`, and `new` ones have followed."""
        config, evictor, shape, width = self.config, self.evictor, self.shape, self.config.policy.width
        near = min(length, max(config.eviction_delay - 1, 0))
        old = max(count - near, 0)
        beside = 0 if width is None or width.allots else max(width.window - near, 0)
        narrow = 0 if width is None else max(old - beside, 0)
        waiting, stored = evictor.split(new, narrow)
        total = Pages.forecast_bytes(shape, old - narrow + stored)
        total += 0 if width is None else width.forecast_bytes(shape, narrow)
        room = 0 if self.shared else -waiting % (FOLD + 1)  # a new buffer of the window has room for FOLD tokens more
        total += RecentWindow.forecast_bytes(shape, near + waiting, room, evictor.window_scores)
        total += 9 * shape.batch + evictor.forecast_bytes(shape, self.wrapper)
        remainder = config.policy.remainder_segment()
        remainder.use(self.wrapper.less())
        return total + remainder.forecast_bytes(shape, near + waiting if evictor.evicts else 0)
