"""What a pass over whole sequences asks of the gated layers: a frozen `PassContext`, one class for each question.

`gatekv.modules.gated_pass(model, context)` puts one in force. Without one, gates apply in training mode with the
relaxation that they were made with (`Relaxed()`), and outside it the model is its plain self.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from gatekv.attention import AttentionCall, Inputs, PassContext, relaxed_flags
from gatekv.gates.documents import Documents
from gatekv.gates.relaxations import logit_of
from gatekv.geometry import output_projection
from gatekv.less.maps import Waiting
from gatekv.ops import segments
from gatekv.ops.gated_attention import BLOCK, gated_attention, received_attention
from gatekv.ops.learned_sinks import with_sinks
from gatekv.ops.naive import causal_mask, dense_segment
from gatekv.ops.on_the_spot import on_the_spot
from gatekv.ops.remainder import left_of
from gatekv.ops.sequence import ALONE, Sequence
from gatekv.precision import weight_dtype, wide

if TYPE_CHECKING:
    from gatekv.support import SelfAttention

Threshold = torch.Tensor | float
SAID = "gatekv"  # where the last gate's logits stand for the layers that read its layer's keys and values


class GateOutput(NamedTuple):
    """What a gate said in a pass without a gatekv cache. With a split, about the prompt alone.

    Attributes:
        logits: [batch, kv_heads, tokens] in at least float32; of packed rows, [documents, …].
        valid: [batch, tokens] bool, False at pads.
        received: [batch, kv_heads, tokens], the most attention a token gets later, or None.
        error: scalar, how far evicting moves this layer's output, or None.
    """

    logits: torch.Tensor
    valid: torch.Tensor
    received: torch.Tensor | None = None
    error: torch.Tensor | None = None


class LayerError(NamedTuple):
    """How far evicting moves a layer's output: shares of the output's square.

    Attributes:
        error: scalar, with a low-rank remainder; its gradient reaches the maps. alone: scalar, without a remainder.
    """

    error: torch.Tensor
    alone: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Plain(PassContext):
    """The model answers as if it had no gates, in training mode too: the teacher, with no second copy."""


@dataclass(frozen=True, kw_only=True)
class _Judging(PassContext):
    """A pass in which gates judge tokens.

    Attributes:
        split: the prompt's length as fed, pads included, for flags that act after it (one-shot); None: they act as
            tokens leave the window.
        documents: of packed rows, which are judged one by one.
        seed: of the gumbel relaxation's noise; each layer has its own.
    """

    split: int | None = None
    documents: Documents | None = None
    seed: int | None = None

    def noise_seed(self, layer_idx: int) -> int | None:
        """Of one layer."""
        return None if self.seed is None else self.seed * 1009 + layer_idx

    def judge(self, call: AttentionCall, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [batch, kv_heads, tokens], valid [batch, tokens]) of the sequence, or of its prompt where there is a
        split; of each document, where rows are packed."""
        assert call.gate is not None
        if self.sequence.size > 1:  # each process judges its own tokens; the gate looks at no others
            logits = self.sequence.into(call.gate(call.hidden, self.sequence.part(valid, 1))[0])
            apart = self.documents
            return (logits, valid) if apart is None else (apart.apart(logits, 2), apart.valid.to(logits.device))
        if self.documents is not None:
            valid = self.documents.valid.to(call.hidden.device)
            return call.gate(self.documents.apart(call.hidden), valid)[0], valid
        valid = valid[:, : self.split]
        return call.gate(call.hidden[:, : self.split], valid)[0], valid

    def weigh(
        self, call: AttentionCall, said: GateOutput, form: str, threshold: Threshold, k: torch.Tensor
    ) -> torch.Tensor:
        """[batch, kv_heads, tokens]: the relaxed flags of all tokens, keys k [batch, kv_heads, tokens, head_dim]; what
        follows a split is kept."""
        seed = self.noise_seed(call.layer_idx)
        weight = relaxed_flags(
            said.logits, said.valid, call.spec, form=form, threshold=threshold, split=self.split, seed=seed
        )
        if self.documents is not None:
            weight = self.documents.together(weight, 2)
        else:
            weight = torch.nn.functional.pad(weight, (0, k.shape[2] - said.logits.shape[-1]), value=1.0)
        return weight.expand(-1, k.shape[1], -1) if weight.shape[1] == 1 else weight  # of latents, one for all heads


@dataclass(frozen=True, kw_only=True)
class Observe(_Judging):
    """The plain output; gates judge what they see, and their logits have a gradient. Each layer records a `GateOutput`.

    Attributes:
        received: measure the attention that tokens receive too.
        local: (logits, valid) -> threshold on the logits: measure the layer's own error at it too.
    """

    received: bool = False
    local: Callable[[torch.Tensor, torch.Tensor], Threshold] | None = None

    def concerns(self, call: AttentionCall, past: Cache | None) -> bool:
        """Every layer with a gate."""
        return call.gate is not None

    def observe(self, call: AttentionCall, module: "SelfAttention", x: Inputs, plain: torch.Tensor) -> None:
        """Record what the gate says, and what attention each token really receives."""
        (q, k, v, mask, scaling), valid = x, x.valid()
        call.hidden = call.hidden.detach()
        with torch.enable_grad():
            said = GateOutput(*self.judge(call, valid))
        if self.received:
            window, own = call.spec.window, call.sinks
            got = received_attention(q, k, window=window, scale=scaling, mask=mask, sinks=own)[..., : self.split]
            if got.shape[1] > said.logits.shape[1]:  # all heads read one latent
                got = got.amax(1, keepdim=True)
            said = said._replace(received=got if self.documents is None else self.documents.apart(got, 2))
        if self.local is not None:
            asking = slice(self.split or 0, None)
            with torch.enable_grad():
                threshold = self.local(said.logits, said.valid)
                weight = self.weigh(call, said, call.spec.relaxation, threshold, k)
                out = gated_attention(
                    q[:, :, asking], k, v, weight, window=call.spec.window, scale=scaling,
                    mask=None if mask is None else mask[:, :, asking], decay=call.spec.relaxation == "decay",
                    sinks=call.sinks,
                ).transpose(1, 2)  # fmt: skip
                real = valid if self.documents is None else self.documents.real.to(q.device)
                error = output_error(module, out, plain[:, asking], real[:, asking], self.sequence)
            said = said._replace(error=error)
        call.record(said)


@dataclass(frozen=True, kw_only=True)
class Relaxed(_Judging):
    """Gates apply as a mask over whole sequences: the form that is trained. Each layer records a `GateOutput`.

    Attributes:
        form: a relaxation's name, or "hard" for the flags that are deployed; None: the relaxation of the gates' own.
        threshold: on the logits: a number, or by layer index a number or [batch, kv_heads, tokens]; None: the gates'
            own tau.
    """

    form: str | None = None
    threshold: float | Mapping[int, Threshold] | None = None

    @property
    def replaces(self) -> bool:
        """It does."""
        return True

    def concerns(self, call: AttentionCall, past: Cache | None) -> bool:
        """Every layer with a gate, and the sequence's first tokens with them."""
        # A training forward makes itself a DynamicCache (use_cache=True is the default): an empty one is none.
        seen = past.get_seq_length(call.layer_idx) if call.gate is not None and past is not None else 0
        if seen:
            raise ValueError(
                "gates that train, or gatekv.parallel, apply to whole sequences, and this forward has "
                f"{seen} tokens in its {type(past).__name__}: feed the sequence in one call; to generate, call "
                "model.eval() and pass past_key_values=gatekv.KVCache(model)."
            )
        return call.gate is not None or call.follows

    def attend(self, call: AttentionCall, x: Inputs) -> torch.Tensor:
        """One pass over whole sequences with the gates as weights."""
        (q, k, v, mask, scaling), valid = x, x.valid()
        if call.follows:
            said = GateOutput(*cast("MutableMapping", call.shared)[SAID])
        else:
            said = GateOutput(*self.judge(call, valid))
            call.record(said)
            if call.shared is not None:
                call.shared[SAID] = said.logits, said.valid
        weight = self.weigh(call, said, self.form or call.spec.relaxation, self.threshold_of(call), k)
        # A prompt's flags may act for its own queries too, though all of them were set at its end.
        whole = self.split is None or call.spec.context == "prompt" and call.spec.mask_prompt
        n, prompt = q.shape[2], 0 if whole else self.split or 0
        outs = [
            gated_attention(
                q[:, :, a:c], k[:, :, :c], v[:, :, :c], g[..., :c], window=call.spec.window, scale=scaling,
                mask=None if mask is None else mask[:, :, a:c, :c], decay=call.spec.relaxation == "decay",
                sinks=call.sinks,
            )
            for a, c, g in ((0, prompt, torch.ones_like(weight)), (prompt, n, weight)) if c > a
        ]  # fmt: skip
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def threshold_of(self, call: AttentionCall) -> Threshold:
        """On a layer's logits."""
        if self.threshold is None:
            return logit_of(call.spec.threshold)
        return self.threshold[call.layer_idx] if isinstance(self.threshold, Mapping) else self.threshold


@dataclass(frozen=True, kw_only=True)
class Remainder(PassContext):
    """Behind a cached prompt: what is kept of it, and the rest in the low-rank state; differentiable.

    Attributes:
        kept: layer index -> [batch, kv_heads, prompt] bool, what is kept; the new tokens follow the prompt.
    """

    kept: Mapping[int, torch.Tensor]

    @property
    def replaces(self) -> bool:
        """It does."""
        return True

    def concerns(self, call: AttentionCall, past: Cache | None) -> bool:
        """Every layer that keeps a part of the prompt."""
        return call.layer_idx in self.kept

    def attend(self, call: AttentionCall, x: Inputs) -> torch.Tensor:
        """What is kept and the state, merged."""
        return with_sinks(segments.merge(self.answers(call, x)), call.sinks)[0].to(x.q.dtype)

    def answers(self, call: AttentionCall, x: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[what is kept, the remainder], each (output, log-sum-exp), for the queries behind the prompt."""
        assert call.less is not None
        q, k, v, mask, scaling = x
        flags = self.kept[call.layer_idx]
        prompt, n = flags.shape[-1], k.shape[2]
        flags = torch.nn.functional.pad(flags, (0, n - prompt), value=True)
        seen = causal_mask(q.shape[2], n, q.device)[None, None] if mask is None else mask
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        segment = dense_segment if learns else segments.dense_segment  # the fast one writes in place
        blocks = [slice(a, a + BLOCK) for a in range(0, q.shape[2], BLOCK)]  # never all queries by all keys at once

        def block(i: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return segment(q[:, :, i], k, v, flags[:, :, None] & seen[:, :, i], scaling)

        answers = [checkpoint(block, i, use_reentrant=False) if learns else block(i) for i in blocks]
        kept = torch.cat([out for out, _ in answers], 2), torch.cat([lse for _, lse in answers], 2)
        waiting = Waiting(call.less.psi(k), k, v, left_of(flags, 0, prompt), mask)
        return [kept, *call.less.answer(q, scaling, None, waiting)]


@dataclass(frozen=True, kw_only=True)
class RemainderError(Remainder):
    """The plain output; each layer records a `LayerError`, so that maps learn layer by layer (LESS, §3.2)."""

    @property
    def replaces(self) -> bool:
        """It does not."""
        return False

    def observe(self, call: AttentionCall, module: "SelfAttention", x: Inputs, plain: torch.Tensor) -> None:
        """Record the layer's own error; gradients reach the low-rank maps and nothing else."""
        valid, frozen = x.valid(), x._replace(q=x.q.detach(), k=x.k.detach(), v=x.v.detach())
        with torch.enable_grad():
            kept, far = self.answers(call, frozen)
            out = with_sinks(segments.merge([kept, far]), call.sinks)[0]
            error = output_error(module, out.transpose(1, 2), plain, valid)
        alone = with_sinks(kept, call.sinks)[0]
        call.record(LayerError(error, output_error(module, alone.transpose(1, 2), plain, valid)))


def output_error(
    module: "SelfAttention", out: torch.Tensor, plain: torch.Tensor, valid: torch.Tensor, sequence: Sequence = ALONE
) -> torch.Tensor:
    """Squared error of a layer's attention output after its output projection, as a share of the output's own square.

    out, plain: [batch, tokens, heads, head_dim]; valid: [batch, tokens]. Mean per row, then over rows. sequence: the
    processes that share the rows, each with some of the heads.
    """
    out, plain, valid = sequence.out_of(out), sequence.out_of(plain), sequence.part(valid, 1)
    last = output_projection(module)
    kind = weight_dtype(last, plain.dtype)
    project = lambda t: wide(last(t.flatten(2).to(kind))) * valid[..., None]  # noqa: E731
    size = sequence.mean(project(plain.detach()).square().sum((1, 2))).clamp_min(1e-6)
    return on_the_spot(lambda x: (project(x).square().sum((1, 2)) / size).mean(), out - plain.detach())
