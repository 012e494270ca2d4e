"""The attention function and mask function registered with transformers, and the law they keep.

The law (one rule for training and inference): for query i and key j <= i in one KV head, j is live iff i - j <
max(window, 1), or flag[j] = keep (sinks are flagged). Training applies it as a weight, the cache by really evicting.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gatekv.config import GateSpec
from gatekv.gates.documents import Documents
from gatekv.gates.key_mlp import key_features
from gatekv.gates.relaxations import relax
from gatekv.less.maps import LessMaps, Waiting
from gatekv.ops import segments
from gatekv.ops.gated_attention import BLOCK, gated_attention, received_attention
from gatekv.ops.naive import causal_mask, dense_segment
from gatekv.ops.on_the_spot import on_the_spot
from gatekv.ops.remainder import left_of
from gatekv.ops.sequence import ALONE, Sequence
from gatekv.precision import attended, without_autocast
from gatekv.support import LATER, check_call, refuse, visible_keys

if TYPE_CHECKING:
    from gatekv.support import SelfAttention

NAMES = {"sdpa": "gatekv", "eager": "gatekv_eager"}


class Memory:
    """A cache layer that answers attention itself (gatekv.cache.layer.KVLayer); it hands new tokens through `update`.

    Attributes:
        dense: whether the tokens of the next call attend to all that came before them.
    """

    is_sliding = False
    dense = False

    def get_max_length(self) -> int:
        """No bound, as transformers says it."""
        return -1

    def attend(
        self,
        call: "AttentionCall",
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """[batch, heads, queries, head_dim] of q; k and v, of the new tokens, have gone through `update`."""
        raise NotImplementedError


class Judged(NamedTuple):
    """What a gate said in a pass without a gatekv cache. With a split, about the prompt alone.

    Attributes:
        logits: [batch, kv_heads, tokens] in float32; of packed rows, [documents, …].
        valid: [batch, tokens] bool, False at pads.
        received: [batch, kv_heads, tokens], the most attention a token gets later, or None.
        error: scalar, how far evicting moves this layer's output, or None.
    """

    logits: torch.Tensor
    valid: torch.Tensor
    received: torch.Tensor | None = None
    error: torch.Tensor | None = None


class Lesson(NamedTuple):
    """How far evicting moves a layer's output, with a low-rank remainder and without: shares of the output's square."""

    error: torch.Tensor
    alone: torch.Tensor


@dataclass
class AttentionCall:
    """What a gated self_attn hands to the attention function, beside q, k, v.

    Attributes:
        hidden: [batch, tokens, hidden_size], the layer's input; from `prepare` on, what the gate reads.
        layer_idx: of the layer. rotary: (cos, sin) of the new tokens, or None.
        memory: the gatekv cache layer, or None for the parallel form.
        gate: the active gate module or None; spec: its GateSpec; form: a relaxation's name or "hard" for the parallel
        form, applied to logits - threshold; "listen" = plain attention, the gate only judges; "lesson": see lesson;
        "plain" = plain attention, of a shared row.
        split: the prompt's length, for flags that act after it (one-shot); None = they act as tokens leave the window.
        less: the low-rank maps in force, or None.
        lesson: [batch, kv_heads, prompt] bool, what is kept of the cached prompt that the maps learn to do without; the
        new tokens follow it. None = there is no lesson.
        documents: of packed rows, which are judged one by one.
        seed: of this layer's noise, for the gumbel relaxation.
        received: measure the attention that tokens receive.
        local: (logits, valid) -> threshold: measure this layer's own error too; None = do not.
        sequence: the processes that share the rows: `hidden` is of this one's tokens; in attention q, k, v and what is
        judged are of this one's heads and all tokens.
        record: called with what the gate said (`Judged`).
        answered: set by the attention function; a model that never calls it would go on without a word.
    """

    hidden: torch.Tensor
    layer_idx: int
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    memory: Memory | None = None
    gate: torch.nn.Module | None = None
    spec: GateSpec = LATER
    form: str = "hard"
    threshold: torch.Tensor | float = 0.0
    split: int | None = None
    documents: Documents | None = None
    seed: int | None = None
    less: LessMaps | None = None
    lesson: torch.Tensor | None = None
    received: bool = True
    local: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float] | None = None
    sequence: Sequence = ALONE
    record: Callable[[Judged | Lesson], None] = LATER
    answered: bool = False

    def prepare(self, k: torch.Tensor) -> None:
        """From here on `hidden` is what the gate reads: the layer's input, or the new keys k [B, K, Q, D]."""
        if self.gate is not None and self.gate.reads == "keys":
            self.hidden = key_features(k, self.rotary)

    def judge(self, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [batch, kv_heads, tokens], valid [batch, tokens]) of the sequence, or of its prompt where there is a
        split; of each document, where rows are packed."""
        assert self.gate is not None
        if self.sequence.size > 1:  # each process judges its own tokens; the gate looks at no others
            logits = self.sequence.into(self.gate(self.hidden, self.sequence.part(valid, 1))[0])
            apart = self.documents
            return (logits, valid) if apart is None else (apart.apart(logits, 2), apart.valid)
        if self.documents is not None:
            valid = self.documents.valid
            return self.gate(self.documents.apart(self.hidden), valid)[0], valid
        valid = valid[:, : self.split]
        return self.gate(self.hidden[:, : self.split], valid)[0], valid

    def listen(
        self,
        module: "SelfAttention",
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        plain: torch.Tensor,
    ) -> None:
        """Leave the plain output alone; record what the gate says and what attention each token really receives.

        plain: [B, Q, H, D], the layer's own answer, against which `local` measures an evicted one.
        """
        valid = valid_tokens(mask, q.shape[0], q.shape[2], q.device)
        self.hidden = self.hidden.detach()
        with torch.enable_grad():
            logits, judged = self.judge(valid)
        received = error = None
        if self.received:
            received = received_attention(q, k, window=self.spec.window, scale=scaling, mask=mask)[..., : self.split]
            received = received if self.documents is None else self.documents.apart(received, 2)
        if self.local is not None:
            asking = slice(self.split or 0, None)
            with torch.enable_grad():
                weight = self._weight(logits, judged, valid, self.spec.relaxation, self.local(logits, judged))
                part = None if mask is None else mask[:, :, asking]
                out = gated_attention(
                    q[:, :, asking], k, v, weight, window=self.spec.window, scale=scaling, mask=part, decay=self.decays
                ).transpose(1, 2)
                real = valid if self.documents is None else self.documents.real
                error = output_error(module, out, plain[:, asking], real[:, asking], self.sequence)
        self.record(Judged(logits, judged, received, error))

    def learn(
        self,
        module: "SelfAttention",
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        plain: torch.Tensor,
    ) -> None:
        """Leave the plain output alone; record the layer's own error under the lesson's flags (LESS, §3.2).

        Shapes as in `remember`; plain: [B, Q, H, D]. Gradients reach the low-rank maps and nothing else.
        """
        valid = valid_tokens(mask, q.shape[0], q.shape[2], q.device)
        with torch.enable_grad():
            kept, far = self.remember(q.detach(), k.detach(), v.detach(), mask, scaling)
            error = output_error(module, segments.merge([kept, far])[0].transpose(1, 2), plain, valid)
        self.record(Lesson(error, output_error(module, kept[0].transpose(1, 2), plain, valid)))

    def remember(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[what is kept, the remainder], each (output, log-sum-exp), under the lesson's flags; differentiable.

        q: [B, H, Q, D] of the tokens behind the prompt; k, v: [B, K, prompt + Q, D]; mask: [B, 1, Q, prompt + Q] or
        None = causal.
        """
        assert self.lesson is not None and self.less is not None
        prompt, n = self.lesson.shape[-1], k.shape[2]
        flags = torch.nn.functional.pad(self.lesson, (0, n - prompt), value=True)
        seen = causal_mask(q.shape[2], n, q.device)[None, None] if mask is None else mask
        segment = dense_segment if q.requires_grad else segments.dense_segment  # the fast one writes in place
        blocks = [slice(a, a + BLOCK) for a in range(0, q.shape[2], BLOCK)]  # never all queries by all keys at once
        answers = [segment(q[:, :, i], k, v, flags[:, :, None] & seen[:, :, i], scaling) for i in blocks]
        kept = torch.cat([out for out, _ in answers], 2), torch.cat([lse for _, lse in answers], 2)
        waiting = Waiting(self.less.psi(k), k, v, left_of(flags, 0, prompt), mask)
        return [kept, *self.less.answer(q, scaling, None, waiting)]

    def parallel(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """One pass over whole sequences with the gates as weights: the form that is trained."""
        valid = valid_tokens(mask, q.shape[0], q.shape[2], q.device)
        logits, judged = self.judge(valid)
        self.record(Judged(logits, judged))
        weight = self._weight(logits, judged, valid, self.form, self.threshold)
        n, prompt = q.shape[2], 0 if self.split is None or self.masks_prompt() else self.split
        outs = [
            gated_attention(
                q[:, :, a:c], k[:, :, :c], v[:, :, :c], g[..., :c], window=self.spec.window, scale=scaling,
                mask=None if mask is None else mask[:, :, a:c, :c], decay=self.decays,
            )
            for a, c, g in ((0, prompt, torch.ones_like(weight)), (prompt, n, weight)) if c > a
        ]  # fmt: skip
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _weight(
        self,
        logits: torch.Tensor,
        judged: torch.Tensor,
        valid: torch.Tensor,
        form: str,
        threshold: torch.Tensor | float,
    ) -> torch.Tensor:
        """The relaxed flags of all tokens: what follows a split is kept."""
        weight = relaxed_flags(
            logits, judged, self.spec, form=form, threshold=threshold, split=self.split, seed=self.seed
        )
        if self.documents is not None:
            return self.documents.together(weight, 2)
        return torch.nn.functional.pad(weight, (0, valid.shape[1] - logits.shape[-1]), value=1.0)

    @property
    def decays(self) -> bool:
        """Whether weights fade with distance."""
        return self.spec.relaxation == "decay"

    def masks_prompt(self) -> bool:
        """Whether a prompt's flags act for its own queries too, though all of them were set at its end."""
        return self.spec.context == "prompt" and self.spec.mask_prompt


def output_error(
    module: "SelfAttention", out: torch.Tensor, plain: torch.Tensor, valid: torch.Tensor, sequence: Sequence = ALONE
) -> torch.Tensor:
    """Squared error of a layer's attention output after o_proj, as a share of the output's own square.

    out, plain: [batch, tokens, heads, head_dim]; valid: [batch, tokens]. Mean per row, then over rows. sequence: the
    processes that share the rows, each with some of the heads.
    """
    out, plain, valid = sequence.out_of(out), sequence.out_of(plain), sequence.part(valid, 1)
    project = lambda t: module.o_proj(t.flatten(2).to(module.o_proj.weight.dtype)).float() * valid[..., None]  # noqa: E731
    size = sequence.mean(project(plain.detach()).square().sum((1, 2))).clamp_min(1e-6)
    return on_the_spot(lambda x: (project(x).square().sum((1, 2)) / size).mean(), out - plain.detach())


def valid_tokens(mask: torch.Tensor | None, batch: int, new: int, device: torch.device) -> torch.Tensor:
    """[batch, new] bool: which of the new tokens are real, read off the last query's row of the mask."""
    if mask is None:
        return torch.ones(batch, new, dtype=torch.bool, device=device)
    return mask[:, 0, -1, -new:].expand(batch, new)


def sink_tokens(valid: torch.Tensor, sinks: int, seen_real: torch.Tensor | int = 0) -> torch.Tensor:
    """[batch, tokens] bool: the first `sinks` real tokens of each row; seen_real [batch, 1] came before."""
    return valid & (valid.long().cumsum(-1) + seen_real <= sinks)


def relaxed_flags(
    logits: torch.Tensor,
    valid: torch.Tensor,
    spec: GateSpec,
    *,
    form: str,
    threshold: torch.Tensor | float = 0.0,
    split: int | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """The weights in [0, 1] that attention gives to judged tokens; sinks weigh 1.

    logits: [batch, kv_heads, tokens]; valid: [batch, tokens]; spec: GateSpec; form: a relaxation's name or "hard".
    split: these tokens are a prompt whose flags act after it: its last `window` tokens are kept for good then, because
    nothing else shields them from later queries.
    """
    weight = relax(form, logits - threshold, spec.temperature, seed)
    kept = sink_tokens(valid, spec.sinks)
    if split is not None:
        n = valid.shape[1]
        kept = kept | (torch.arange(n, device=kept.device) >= n - spec.window)
    return weight.masked_fill(kept[:, None], 1.0)


def live_mask(q_slots: torch.Tensor, k_slots: torch.Tensor, flags: torch.Tensor, window: int) -> torch.Tensor:
    """The law as a mask: [batch, kv_heads, queries, keys]; flags [batch, kv_heads, keys]; causality is not its part."""
    return (q_slots[:, None] - k_slots < max(window, 1)) | flags[:, :, None]


def _forward(base: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    # `attention_mask` bears transformers' name: some models pass it by keyword.
    # Arguments as transformers' own functions have them, `dropout` too: who wraps them (kvpress) passes it by place.
    def attention(
        module: "SelfAttention",
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        *,
        scaling: float,
        gatekv: AttentionCall | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask, kwargs = attention_mask, {"dropout": dropout} | kwargs
        if gatekv is not None:
            if gatekv.answered:
                refuse(module, "calls attention more than once a layer")
            gatekv.answered = True
            check_call(module, k, v, kwargs)
            gatekv.prepare(k)
            q, k, v = map(gatekv.sequence.into, (q, k, v))
        if gatekv is None or gatekv.form in ("listen", "plain"):
            plain = ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward
            out, weights = plain(module, q, k, v, mask, scaling=scaling, **kwargs)
            if gatekv is not None and gatekv.form == "listen":
                hear = gatekv.listen if gatekv.lesson is None else gatekv.learn
                q, k, v = map(attended, (q, k, v))
                with without_autocast(q.device):
                    hear(module, q, k, v, visible_keys(module, mask), scaling, out)
            return (out if gatekv is None else gatekv.sequence.out_of(out)), weights
        weights = None
        if base == "eager" and (kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)):
            if gatekv.memory is None or not gatekv.memory.dense:
                raise ValueError(
                    "output_attentions: where tokens are evicted, or gates weigh them, there are no weights over all "
                    "of them: ask for attentions of a whole prompt under a policy that evicts behind it "
                    '(prefill="dense"), or without gatekv\'s cache.'
                )
            weights = sys.modules[type(module).__module__].eager_attention_forward(
                module, q, k, v, mask, scaling=scaling, **kwargs
            )[1]
        mask = visible_keys(module, mask)
        q, k, v = map(attended, (q, k, v))
        with without_autocast(q.device):
            if gatekv.form == "lesson":
                out = segments.merge(gatekv.remember(q, k, v, mask, scaling))[0].to(q.dtype)
            elif gatekv.memory is not None:
                out = gatekv.memory.attend(gatekv, q, k, v, mask, scaling)
            else:
                out = gatekv.parallel(q, k, v, mask, scaling)
        return gatekv.sequence.out_of(out.transpose(1, 2)).contiguous(), weights

    return attention


def register() -> None:
    """Make the implementations known to transformers: the mask function too, else padding is silently lost."""
    for base, name in NAMES.items():
        AttentionInterface.register(name, _forward(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
