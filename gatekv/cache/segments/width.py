"""Old tokens in fewer bytes: what a width's memory is asked beside a segment's words."""

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.prompt_end import PromptEnd
from gatekv.cache.segments.segment import Paged


class Narrow(Paged):
    """A memory of old tokens in fewer channels, bits, or whatever a width thinks of."""

    def absorb(self, pages: Pages, end: PromptEnd) -> None:
        """Where a prompt or turn ends, take the old tokens of `pages`; it keeps the others."""
        raise NotImplementedError
