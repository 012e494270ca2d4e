"""What all layers of a cache share: the policy, when it acts, and how tokens are stored."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gatekv.gates.calibration import Thresholds
from gatekv.policies import Gate, Policy
from gatekv.policies.budgets import Decay, Threshold
from gatekv.policies.less import Less
from gatekv.policies.merging import MergeNear, MergeSimilar
from gatekv.support import LATER, shallow

if TYPE_CHECKING:
    from gatekv.cache.decision import Decision


@dataclass
class Plan:
    """Settings of one cache.

    Attributes:
        policy: scorer, rule and budget. sinks, window: protected tokens.
        dense: the prompt attends to all of itself, flags act after it.
        prompt_tokens: where the prompt ends, or None = with the first forward.
        threshold: tau as a logit, for a gate without a budget.
        strict: a prompt whose budget is below what the policy protects is refused, else held whole.
        keep_later: tokens after the prompt all stay. turns: they stay until `KVCache.compress` ends the turn.
        block_size: tokens in a page. backend: of paged attention, or None = the best that can run.
        thresholds: (ratio, real tokens seen [batch, n], prompt_tokens) -> logit thresholds [batch, n], calibrated.
        whole: the gate reads the whole prompt at once.
        kinds: [batch, prompt] integers for scorers that go by what a token is, or None.
        defer: keep what scorers need, decide when asked to.
        rotates_until: positions behind which the model's keys are rotated otherwise (longrope), or None.
        decide: called by a layer whose prompt has ended.
    """

    policy: Policy
    sinks: int
    window: int
    dense: bool
    prompt_tokens: int | None
    threshold: float
    strict: bool = False
    keep_later: bool = False
    turns: bool = False
    block_size: int = 16
    backend: str | None = None
    whole: bool = False
    thresholds: Thresholds = LATER
    kinds: torch.Tensor | None = None
    defer: bool = False
    rotates_until: int | None = None
    decide: "Decision" = LATER

    __copy__ = shallow

    def __getstate__(self) -> dict:
        """Without `decide`, which knows a cache's own layers."""
        return vars(self) | {"decide": LATER}

    @property
    def learned(self) -> bool:
        """A gate goes on judging tokens after the prompt; other scores decided once."""
        return isinstance(self.policy.scorer, Gate)

    @property
    def streaming(self) -> bool:
        return isinstance(self.policy.rule, Threshold)

    @property
    def ranks(self) -> bool:
        """A gate's logits are kept until the end of the prompt, to be ranked there."""
        return self.learned and not self.streaming

    @property
    def decays(self) -> bool:
        """Logits stay for good: tokens fade, and the faintest leave a buffer of fixed size."""
        return isinstance(self.policy.rule, Decay)

    @property
    def streams(self) -> bool:
        """Another score than a gate's goes on evicting while decoding, within the buffer that the prompt left."""
        return not self.learned and self.policy.scorer.streams and not (self.keep_later or self.turns)

    @property
    def remembers(self) -> bool:
        """Evicted tokens go into a low-rank state."""
        return isinstance(self.policy.remainder, Less)

    @property
    def merges(self) -> bool:
        """Evicted tokens go into kept ones."""
        return isinstance(self.policy.remainder, (MergeNear, MergeSimilar))

    @property
    def later_leave(self) -> bool:
        """Tokens that come after the prompt can be evicted from the tail."""
        return self.turns or (self.learned and not self.keep_later)

    @property
    def queries(self) -> int:
        """How many of the prompt's last queries are needed at its end."""
        ranks = not (self.streaming or self.decays) and (self.dense or self.turns)
        return self.policy.queries if ranks or self.policy.width else 0

    @property
    def trims(self) -> bool:
        """Flags act inside the prompt (sparse), and an exact trim follows at its end."""
        return self.learned and not self.dense and not self.streaming

    @property
    def waits(self) -> bool:
        """Something is decided at the end of the prompt, so the cache must know where that is."""
        narrows = self.policy.width is not None
        counted = isinstance(self.policy.budget, int)  # tokens: what share they are depends on the prompt
        return narrows or ((self.dense or not self.streaming or counted) and self.policy.budget != 1)

    @property
    def knows_end(self) -> bool:
        """Where the prompt ends is known before its last token is judged."""
        return self.waits or self.prompt_tokens is not None

    @property
    def grace(self) -> int:
        """Tokens behind the query that ignore their flag: only flags of later tokens can make this matter."""
        return self.window if self.learned else 0
