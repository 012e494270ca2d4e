"""The dense end of a layer's cache: the recent window and what has not been folded into pages yet."""

from typing import NamedTuple, Self, cast

import torch

from gatekv.cache.segments.segment import Segment, Shape, value_dims
from gatekv.ops import segments
from gatekv.ops.order import along, order_of
from gatekv.ops.rectangle import Rectangle
from gatekv.parts import frozen

Tensor = torch.Tensor


class New(NamedTuple):
    """Tokens that come into the window; shapes and meaning as its attributes have them."""

    keys: Tensor
    values: Tensor
    flags: Tensor
    valid: Tensor
    scores: Tensor | None = None
    psi: Tensor | None = None

    def cut(self, start: int, end: int) -> "New":
        """Those from start to end alone."""
        if (start, end) == (0, self.valid.shape[1]):
            return self
        part = slice(start, end)
        scores = None if self.scores is None else self.scores[..., part]
        psi = None if self.psi is None else self.psi[:, :, part]
        return New(
            self.keys[:, :, part], self.values[:, :, part], self.flags[..., part], self.valid[:, part], scores, psi
        )


class RecentWindow(Segment):
    """Recent tokens, rectangular, in a buffer that is written in place and slides when it is full.

    Appending costs the new tokens alone; every `slack` tokens the live part, no longer than the window, moves once.

    Attributes:
        keys, values: [batch, kv_heads, n, head_dim]. flags: [batch, kv_heads, n] bool, what each token's fate is once
        it leaves the window. valid: [batch, n] bool, False at pads. scores: [batch, kv_heads, n] float32 or None.
        psi: [batch, kv_heads, n, rank], what a low-rank state takes of each token, or None.
    """

    saved = ("flags", "valid", "scores", "psi")

    def __init__(self, like: Tensor, with_scores: bool, value_dim: int | None = None, latent: int = 0) -> None:
        """An empty one; `like` [batch, kv_heads, tokens, head_dim] gives shapes, dtype and device; value_dim: of the
        values, where they are not as wide as keys; latent: numbers of a key that are its value too, 0: none."""
        b, kv, _, d = like.shape
        self.latent = latent
        self._buffers = [like.new_empty(b, kv, 0, width) for width in value_dims(d, value_dim, latent)]
        self.flags = torch.ones(b, kv, 0, dtype=torch.bool, device=like.device)
        self.valid = self.flags[:, 0]
        self.scores = self.flags.float() if with_scores else None
        self.psi: Tensor | None = None
        self.shared = False

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._buffers[0].dtype

    @property
    def kv_heads(self) -> int:
        """Of keys and values."""
        return self._buffers[0].shape[1]

    def __len__(self) -> int:
        return self.valid.shape[1]

    @property
    def keys(self) -> Tensor:
        return self._buffers[0][:, :, : len(self)]

    @property
    def values(self) -> Tensor:
        return self.keys[..., : self.latent] if self.latent else self._buffers[1][:, :, : len(self)]

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are held: of latents, values of no numbers."""
        return self.keys, self._buffers[1][:, :, : len(self)]

    def attend(self, q: Tensor, scale: float, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return segments.dense_segment(q, self.keys, self.values, visible, scale)

    def rectangle(self, visible: Tensor | None = None) -> Rectangle:
        """For `gatekv.ops.joint`; visible as for `attend`."""
        k, v = self.keys, self.values
        hidden = None
        if visible is not None:
            hidden = ~visible.expand(*k.shape[:2], -1, -1).flatten(0, 1)
        return Rectangle(k.flatten(0, 1), v.flatten(0, 1), hidden)

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        flags: Tensor,
        valid: Tensor,
        scores: Tensor | None = None,
        psi: Tensor | None = None,
        slack: int = 0,
    ) -> None:
        """Add n tokens (shapes as the attributes'); a new buffer, when one is due, leaves room for `slack` more."""
        old, new = len(self), keys.shape[2]
        if old == 0 and slack == 0:
            self._buffers = [keys, values]
        else:
            if self.shared or frozen(self._buffers[0]) or old + new > self._buffers[0].shape[2]:
                self._buffers = [self._moved(b, 0, old, new + slack) for b in self._buffers]
            for buffer, piece in zip(self._buffers, (keys, values)):
                buffer[:, :, old : old + new] = piece
        self.flags, self.valid = torch.cat([self.flags, flags], -1), torch.cat([self.valid, valid], -1)
        self.scores = None if self.scores is None else torch.cat([self.scores, cast(Tensor, scores).float()], -1)
        self.psi = psi if self.psi is None else torch.cat([self.psi, cast(Tensor, psi)], 2)
        self.shared = False

    def first(self) -> New:
        """The oldest token."""
        return New(*self.stored, self.flags, self.valid, self.scores, self.psi).cut(0, 1)

    def rewrite(self, flags: Tensor, scores: Tensor) -> None:
        """Give the last tokens the flags and scores [batch, kv_heads, n] that they waited for."""
        start = len(self) - flags.shape[-1]
        self.flags = torch.cat([self.flags[..., :start], flags], -1)
        if self.scores is not None:
            self.scores = torch.cat([self.scores[..., :start], scores.float()], -1)

    def drop(self, front: int = 0, back: int = 0) -> None:
        """Forget the first `front` and the last `back` tokens, and give their memory back."""
        end = len(self) - back
        if front:
            self._buffers = [self._moved(b, front, end, 0) for b in self._buffers]
            self.shared = False
        self.flags, self.valid = self.flags[..., front:end].clone(), self.valid[:, front:end].clone()
        self.scores = None if self.scores is None else self.scores[..., front:end].clone()
        self.psi = None if self.psi is None else self.psi[:, :, front:end].clone()

    def pads_first(self) -> None:
        """Move pads to the left; all else keeps its order."""
        order = order_of(self.valid)
        self._buffers = [along(t, order, 2) for t in self.stored]
        self.flags, self.valid = along(self.flags, order, 2), along(self.valid, order, 1)
        self.scores, self.psi = (None if t is None else along(t, order, 2) for t in (self.scores, self.psi))
        self.shared = False

    @staticmethod
    def _moved(buffer: Tensor, start: int, end: int, room: int) -> Tensor:
        b, kv, _, d = buffer.shape
        out = buffer.new_empty(b, kv, end - start + room, d)
        out[:, :, : end - start] = buffer[:, :, start:end]
        return out

    def index_select(self, index: Tensor) -> None:
        super().index_select(index)
        self.shared = False

    def fork(self) -> Self:
        """A second owner of the same buffers; whichever grows first takes a copy of its own."""
        self.shared = True
        return super().fork()

    def state_dict(self) -> dict[str, Tensor]:
        keys, values = self.stored
        return {"keys": keys, "values": values} | super().state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        super().load_state_dict(tensors)
        n = len(self)
        for name in ("keys", "values"):
            if tensors[name].shape[2] != n:
                raise ValueError(f"window.{name} holds {tensors[name].shape[2]} tokens, not {n}.")
        self._buffers = [tensors["keys"], tensors["values"]]

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float, room: int = 0, scores: bool = False) -> int:
        """room: for tokens that come next."""
        beside = tokens * (shape.rows * (5 if scores else 1) + shape.batch)
        return round((tokens + room) * shape.rows * shape.token_bytes + beside)
