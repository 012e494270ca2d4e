"""Pads that stand elsewhere than on the left: behind a row, between its turns.

Inside a layer pads always stand on the left, so that the last columns are each row's last tokens and age is counted in
real tokens. A call whose pads come behind real tokens (a "ragged" one) is put in that order before it is taken in, and
its output back.
"""

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch

from gatekv.attention import valid_tokens
from gatekv.ops.order import along, order_of

if TYPE_CHECKING:
    from gatekv.cache.layer import KVLayer

Tensor = torch.Tensor


@dataclass(frozen=True)
class Seen:
    """What a mask says of a call's tokens.

    Attributes:
        valid: [batch, n] bool, False at pads. padded: there is a pad. ragged: a pad stands behind a real token of its
        row. hides: it shows other old tokens than those that were real when they came.
    """

    valid: Tensor
    padded: bool = False
    ragged: bool = False
    hides: bool = False

    @cached_property
    def _flags(self) -> dict[int, Tensor]:
        return {}

    def flags(self, kv_heads: int) -> Tensor:
        """[batch, kv_heads, n]: `valid` for each head."""
        if kv_heads not in self._flags:
            self._flags[kv_heads] = self.valid[:, None].expand(-1, kv_heads, -1)
        return self._flags[kv_heads]


class Masks:
    """Looks at the mask of a forward once for all layers that are given the same one."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._key: tuple | None = None
        self._seen: Seen | None = None
        self._real: Seen | None = None

    def all_real(self, batch: int, n: int, device: torch.device) -> Seen:
        """Of a call without a mask."""
        held = self._real
        if held is None or held.valid.shape != (batch, n) or held.valid.device != device:
            held = Seen(valid_tokens(None, batch, n, device))
            self._real = held if n == 1 else None  # a step's is the next step's
        return held

    def look(self, mask: Tensor, n: int, seen: int, real: Tensor) -> Seen:
        """mask: [batch, 1, n, seen + n] bool; real: [batch, 1], how many of the `seen` slots are real tokens."""
        key = n, seen, len(real), real.device
        if self._mask is None or self._mask() is not mask or self._key != key:
            self._mask, self._key, self._seen = weakref.ref(mask), key, self._look(mask, n, seen, real)
        return cast(Seen, self._seen)

    @staticmethod
    def _look(mask: Tensor, n: int, seen: int, real: Tensor) -> Seen:
        valid = valid_tokens(mask, len(real), n, real.device)
        begun = real + valid.cumsum(-1) > 0
        said = [~valid, ~valid & begun]
        if seen:
            said.append(valid & (mask[:, 0, :, :seen].sum(-1) != real))
        padded, ragged, *hides = torch.stack([what.any() for what in said]).tolist()  # read from the device once
        return Seen(valid, padded, ragged, any(hides))


def look(layer: "KVLayer", mask: Tensor | None, batch: int, n: int) -> Seen:
    """What is said of n new tokens by mask [batch, 1, n, seen + n] bool, or None.

    Raises:
        ValueError: the mask contradicts earlier ones.
    """
    if mask is None:
        # Some rows may have been selected, and they have no pads.
        if layer.padded and bool((layer.real < layer.seen).any()):
            raise ValueError(
                "this cache holds padded rows, and the call has no attention_mask: pass the mask of all tokens so far, "
                "pads as 0, as in the calls before."
            )
        layer.padded, layer.history = False, None
        return layer.siblings.masks.all_real(batch, n, layer.real.device)
    seen = layer.siblings.masks.look(mask, n, layer.seen, layer.real)
    if seen.hides:
        raise ValueError(
            "the attention_mask says otherwise than before which of the cached tokens are pads, or hides some of them, "
            "which an evicting cache cannot follow: pass the same mask as before, with the new tokens behind it."
        )
    if n > 1 and (seen.ragged or layer.history is not None):
        _check_causal(mask[:, 0, :, layer.seen :], seen.valid)
    return seen


def _check_causal(mask: Tensor, valid: Tensor) -> None:
    """ValueError where real tokens do not see all real ones before them; mask: [batch, n, n], valid: [batch, n]."""
    n = valid.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril() & valid[:, None]
    if bool(((mask != causal) & valid[:, :, None]).any()):
        raise ValueError(
            "pads behind real tokens go with causal masks only, and this call's tokens see each other otherwise: pad "
            "on the left."
        )


def remember(layer: "KVLayer", seen: Seen) -> None:
    """The tokens are taken in: later masks must say the same of them."""
    layer.padded |= seen.padded
    if layer.history is None and seen.ragged:
        layer.history = torch.arange(layer.seen, device=layer.real.device) >= layer.seen - layer.real
    if layer.history is not None:
        layer.history = torch.cat([layer.history, seen.valid], 1)


def pads_first(layer: "KVLayer", x: Tensor) -> Tensor:
    """x [batch, seen], of each slot as it was fed, with pads on the left."""
    return x if layer.history is None else along(x, order_of(layer.history), 1)


def columns(layer: "KVLayer", mask: Tensor, n: int) -> Tensor:
    """[batch, 1, n, window] bool: what the last n columns see of the window's, by a mask [batch, 1, n, seen]."""
    if layer.history is None:
        return mask[..., layer.folded :]
    places = torch.arange(len(layer.window), device=mask.device)  # columns are not slots any more; see `_check_causal`
    return (places[-n:, None] >= places) & layer.window.valid[:, None, None]


def as_fed(layer: "KVLayer", bits: Tensor) -> Tensor:
    """[batch, kv_heads, seen, 2] by slot, from the same with pads on the left; 0 at pads."""
    if layer.history is None:
        return bits
    place = layer.seen - layer.real + layer.history.cumsum(-1) - 1
    return along(bits, place.clamp_min(0), 2) * layer.history[:, None, :, None]
