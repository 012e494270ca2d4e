"""One layer's gate while a cache is in use: what it has read, what it has yet to read, how far back it can go."""

import copy
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn

from gatekv.cache.tail import Tail
from gatekv.support import LATER, shallow

FOLD = 16  # tokens that leave the tail, and that a gate reads, together
ROLLBACK = 256  # while recording, how many of the last tokens can be taken back

State = tuple[torch.Tensor, ...] | None
Part = TypeVar("Part", torch.Tensor, torch.Tensor | None, State)


@dataclass
class Reading:
    """One call of the gate: its memory before, and what it read (shapes as in `Judge.read`)."""

    before: State
    hidden: torch.Tensor
    valid: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [*(self.before or ()), self.hidden, self.valid]

    def select(self, index: torch.Tensor) -> "Reading":
        return Reading(_select(self.before, index), _select(self.hidden, index), _select(self.valid, index))


def _select(part: Part, index: torch.Tensor) -> Part:
    """Rows of a tensor [batch, ...], of a tuple of such, or None."""
    if isinstance(part, tuple):
        return tuple(t.index_select(0, index) for t in part)
    return None if part is None else part.index_select(0, index)


class Judge:
    """Feeds a gate the tokens of one sequence batch, in order, each once.

    Attributes:
        state: the gate's memory, or None. pending: [batch, < FOLD, width], what it has not read yet of the tail's
        last tokens. recording: readings are kept, so that the last ROLLBACK tokens can be taken back.
    """

    def __init__(self) -> None:
        self.gate: nn.Module = LATER
        self.state: State = None
        self.pending: torch.Tensor | None = None
        self.recording = False
        self.history: list[Reading] = []

    __copy__ = shallow

    def __getstate__(self) -> dict:
        """Without the gate, which is the model's; every call brings it."""
        return vars(self) | {"gate": LATER}

    def postpone(self, hidden: torch.Tensor, grace: int) -> bool:
        """Whether new tokens [batch, n, width] can wait unread: a flag acts when its token leaves the window."""
        if self.pending is not None:
            hidden = torch.cat([self.pending, hidden], 1)
        if waits := hidden.shape[1] < FOLD <= grace:
            self.pending = hidden
        return waits

    def read(self, hidden: torch.Tensor, valid: torch.Tensor, tail: Tail) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Logits of the tokens that waited, which end `tail`, and of the new ones.

        hidden: [batch, n, width], what the gate reads; valid: [batch, n] bool.
        Returns logits [batch, kv_heads, old + n], valid [batch, old + n], old.
        """
        old = 0 if self.pending is None else self.pending.shape[1]
        if old:
            hidden = torch.cat([cast(torch.Tensor, self.pending), hidden], 1)
            valid = torch.cat([tail.valid[:, -old:], valid], 1)
        before, self.pending = self.state, None
        logits, self.state = self.gate(hidden, valid, before)
        if self.recording and self.state is not None:
            self.history.append(Reading(before, hidden, valid))
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

    def select(self, index: torch.Tensor) -> None:
        """Keep, reorder or repeat sequences: index [new_batch]."""
        self.state, self.pending = _select(self.state, index), _select(self.pending, index)
        self.history = [reading.select(index) for reading in self.history]

    def twin(self) -> "Judge":
        """An independent copy; tensors are shared, none is ever written in place."""
        twin = copy.copy(self)
        twin.history = list(self.history)
        return twin

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        held = [*(self.state or ()), *(t for reading in self.history for t in reading.tensors())]
        return held if self.pending is None else [*held, self.pending]
