"""One layer's cache: a dense tail of recent tokens, a ragged store of kept ones, and the moment flags act.

Recurrent form of the law (gatekv.attention): tokens enter the tail; when they leave the window they are folded, i.e.
moved to the ragged store if flagged, dropped if not. Folding waits for FOLD tokens; meanwhile the mask hides the dead.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import CacheLayerMixin

from gatekv.attention import AttentionCall, live_mask, sink_tokens, valid_tokens
from gatekv.cache.ragged import RaggedStore
from gatekv.ops import naive
from gatekv.ops.segments import ragged_segment
from gatekv.policies import Gate, Policy, View
from gatekv.policies.budgets import Threshold

FOLD = 16


@dataclass
class Plan:
    """What all layers of a cache share.

    Attributes:
        policy: scorer, rule and ratio. sinks, window: protected tokens.
        dense: the prompt attends to all of itself, flags act after it.
        prompt_tokens: where the prompt ends, or None = with the first forward.
        threshold: tau as a logit, for a gate without a ratio.
        keep_later: tokens after the prompt all stay.
        thresholds: (ratio, real tokens seen [batch, n], prompt_tokens) -> logit thresholds [batch, n], calibrated.
        defer: keep what scorers need, decide when asked to.
        decide: called by a layer whose prompt has ended.
    """

    policy: Policy
    sinks: int
    window: int
    dense: bool
    prompt_tokens: int | None
    threshold: float
    keep_later: bool = False
    thresholds: object = None
    defer: bool = False
    decide: object = None

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
    def trims(self) -> bool:
        """Flags act inside the prompt (sparse), and an exact trim follows at its end."""
        return self.learned and not self.dense and not self.streaming

    @property
    def grace(self) -> int:
        """Tokens behind the query that ignore their flag: only flags of later tokens can make this matter."""
        return self.window if self.learned else 0


class KVLayer(CacheLayerMixin):
    """Cache layer of one full-attention layer; `attend` is called by the attention function."""

    is_sliding = False
    is_croppable = False

    def __init__(self, plan: Plan, layer_idx: int):
        super().__init__()
        self.plan, self.layer_idx = plan, layer_idx
        self.clear()

    def clear(self) -> None:
        """Forget everything; the cache is as new."""
        self.keys = self.values = None  # the tail: [batch, kv_heads, n, head_dim]
        self.flags = self.scores = None  # of the tail: [batch, kv_heads, n]
        self.valid = None  # of the tail: [batch, n]
        self.store = None
        self.seen, self.real, self.folded = 0, None, 0  # slots; real tokens [batch, 1]; slots that left the tail
        self.in_prompt, self.first_call = True, None
        self.cut = None  # [batch, 1 or kv_heads, 1]: the logit that a later token must exceed, after an exact decision
        self.gate_state = None
        self.queries = self.hidden = self.scaling = self.gate = None  # only while a decision is ahead
        self.is_initialized = False

    # -- what transformers asks of a cache layer

    def lazy_initialization(self, key_states, value_states) -> None:
        self.keys, self.values = key_states, value_states
        b, kv, n, _ = key_states.shape
        self.flags = torch.ones(b, kv, n, dtype=torch.bool, device=key_states.device)
        self.valid = self.flags[:, 0].clone()
        self.scores = self.flags.float() if self.plan.ranks else None
        self.store = RaggedStore.empty(key_states, self.plan.trims)
        self.real = torch.zeros(b, 1, dtype=torch.long, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Hands the new tokens through; `attend` stores them, because only there flags and mask are known."""
        if not self.is_initialized:
            self.lazy_initialization(key_states[:, :, :0], value_states[:, :, :0])
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, never tokens stored: positions follow from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a compressed cache cannot be rolled back yet: generate without an assistant or lookup.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Re-order, repeat or reduce the batch."""
        if not self.is_initialized:
            return
        index = beam_idx.to(self.keys.device)
        self.store = self.store.select(index, self.keys.shape[1])
        for name in ("keys", "values", "flags", "valid", "scores", "real", "cut", "queries", "hidden"):
            tensor = vars(self)[name]
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index))
        if self.gate_state is not None:
            self.gate_state = tuple(t.index_select(0, index) for t in self.gate_state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self.real)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self.real), device=indices.device)[indices])

    # -- the recurrent form

    def attend(self, call: AttentionCall, q, k, v, mask, scaling: float) -> torch.Tensor:
        """Take in new tokens, answer their queries, evict.

        q: [B, H, Q, D]; k, v: [B, K, Q, D]; mask: [B, 1, Q, seen + Q] bool or None. Returns [B, H, Q, D].
        """
        b, _, n, _ = q.shape
        self._check_chunks(n)
        valid = valid_tokens(mask, b, n, q.device)
        self._take_in(call, k, v, valid)
        out = self._answer(q, mask, scaling)
        self.seen += n
        self.real = self.real + valid.sum(-1, keepdim=True)
        if self.in_prompt:
            self._observe(call, q, scaling)
            if self.plan.prompt_tokens is None or self.seen >= self.plan.prompt_tokens:
                self.end_prompt()
            elif not self.plan.dense:
                self.fold()
        else:
            self.fold(at_least=FOLD)
        return out

    def _check_chunks(self, n: int) -> None:
        waits = (self.plan.dense or not self.plan.streaming) and self.plan.policy.ratio != 1
        if self.first_call is None:
            self.first_call = n
        elif n > 1 and n == self.first_call == self.seen and waits and self.plan.prompt_tokens is None:
            raise ValueError(
                f"two calls of {n} tokens look like a prompt prefilled in chunks, and this policy decides at the "
                "prompt's end, which a cache cannot see: pass KVCache(…, prompt_tokens=N), or use a threshold gate."
            )

    def _take_in(self, call, k, v, valid) -> None:
        """Append new tokens to the tail, with the flag each will have once it leaves the window."""
        flags = valid[:, None].expand(k.shape[:3])
        if self.plan.learned:
            if call.gate is None:
                raise ValueError("the adapter was disabled or unloaded while this cache was in use; enable it again.")
            logits, self.gate_state = call.gate(call.hidden, k, valid, self.gate_state)
            flags = (logits > self._thresholds(valid)) & flags
            if self.scores is not None:
                self.scores = torch.cat([self.scores, logits.float()], -1)
        flags = flags | sink_tokens(valid, self.plan.sinks, self.real)[:, None]
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.flags, self.valid = torch.cat([self.flags, flags], -1), torch.cat([self.valid, valid], -1)

    def _thresholds(self, valid) -> torch.Tensor:
        """Logit thresholds of the new tokens, broadcastable to [batch, kv_heads, n]."""
        if self.plan.keep_later and not self.in_prompt:
            return torch.tensor(-torch.inf, device=valid.device)
        if self.cut is not None:
            return self.cut
        plan = self.plan
        if plan.policy.ratio is None:
            return torch.tensor(plan.threshold, device=valid.device)
        if plan.streaming or plan.trims:
            # A token is judged when it leaves the window: by then its row has seen `window` more tokens. This depends
            # on the token alone, never on how the prompt was cut into calls.
            seen = self.real + valid.long().cumsum(-1) + plan.window
            ratio = plan.policy.ratio if plan.streaming else min(1.0, 1.5 * plan.policy.ratio)
            return plan.thresholds(ratio, seen, plan.prompt_tokens)[:, None]
        return torch.tensor(-torch.inf, device=valid.device)  # a dense prompt decides at its end

    def _answer(self, q, mask, scaling) -> torch.Tensor:
        n, tail = q.shape[2], self.keys.shape[2]
        slots = torch.arange(self.folded, self.folded + tail, device=q.device)
        queries = slots[tail - n :]
        visible = (queries[:, None] >= slots)[None, None] if mask is None else mask[..., self.folded :]
        if not (self.in_prompt and self.plan.dense):
            visible = visible & live_mask(queries, slots, self.flags, self.plan.grace)
        if len(self.store):
            far = ragged_segment(q, self.store.keys, self.store.values, self.store.offsets, scaling)
            near = naive.dense_segment(q, self.keys, self.values, visible, scaling)
            return naive.merge([far, near])[0].to(q.dtype)
        groups = q.shape[1] // self.keys.shape[1]
        causal = mask is None and visible.shape[:2] == (1, 1) and n == tail
        k, v = (t.repeat_interleave(groups, 1) for t in (self.keys, self.values))
        visible = visible.repeat_interleave(groups, 1) if visible.shape[1] > 1 else visible
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=None if causal else visible, is_causal=causal, scale=scaling)

    # -- decisions

    def _observe(self, call: AttentionCall, q, scaling) -> None:
        """Keep what scorers will look at until the prompt ends."""
        self.scaling, self.gate = scaling, call.gate
        wanted = self.plan.policy.scorer.queries
        if wanted:
            self.queries = torch.cat([*([] if self.queries is None else [self.queries]), q], 2)[:, :, -wanted:]
        if self.plan.defer:
            self.hidden = torch.cat([*([] if self.hidden is None else [self.hidden]), call.hidden], 1)

    def adopt(self, other: "KVLayer", gate) -> None:
        """Take over an undecided layer's whole prompt, sharing its tensors; gate judges it from here on."""
        taken = ("keys", "values", "flags", "valid", "seen", "real", "folded", "queries", "hidden", "scaling")
        vars(self).update({name: vars(other)[name] for name in taken})
        self.gate, self.is_initialized = gate, True
        self.store = RaggedStore.empty(self.keys, False)

    def end_prompt(self) -> None:
        """The prompt is whole: let the plan's rule decide what stays."""
        if self.plan.defer:
            return
        self.in_prompt = False
        self.plan.decide(self)

    def view(self) -> View:
        """What a scorer sees of a prompt that is still whole."""
        return View(self.keys, self.values, self.queries, self.valid, self.scaling, self.layer_idx, self._gate_logits)

    def _gate_logits(self) -> torch.Tensor:
        if self.scores is None:
            logits, self.gate_state = self.gate(self.hidden, self.keys, self.valid, None)
            self.scores = logits.float()
        return self.scores

    def protection(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(protected [batch, 1, seen], valid [batch, seen]): sinks and window of each row; pads stand on the left."""
        slots = torch.arange(self.seen, device=self.real.device)
        valid = slots >= self.seen - self.real
        protected = sink_tokens(valid, self.plan.sinks) | (valid & (slots >= self.seen - self.plan.window))
        return protected[:, None], valid

    def all_scores(self) -> torch.Tensor:
        """[batch, kv_heads, seen]; tokens that the prompt's own flags evicted score -inf, in memory or not."""
        if not self.plan.trims:
            return self.plan.policy.scorer.score(self.view())
        b, kv, _ = self.scores.shape
        scores = self.scores.new_full((b, kv, self.seen), -torch.inf)
        self.store.scatter(scores, self.store.scores)
        scores[..., self.folded :] = self.scores.masked_fill(~self.flags, -torch.inf)
        return scores

    def restrict(self, keep: torch.Tensor, cut: torch.Tensor | None) -> None:
        """Hold exactly keep [batch, kv_heads, seen]; later tokens must exceed cut [batch, 1 or kv_heads, 1], if any."""
        flags = keep[..., self.folded :]
        if cut is not None:
            # Tokens still in the window were kept for that alone; their own logits decide when they leave it.
            young = torch.arange(flags.shape[-1], device=flags.device) > flags.shape[-1] - max(self.plan.window, 1)
            sinks = sink_tokens(self.valid, self.plan.sinks, self.real - self.valid.sum(-1, keepdim=True))[:, None]
            flags = torch.where(young, ((self.scores > cut) & self.valid[:, None]) | sinks, flags)
        self.cut, self.flags = cut, flags
        self.scores = self.queries = self.hidden = None
        self.store = self.store.filter(keep)
        self.fold()

    def fold(self, at_least: int = 1) -> None:
        """Move flagged tokens that have left the window from the tail to the store; forget the others."""
        leave = self.keys.shape[2] - max(self.plan.grace - 1, 0)
        if leave < at_least or leave <= 0:
            return
        parts = (self.keys, self.values, self.flags)
        scores = None if self.store.scores is None else self.scores[..., :leave]
        self.store = self.store.append(*(t[:, :, :leave] for t in parts), self.folded, scores)
        self.keys, self.values, self.flags = (t[:, :, leave:].clone() for t in parts)
        self.valid = self.valid[:, leave:].clone()
        self.scores = None if self.scores is None else self.scores[..., leave:].clone()
        self.folded += leave

    # -- accounting

    def held(self) -> torch.Tensor:
        """[batch, kv_heads, seen] bool: what the next query can still see."""
        b, kv, tail = self.flags.shape
        held = torch.zeros(b, kv, self.seen, dtype=torch.bool, device=self.flags.device)
        self.store.scatter(held, True)
        slots = torch.arange(self.folded, self.seen, device=held.device)
        live = live_mask(slots.new_tensor([self.seen]), slots, self.flags, self.plan.grace)[:, :, 0]
        held[..., self.folded :] = (live | torch.tensor(self.in_prompt and self.plan.dense)) & self.valid[:, None]
        return held

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that this layer holds."""
        own = (
            self.keys,
            self.values,
            self.flags,
            self.valid,
            self.scores,
            self.real,
            self.cut,
            self.queries,
            self.hidden,
        )
        return [t for t in (*own, *(self.gate_state or ()), *self.store.tensors()) if t is not None]
