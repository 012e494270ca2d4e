"""Old tokens in fewer bytes: what a width's memory is asked beside a segment's words."""

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.prompt_end import PromptEnd
from gatekv.cache.segments.segment import Paged, Shown

Tensor = torch.Tensor


class Narrow(Paged):
    """A memory of old tokens in fewer channels, bits, or whatever a width thinks of."""

    def shown(self, probe: Tensor) -> list[Shown]:
        reads = zip(self.stores(), self.reads(probe))
        return [(s.unrolled(keys), s.unrolled(values), s.held_places()) for s, (_, keys, values, _) in reads]

    def absorb(self, pages: Pages, end: PromptEnd) -> None:
        """Where a prompt or turn ends, take the old tokens of `pages`; it keeps the others."""
        raise NotImplementedError
