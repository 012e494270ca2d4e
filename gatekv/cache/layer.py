"""One layer's cache: a dense tail of recent tokens, pages of kept ones, and the moment flags act.

Recurrent form of the law (gatekv.attention): tokens enter the tail; when they leave the window they are folded, i.e.
moved to pages if flagged, dropped if not. Folding waits for FOLD tokens; meanwhile the mask hides the dead.
"""

import copy
from dataclasses import replace
from enum import Enum
from typing import Any, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from gatekv.attention import AttentionCall, Memory, live_mask, sink_tokens, valid_tokens
from gatekv.cache import refusals
from gatekv.cache.buffer import Buffer
from gatekv.cache.judge import FOLD, ROLLBACK, Judge
from gatekv.cache.kept import Kept
from gatekv.cache.merge import Merge
from gatekv.cache.pages import Pages
from gatekv.cache.plan import Plan
from gatekv.cache.prompt_end import PromptEnd
from gatekv.cache.slots import Rotary, Slots
from gatekv.cache.tail import Tail
from gatekv.less.maps import LessMaps, Waiting
from gatekv.ops import segments
from gatekv.ops.remainder import left_of
from gatekv.policies import Scorer, View
from gatekv.policies.amount import share_of
from gatekv.policies.budgets import faded
from gatekv.policies.merging import Tokens
from gatekv.precision import attended
from gatekv.support import LATER

Tensor = torch.Tensor
Mask = Tensor | None
PIECE = 512  # tokens of a long call that attend together, so that what they evict is gone for the next piece


class Phase(Enum):
    """PROMPT: before the decision; LATER: after it; TURN: after it, tokens wait whole for `KVCache.compress`."""

    PROMPT, LATER, TURN = range(3)


class KVLayer(Memory, CacheLayerMixin):
    """Cache layer of one full-attention layer; `attend` is called by the attention function."""

    is_croppable = True

    def __init__(self, plan: Plan, layer_idx: int) -> None:
        super().__init__()
        self.plan, self.layer_idx = plan, layer_idx
        self.clear()

    def clear(self) -> None:
        """Forget everything; the cache is as new."""
        self.tail: Tail = LATER  # this and what `lazy_initialization` makes
        self.kept: Kept = LATER
        self.real: Tensor = LATER
        self.seen, self.folded = 0, 0  # slots; real: real tokens [batch, 1]; slots that left the tail
        self.phase, self.base = Phase.PROMPT, 0  # base: the slot where the current prompt or turn begins
        self.first_call: int | None = None
        self.unmet: Tensor | None = None  # [batch] bool: rows whose budget could not be kept; None before a decision
        self.cut: Tensor | None = None  # [batch, 1 or kv_heads, 1]: what a later token's logit must exceed
        self.judge = Judge()
        self.queries: Tensor | None = None  # this and what follows only while a decision is ahead
        self.hidden: Tensor | None = None
        self.scaling: float = LATER
        self.rotary: Rotary | None = None
        self.known: dict | None = None  # of an undecided prompt: scores that some policy asked for already
        self.is_initialized = False
        self.calls, self.open, self.expected = 0, False, False  # see gatekv.cache.refusals

    # -- what transformers asks of a cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None) -> None:
        plan = self.plan
        self.tail = Tail(key_states, plan.ranks)
        scored = plan.trims or plan.decays or plan.streams
        merge = Merge(cast(Any, plan.policy.remainder)) if plan.merges else None
        self.kept = Kept(key_states, plan.block_size, scored, plan.backend, merge)
        self.real = torch.zeros(len(key_states), 1, dtype=torch.long, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new tokens through; `attend` stores them, because only there flags and mask are known."""
        refusals.check_owner(self)
        self.expected = False
        if not self.is_initialized:
            self.lazy_initialization(attended(key_states), value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, never tokens stored: positions follow from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def expect(self, new: int) -> None:
        refusals.check_whole(self, new)
        refusals.check_positions(self, new)
        self.expected = True

    @property
    def dense(self) -> bool:  # type: ignore[override]
        return self.seen == 0 and self.plan.dense and self.plan.prompt_tokens is None

    reset = clear

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Re-order, repeat or reduce the batch."""
        if not self.is_initialized:
            return
        index = beam_idx.to(self.real.device)
        batch = len(self.real)
        if len(index) == batch and torch.equal(index, torch.arange(batch, device=index.device)):
            return
        self.kept.select(index)
        self.tail.select(index)
        self.judge.select(index)
        self.known = None if self.known is None else {}
        for name in ("real", "unmet", "cut", "queries", "hidden"):
            if (held := vars(self)[name]) is not None:
                setattr(self, name, held.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self.real)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self.real), device=indices.device)[indices])

    # -- rolling back

    def activate_past_recording(self) -> None:
        """Keep the last ROLLBACK tokens whole until `crop` says which of them stay."""
        self.judge.recording = True

    def croppable(self) -> int:
        """How many of the last tokens can be taken back without a trace."""
        if self.phase is Phase.PROMPT and (self.plan.waits or self.plan.defer):
            return 0
        grace = 0 if self.phase is Phase.TURN else max(self.plan.grace - 1, 0)
        limit = len(self.tail) - grace if self.folded else self.seen
        if self.plan.waits:
            limit = min(limit, self.seen - self.base)
        if (unread := self.judge.rewindable()) is not None:
            limit = min(limit, unread)
        return max(limit, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens, as if they had never been seen.

        Raises:
            ValueError: when some of what they displaced is gone (call `activate_past_recording` first), or when the
                cut would fall inside a compressed prompt.
        """
        if tokens_to_remove > 0:
            raise ValueError("crop takes minus the number of tokens to remove, as in transformers' own caches.")
        if not self.is_initialized:
            return
        if remove := -tokens_to_remove:
            if remove > self.croppable():
                raise ValueError(
                    f"cannot take back {remove} tokens, only the last {self.croppable()}: more has been evicted since, "
                    f"or is a compressed prompt. Call cache.activate_past_recording() before they are fed (the last "
                    f"{ROLLBACK} can be taken back then), or keep a cache.snapshot()."
                )
            self.real = self.real - self.tail.valid[:, len(self.tail) - remove :].sum(-1, keepdim=True)
            self.tail.drop(back=remove)
            self.seen -= remove
            self.judge.rewind(remove)
            if self.queries is not None:
                self.queries = self.queries[:, :, : max(self.queries.shape[2] - remove, 0)]
        self.judge.history = []
        if self.phase is Phase.LATER:
            self.fold(FOLD, rollback=0)

    # -- the recurrent form

    @torch.compiler.disable
    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scaling: float) -> Tensor:
        """Take in new tokens, answer their queries, evict.

        q: [B, H, Q, D]; k, v: [B, K, Q, D]; mask: [B, 1, Q, seen + Q] bool or None. Returns [B, H, Q, D].
        """
        given, n = q.dtype, q.shape[2]
        q, k, v = (t.to(self.tail.keys.dtype) for t in (q, k, v))  # autocast may be on in one call, off in the next
        refusals.check_call(self, n, mask)
        end = self.plan.prompt_tokens
        if self.phase is not Phase.PROMPT or not self.plan.waits or end is None or not self.seen < end < self.seen + n:
            return self._done(self._attend(call, q, k, v, mask, scaling).to(given))
        outs, start = [], self.seen
        for a, c in ((0, end - start), (end - start, n)):  # what follows the prompt sees it compressed
            part = replace(call, hidden=call.hidden[:, a:c])
            seen_by = None if mask is None else mask[:, :, a:c, : start + c]
            outs.append(self._attend(part, q[:, :, a:c], k[:, :, a:c], v[:, :, a:c], seen_by, scaling))
        return self._done(torch.cat(outs, 2).to(given))

    def _done(self, out: Tensor) -> Tensor:
        self.calls, self.open = self.calls + 1, False
        return out

    def _attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scaling: float) -> Tensor:
        b, _, n, _ = q.shape
        valid = valid_tokens(mask, b, n, q.device)
        if self.plan.remembers:
            self._remember(call.less)
        if self.plan.streams and self.phase is Phase.LATER:
            return self._stream(call, q, k, v, valid, scaling)
        flags, logits = self._judge(call, k, valid)
        self.open = True
        whole = self.phase is Phase.PROMPT and self.plan.dense
        leaves = self.plan.remembers and (self.phase is not Phase.LATER or self.plan.later_leave)
        psi, outs = self.kept.maps.psi(k) if leaves else None, []
        for a in range(0, n, n if whole else PIECE):
            c = min(n, n if whole else a + PIECE)
            piece = (k[:, :, a:c], v[:, :, a:c], flags[..., a:c], valid[:, a:c])
            slack = 0 if self.phase is Phase.PROMPT else FOLD
            side = (None if logits is None else logits[..., a:c], None if psi is None else psi[:, :, a:c])
            self.tail.append(*piece, *side, slack=slack)
            self.seen += c - a
            outs.append(self._answer(q[:, :, a:c], None if mask is None else mask[:, :, a:c, : self.seen], scaling))
            if not whole and self.phase is not Phase.TURN and not (self.plan.whole and self.phase is Phase.PROMPT):
                self.fold(FOLD)
        self.real = self.real + (n if mask is None else valid.sum(-1, keepdim=True))
        if self.phase is not Phase.LATER:
            self._observe(call, q, scaling)
        if self.phase is Phase.PROMPT and (self.plan.prompt_tokens is None or self.seen >= self.plan.prompt_tokens):
            self.end_prompt()
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _stream(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """Token by token, however many come: what each one evicts is gone for the next."""
        if self.judge.recording:
            name = type(self.plan.policy.scorer).__name__
            raise ValueError(
                f"assisted decoding takes tokens back, and {name} cannot bring back what they evicted: "
                "use KVCache(…, decode='keep') with it."
            )
        self.open, scorer, outs = True, self.plan.policy.scorer, []
        index = self.real + valid.long().cumsum(-1) - 1
        entering = scorer.enter(k, index)
        if self.kept.slots is None:  # a prompt shorter than the sinks leaves the rest of them to come
            entering = entering.masked_fill((index < self.plan.sinks)[:, None], torch.inf)
        for i in range(q.shape[2]):
            new = slice(i, i + 1)
            flags = valid[:, None, new].expand(*k.shape[:2], 1)
            self.kept.pages.append(k[:, :, new], v[:, :, new], flags, self.seen, entering[..., new])
            self.seen, self.folded = self.seen + 1, self.folded + 1
            if self.kept.slots is not None:
                self.kept.slots.step(cast(Rotary, tuple(t[:, new] for t in cast(Rotary, call.rotary))))
            kept = segments.merge(self.kept.segments(q[:, :, new], scaling))
            gone = self.kept.maps.answer(q[:, :, new], scaling, self.kept.state) if self.plan.remembers else []
            outs.append(segments.merge([kept, *gone])[0].to(q.dtype))
            if scorer.watches:  # attention among the kept alone: a policy decides the same with a remainder or without
                self.kept.watch(scorer.observe, q[:, :, new], kept[1], scaling)
            self.kept.trim(self._worth, self.seen)
        self.real = self.real + valid.sum(-1, keepdim=True)
        return torch.cat(outs, 2)

    def _judge(self, call: AttentionCall, k: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
        """(flags that new tokens will have once they leave the window, logits to keep), both [B, K, n] or None."""
        flags = valid[:, None].expand(k.shape[:3])
        later = self.phase is Phase.LATER
        if not self.plan.learned or (later and self.plan.keep_later):
            return flags, None
        if call.gate is None:
            raise ValueError("the adapter was disabled or unloaded while this cache was in use; enable it again.")
        if self.plan.whole and self.seen:
            raise ValueError(
                "this gate reads the whole prompt before it judges any of it: feed the prompt in one call, without "
                "prefill_chunk_size, or train a gate with context='causal'."
            )
        self.open, scored = True, self.tail.scores is not None
        if later and self.judge.postpone(call.hidden, self.plan.grace):
            return flags, flags.float() if scored else None  # what it will say is written over them
        self.judge.gate = call.gate
        logits, valid, old = self.judge.read(call.hidden, valid, self.tail)
        real = self.real - valid[:, :old].sum(-1, keepdim=True)
        sinks = sink_tokens(valid, self.plan.sinks, real)
        flags = (logits > self._thresholds(valid, real, self.seen - old)) & valid[:, None] | sinks[:, None]
        if self.plan.decays and later:
            logits = logits.masked_fill(sinks[:, None], torch.inf)
        if old:
            self.tail.rewrite(flags[..., :old], logits[..., :old])
        return flags[..., old:], logits[..., old:] if scored else None

    def _thresholds(self, valid: Tensor, real: Tensor, start: int) -> Tensor:
        """Logit thresholds of tokens that came after `start` slots, `real` [batch, 1] of them real tokens;
        broadcastable to [batch, kv_heads, n]."""
        plan = self.plan
        if self.phase is Phase.TURN:
            return torch.tensor(-torch.inf, device=valid.device)
        if self.cut is not None:
            return self.cut
        if plan.policy.budget is None:
            return torch.tensor(plan.threshold, device=valid.device)
        if plan.streaming or plan.trims:
            return self._calibrated(valid, real, start)[:, None]
        return torch.tensor(-torch.inf, device=valid.device)  # a dense prompt decides at its end

    def _calibrated(self, valid: Tensor, real: Tensor, start: int) -> Tensor:
        """Thresholds [batch, n] that keep the budget as tokens leave the window; arguments as for `_thresholds`."""
        plan = self.plan
        # A token is judged when it leaves the window: by then its row has seen `window` more tokens. This depends
        # on the token alone, never on how the prompt was cut into calls.
        index = real + valid.long().cumsum(-1)
        seen, loose = index + plan.window, 1.0 if plan.streaming else 1.5
        if not plan.knows_end:
            return plan.thresholds(cast(float, plan.policy.budget), seen)
        pads = start - real + (~valid).sum(-1, keepdim=True)
        end = self.base if self.phase is Phase.LATER else plan.prompt_tokens or start + valid.shape[1]
        known = plan.prompt_tokens is not None or isinstance(plan.policy.budget, int)
        out = []
        for row, length in enumerate((end - pads)[:, 0].tolist()):
            share = min(1.0, loose * share_of(plan.policy.budget, length))
            limits = plan.thresholds(share, seen[row], length if known else None)
            out.append(limits.masked_fill((index[row] <= length) & plan.decide.too_short(length), -torch.inf))
        return torch.stack(out)

    def _answer(self, q: Tensor, mask: Mask, scaling: float) -> Tensor:
        n, tail = q.shape[2], len(self.tail)
        whole = self.phase is Phase.TURN or (self.phase is Phase.PROMPT and self.plan.dense)
        k, v = self.tail.keys, self.tail.values
        if self.kept.empty() and whole and mask is None and n == tail:
            gqa = q.shape[1] != k.shape[1]
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, v, is_causal=n > 1, scale=scaling, enable_gqa=gqa)
        visible = self._visible(n, mask, whole)
        if (self.plan.remembers and not whole) or not self.kept.empty():
            near = segments.dense_segment(q, k, v, visible, scaling)
            parts = [*self.kept.segments(q, scaling), near]
            if self.plan.remembers:
                parts += self._gone(q, mask, scaling, waiting=not whole and self.tail.psi is not None)
            return segments.merge(parts)[0].to(q.dtype)
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        if visible is not None and visible.shape[1] > 1:
            visible = visible.repeat_interleave(groups, 1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling)

    def _gone(self, q: Tensor, mask: Mask, scaling: float, waiting: bool) -> list[tuple[Tensor, Tensor]]:
        """(output, log-sum-exp) of what was evicted: the state's, and of tokens in the tail that wait to be folded."""
        tail, left = self.tail, None
        if waiting:
            mask = None if mask is None else mask[..., self.folded :]
            left = Waiting(cast(Tensor, tail.psi), tail.keys, tail.values, left_of(tail.flags, self.plan.grace), mask)
        return self.kept.maps.answer(q, scaling, self.kept.state, left)

    def _remember(self, maps: LessMaps | None) -> None:
        """Use the adapter's low-rank maps; an empty state, if there is none yet."""
        if maps is None:
            raise ValueError("the adapter was disabled or unloaded while this cache was in use; enable it again.")
        self.kept.maps = maps
        if self.kept.state is None:
            self.kept.state = maps.state(self.tail.values)

    def _visible(self, n: int, mask: Mask, whole: bool) -> Tensor | None:
        """[B, 1 or K, n, tail] bool: what the last n tokens may see of the tail; None = everything."""
        visible = None if mask is None else mask[..., self.folded :]
        judged = self.plan.learned and not whole
        if n > 1 or judged:
            slots = torch.arange(len(self.tail), device=self.real.device)
            if visible is None and n > 1:
                visible = (slots[-n:, None] >= slots)[None, None]
            if judged:
                live = live_mask(slots[-n:], slots, self.tail.flags, self.plan.grace)
                visible = live if visible is None else visible & live
        return visible

    # -- decisions

    def _observe(self, call: AttentionCall, q: Tensor, scaling: float) -> None:
        """Keep what scorers will look at until the prompt ends."""
        self.known = {} if self.plan.defer else None
        self.scaling, self.judge.gate = scaling, cast(torch.nn.Module, call.gate)
        wanted = self.plan.queries
        if wanted:
            self.queries = torch.cat([*([] if self.queries is None else [self.queries]), q], 2)[:, :, -wanted:]
        if self.plan.policy.scorer.slots and call.rotary is None:
            raise ValueError(
                "positions='slot' turns queries by RoPE, and this model's attention gets no `position_embeddings`: use "
                "positions='original'."
            )
        if self.plan.policy.scorer.slots or self.plan.defer:
            old, new = self.rotary, call.rotary
            if old is not None and new is not None:
                new = torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1)
            self.rotary = new
        if self.plan.defer:
            self.hidden = torch.cat([*([] if self.hidden is None else [self.hidden]), call.hidden], 1)

    def adopt(self, other: "KVLayer", gate: torch.nn.Module | None, maps: LessMaps | None) -> None:
        """Take over an undecided layer's whole prompt, sharing its tensors; gate judges it from here on, and maps
        remember it."""
        self.lazy_initialization(other.tail.keys[:, :, :0], None)
        self.tail = other.tail.twin()
        for name in ("seen", "real", "folded", "queries", "hidden", "scaling", "rotary", "known"):
            setattr(self, name, vars(other)[name])
        self.judge.gate = cast(torch.nn.Module, gate)
        if self.plan.remembers:
            self._remember(maps)
            self.tail.psi = cast(LessMaps, maps).psi(self.tail.keys)

    @property
    def decided(self) -> bool:
        """Whether the prompt has ended."""
        return self.phase is not Phase.PROMPT

    def end_prompt(self) -> None:
        """The prompt or turn is whole: let the plan's rule decide what stays."""
        if not self.plan.defer:
            self.plan.decide(self)

    def view(self) -> View:
        """What a scorer sees of a prompt or turn that is still whole."""
        tail = self.tail
        queries = cast(Tensor, self.queries)  # None only for scorers that look at no query
        parts = (tail.keys, tail.values, queries, tail.valid, self.scaling, self.layer_idx, self._gate_logits)
        return View(*parts, self._kinds())

    def _kinds(self) -> Tensor | None:
        """[batch, slots since base] of what the cache was told about its tokens; 0 for later ones."""
        kinds, slots = self.plan.kinds, self.seen - self.base
        if kinds is None:
            return None
        if len(kinds) != len(self.real):
            raise ValueError(
                f"kinds has {len(kinds)} rows, the prompt {len(self.real)}: give one row a sequence (beam)."
            )
        kinds = kinds[:, self.base : self.seen].to(self.real.device)
        return torch.nn.functional.pad(kinds, (0, slots - kinds.shape[1]))

    def _gate_logits(self) -> Tensor:
        if self.tail.scores is None:
            self.tail.scores = self.judge.read(cast(Tensor, self.hidden), self.tail.valid, self.tail)[0].float()
        return self.tail.scores

    def protection(self, recent: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """(protected [batch, 1, n], valid [batch, n]) of the n slots since base: sinks and last tokens of each row.

        recent: how many last tokens, [batch] or a number; None = the window.
        """
        slots = torch.arange(self.base, self.seen, device=self.real.device)
        if self.folded == self.base:
            valid = self.tail.valid
        else:  # part of the prompt is in pages already; pads stand on the left
            valid = slots >= self.seen - self.real
        sinks = sink_tokens(valid, self.plan.sinks, self.real - valid.sum(-1, keepdim=True))
        recent = torch.as_tensor(self.plan.window if recent is None else recent, device=slots.device)
        return (sinks | (valid & (slots >= self.seen - recent.view(-1, 1))))[:, None], valid

    def all_scores(self) -> Tensor:
        """[batch, kv_heads, n] since base; tokens that the prompt's own flags evicted score -inf."""
        if self.plan.decays:
            return self._gate_logits()
        if not self.plan.trims or self.phase is Phase.TURN:
            return self._scored(self.plan.policy.scorer)
        b, kv, _ = (held := cast(Tensor, self.tail.scores)).shape
        scores = held.new_full((b, kv, self.seen), -torch.inf)
        self.kept.pages.scatter(scores, cast(Tensor, self.kept.pages.scores))
        scores[..., self.folded :] = held.masked_fill(~self.tail.flags, -torch.inf)
        return scores

    def _scored(self, scorer: Scorer) -> Tensor:
        if self.known is None:
            return scorer.score(self.view())
        of = (repr(scorer), self.judge.gate, self.plan.kinds)  # a dataclass's repr names all else that matters
        if of not in self.known:
            self.known[of] = scorer.score(self.view())
        return self.known[of]

    def all_logits(self) -> Tensor:
        """As `all_scores`, of the gate alone: what later tokens are measured by."""
        return self.all_scores() if self.plan.trims else self._gate_logits()

    def restrict(self, keep: Tensor, cut: Tensor | None, scores: Tensor, recent: Tensor) -> None:
        """Hold exactly keep [batch, kv_heads, slots since base].

        cut [batch, 1 or kv_heads, 1]: the logit that later tokens must exceed; None: they all stay. scores: those that
        were ranked, shaped as keep. recent [batch]: how many last tokens the policy keeps in any case.
        """
        tail = self.tail
        flags = keep[..., self.folded - self.base :]
        if cut is not None:
            # Tokens still in the window were kept for that alone; their own logits decide when they leave it.
            young = torch.arange(flags.shape[-1], device=flags.device) > flags.shape[-1] - max(self.plan.window, 1)
            sinks = sink_tokens(tail.valid, self.plan.sinks, self.real - tail.valid.sum(-1, keepdim=True))[:, None]
            flags = torch.where(young, ((cast(Tensor, tail.scores) > cut) & tail.valid[:, None]) | sinks, flags)
        self.cut, tail.flags = cut, flags
        if self.folded > self.base:
            self.kept.filter(keep, self.base)
        if self.plan.streams or (self.plan.decays and not self.plan.keep_later):
            sinks = sink_tokens(tail.valid, self.plan.sinks)[:, None]
            tail.scores = scores.float().masked_fill(sinks, torch.inf)  # they never leave
            room = keep.sum(-1).clamp_min(self.plan.sinks + self.plan.window)  # a short prompt fills it later
            recent = recent if self.plan.streams else 0 * recent
            self.kept.buffer = Buffer(room - max(self.plan.grace - 1, 0), recent)
        else:
            self.kept.pages.scores = None
            tail.scores = tail.scores if self.plan.turns else None
        self.settle()

    def protect(self, protected: Tensor) -> None:
        """Flag the protected [batch, 1, slots since base] for good: what follows is not judged, nor shields them."""
        self.tail.flags = self.tail.flags | protected[..., self.folded - self.base :]

    def settle(self) -> None:
        """The prompt or turn is over: fold it, and go on with what follows."""
        if self.plan.turns:
            self._fold(len(self.tail))
            self.phase, self.base = Phase.TURN, self.seen
        else:
            self.phase, self.base = Phase.LATER, self.seen
            self.fold(rollback=0 if self.plan.waits else None)  # nothing takes back a decided prompt
        if self.plan.policy.width is not None:
            self._narrow()
        if self.plan.streams and self.plan.policy.scorer.slots:
            room = cast(Buffer, self.kept.buffer).room[:, 0]
            self.kept.slots = Slots.of(self.kept.pages, room, self.real[:, 0], cast(Rotary, self.rotary))
        if not self.plan.later_leave:
            self.tail.psi = None
        self.queries = self.hidden = self.rotary = None

    def _narrow(self) -> None:
        """Store what the prompt left, but for its last tokens, as the policy's width says."""
        asked = torch.arange(self.seen - (q := cast(Tensor, self.queries)).shape[2], self.seen, device=self.real.device)
        live = self.tail.flags & self.tail.valid[:, None]
        end = PromptEnd(q, asked >= self.seen - self.real, self.tail.keys, live, self.seen, self.scaling)
        self.kept.narrow(cast(Any, self.plan.policy.width), end)

    def fold(self, at_least: int = 1, rollback: int | None = None) -> None:
        """Move flagged tokens that have left the window from the tail to pages, if so many have; forget the others.

        rollback: leave that many tokens more; None = what recording asks for.
        """
        if rollback is None:
            rollback = ROLLBACK if self.judge.recording else 0
        leave = len(self.tail) - max(self.plan.grace - 1, 0) - rollback
        if leave >= max(at_least, 1):
            self._fold(leave)

    def _fold(self, leave: int) -> None:
        t = self.tail
        pages = self.kept.pages
        scores = None if pages.scores is None else cast(Tensor, t.scores)[..., :leave]
        keys, values, flags = t.keys[:, :, :leave], t.values[:, :, :leave], t.flags[..., :leave]
        pages.append(keys, values, flags, self.folded, scores)
        if t.psi is not None or self.plan.merges:
            slots = torch.arange(self.folded, self.folded + leave, device=flags.device, dtype=torch.int32)
            gone = ~flags & t.valid[:, None, :leave]
            left = Tokens(*(x.flatten(0, 1) for x in (keys, values, slots.expand(flags.shape), gone)))
            self.kept.fold(pages, left, None if t.psi is None else t.psi[:, :, :leave])
        t.drop(front=leave)
        self.folded += leave
        self.kept.trim(self._worth, self.seen)

    def _worth(self, pages: Pages) -> Tensor:
        """[P, block_size]: by what a full buffer ranks its tokens."""
        scores = cast(Tensor, pages.scores)
        return faded(scores, self.seen - pages.positions) if self.plan.decays else scores

    def twin(self) -> "KVLayer":
        """An independent copy that shares storage until either side changes."""
        twin = copy.copy(self)
        twin.judge = self.judge.twin()
        if self.is_initialized:
            twin.tail, twin.kept = self.tail.twin(), self.kept.twin()
        return twin

    # -- accounting

    def held(self) -> Tensor:
        """[batch, kv_heads, seen] bool: what the next query can still see."""
        tail = self.tail
        b, kv, _ = tail.flags.shape
        held = torch.zeros(b, kv, self.seen, dtype=torch.bool, device=tail.flags.device)
        for pages in self.kept.stores():
            pages.scatter(held, True)
        slots = torch.arange(self.folded, self.seen, device=held.device)
        live = live_mask(slots.new_tensor([self.seen]), slots, tail.flags, self.plan.grace)[:, :, 0]
        whole = self.phase is Phase.TURN or (self.phase is Phase.PROMPT and self.plan.dense)
        held[..., self.folded :] = (live | torch.tensor(whole)) & tail.valid[:, None]
        return held

    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer holds."""
        side = (self.real, self.unmet, self.cut, self.queries, self.hidden)
        parts = (self.judge, self.tail, self.kept)
        return [t for t in side if t is not None] + [t for part in parts for t in part.tensors()]
