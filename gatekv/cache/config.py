"""What all layers of a cache share: the policy, when it acts, and how tokens are stored."""

from dataclasses import dataclass
from functools import cached_property

import torch

from gatekv.gates.calibration import Thresholds
from gatekv.policies import Policy
from gatekv.policies.parts import Needs
from gatekv.support import LATER


@dataclass(frozen=True)
class CacheConfig:
    """Settings of one cache.

    Attributes:
        policy: scorer, rule and budget. layers: that evict. sinks, window: protected tokens.
        dense_prefill: the prompt attends to all of itself, flags act after it.
        prompt_tokens: where the prompt ends, or None = with the first forward.
        threshold: tau as a logit, for a gate without a budget.
        strict: a prompt whose budget is below what the policy protects is refused, else held whole.
        keep_later: tokens after the prompt all stay. turns: they stay until `KVCache.compress` ends the turn.
        block_size: tokens in a page. backend: of paged attention, or None = the best that can run.
        dtype: of what is held; None: the model's.
        full_prompt_gate: the gate reads the whole prompt at once.
        thresholds: (ratio, real tokens seen [batch, n], prompt_tokens) -> logit thresholds [batch, n], calibrated.
        kinds: [batch, prompt] integers for scorers that go by what a token is, or None.
        defer: keep what scorers need, decide when asked to.
        token: (numbers of a head's key and value, on average; bytes of a number), of what is held.
        rotates_until: positions behind which the model's keys are rotated otherwise (longrope), or None.
    """

    policy: Policy
    layers: int
    sinks: int
    window: int
    dense_prefill: bool
    prompt_tokens: int | None
    threshold: float
    strict: bool = False
    keep_later: bool = False
    turns: bool = False
    block_size: int = 16
    dtype: torch.dtype | None = None
    backend: str | None = None
    full_prompt_gate: bool = False
    thresholds: Thresholds = LATER
    kinds: torch.Tensor | None = None
    defer: bool = False
    token: tuple[int, int] = LATER
    rotates_until: int | None = None

    @cached_property
    def needs(self) -> Needs:
        """Of the policy."""
        return self.policy.needs

    @cached_property
    def waits(self) -> bool:
        """Something is decided at the end of the prompt, so the cache must know where that is."""
        policy = self.policy
        counted = isinstance(policy.budget, int)  # tokens: what share they are depends on the prompt
        ranks = self.dense_prefill or self.needs.scope != "token" or counted
        return policy.width is not None or (ranks and policy.budget != 1)

    @property
    def knows_end(self) -> bool:
        """Where the prompt ends is known before its last token is judged."""
        return self.waits or self.prompt_tokens is not None

    @cached_property
    def queries(self) -> int:
        """How many of the last queries are needed where a prompt or turn ends."""
        ranked = self.needs.queries if self.dense_prefill or self.turns else 0
        return max(ranked, self.policy.width.window if self.policy.width else 0)

    @property
    def turns_queries(self) -> bool:
        """Sinks will be asked as if positions counted places in the cache, by the prompt's own RoPE."""
        return self.needs.rotary and not (self.keep_later or self.turns)

    @cached_property
    def eviction_delay(self) -> int:
        """Tokens behind the query that ignore their flag: only flags of later tokens can make this matter."""
        delay = self.window if self.needs.gate else 0
        width = self.policy.width
        return min(delay, width.window) if width is not None and width.allots else delay
