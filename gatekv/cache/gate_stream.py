"""One layer's gate while a cache is in use: what it has read, what it has yet to read, how far back it can go."""

from typing import Any, cast

import torch
from torch import nn

from gatekv.cache.segments.segment import Shape
from gatekv.cache.segments.window import RecentWindow
from gatekv.ops.order import along, order_of
from gatekv.parts import Part
from gatekv.support import LATER

FOLD = 16  # tokens that leave the window, and that a gate reads, together
ROLLBACK = 256  # while recording, how many of the last tokens can be taken back

State = tuple[torch.Tensor, ...] | None


class Reading(Part):
    """One call of the gate: its memory before, and what it read (shapes as in `GateStream.read`)."""

    def __init__(self, before: State, hidden: torch.Tensor, valid: torch.Tensor) -> None:
        self.before, self.hidden, self.valid = before, hidden, valid


class GateStream(Part):
    """Feeds a gate the tokens of one sequence batch, in order, each once.

    Attributes:
        state: the gate's memory, or None. pending: [batch, < FOLD, width], what it has not read yet of the window's
        last tokens. recording: readings are kept, so that the last ROLLBACK tokens can be taken back.
    """

    saved = ("pending", "state")
    borrowed = ("gate",)

    def __init__(self) -> None:
        self.gate: nn.Module = LATER
        self.state: State = None
        self.pending: torch.Tensor | None = None
        self.recording = False
        self.history: list[Reading] = []

    def postpone(self, hidden: torch.Tensor, delay: int) -> bool:
        """Whether new tokens [batch, n, width] can wait unread: a flag acts when its token leaves the window."""
        if self.pending is not None:
            hidden = torch.cat([self.pending, hidden], 1)
        if waits := hidden.shape[1] < FOLD <= delay:
            self.pending = hidden
        return waits

    def read(
        self, hidden: torch.Tensor, valid: torch.Tensor, window: RecentWindow, ragged: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Logits of the tokens that waited, which end `window`, and of the new ones.

        hidden: [batch, n, width], what the gate reads; valid: [batch, n] bool. ragged: there may be pads in front of
        new tokens and behind older ones. Returns logits [batch, kv_heads, old + n], valid [batch, old + n], old.
        """
        old = 0 if self.pending is None else self.pending.shape[1]
        order = None
        if old:
            hidden = torch.cat([cast(torch.Tensor, self.pending), hidden], 1)
            valid = torch.cat([window.valid[:, -old:], valid], 1)
            order = order_of(valid) if ragged else None
        before, self.pending = self.state, None
        told = hidden, valid
        if order is not None:  # a gate's distances are those of tokens
            told = along(hidden, order, 1), along(valid, order, 1)
        logits, self.state = self.gate(*told, before)
        if order is not None:
            logits = torch.empty_like(logits).scatter_(2, order[:, None].expand_as(logits), logits)
        if self.recording and self.state is not None:
            self.history.append(Reading(before, *told))
            while sum(r.hidden.shape[1] for r in self.history[1:]) >= ROLLBACK:
                self.history.pop(0)
        return logits, valid, old

    def rewindable(self) -> int | None:
        """How many of the last tokens can be unread; None = any number, the gate has no memory."""
        if self.state is None:
            return None
        return (0 if self.pending is None else self.pending.shape[1]) + sum(r.hidden.shape[1] for r in self.history)

    def rewind(self, remove: int) -> None:
        """Unread the last tokens: back to the reading among which the cut falls, whose first ones are read again."""
        if self.pending is not None:
            unread = self.pending.shape[1]
            self.pending = self.pending[:, : unread - remove] if unread > remove else None
            remove = max(remove - unread, 0)
        while remove and self.history:
            reading = self.history.pop()
            stays = max(reading.hidden.shape[1] - remove, 0)
            remove -= reading.hidden.shape[1] - stays
            self.state = reading.before
            if stays:
                _, self.state = self.gate(reading.hidden[:, :stays], reading.valid[:, :stays], reading.before)

    @staticmethod
    def forecast_bytes(shape: Shape, gate: Any) -> int:
        """Bytes of one layer's memory of a gate."""
        if gate.reads != "hidden":
            return 0
        weight = gate.norm.weight
        _, state = gate(weight.new_empty(shape.batch, 1, len(weight)))
        return sum(t.numel() * t.element_size() for t in state or ())
