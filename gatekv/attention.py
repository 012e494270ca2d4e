"""The attention function and mask function registered with transformers, and the law they keep.

The law (one rule for training and inference): for query i and key j <= i in one KV head, j is live iff i - j <
max(window, 1), or flag[j] = keep (sinks are flagged). Training applies it as a weight, the cache by really evicting.
"""

import inspect
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from gatekv.config import GateSpec
from gatekv.gates.key_mlp import key_features
from gatekv.gates.relaxations import relax
from gatekv.latent import Latent, latent_of
from gatekv.less.maps import LessMaps
from gatekv.masks import whole_mask
from gatekv.ops.scale import Scale
from gatekv.ops.sequence import ALONE, Sequence
from gatekv.precision import attended, without_autocast
from gatekv.rotary import Probe, Rotary, rotary_of
from gatekv.support import LATER, Geometry, check_call, refuse, visible_keys

if TYPE_CHECKING:
    from gatekv.support import SelfAttention

logger = logging.get_logger(__name__)

# transformers' implementation -> what answers in a gated layer; INSTEAD of all others, with sdpa's numbers.
NAMES = {"sdpa": "gatekv", "eager": "gatekv_eager"}
INSTEAD = "gatekv_instead"


class Memory:
    """A cache layer that answers attention itself (gatekv.cache.layer.KVLayer); it hands new tokens through `update`.

    Attributes:
        dense: whether the tokens of the next call attend to all that came before them.
    """

    is_sliding = False
    dense = False

    def expect(self, new: int) -> None:
        """A self_attn that will ask for `attend` says so, before it hands `new` tokens through `update`.

        Raises:
            ValueError: the memory cannot go on.
        """

    def reader(self) -> "Memory":
        """Who answers a later layer that reads this one's keys and values."""
        raise NotImplementedError

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


class Inputs(NamedTuple):
    """What attention computes with.

    Attributes:
        q: [batch, heads, queries, head_dim]. k, v: [batch, kv_heads, tokens, head_dim].
        mask: [batch, 1, queries, tokens] bool, or None = causal. scaling: of the scores, a `Scale`, which knows a cap.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scaling: float

    def valid(self) -> torch.Tensor:
        """[batch, queries] bool: which of the new tokens are real."""
        return valid_tokens(self.mask, self.q.shape[0], self.q.shape[2], self.q.device)


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What a pass over whole sequences asks of every gated layer; its kinds are in `gatekv.passes`.

    Attributes:
        sequence: the processes that share the rows.
    """

    sequence: Sequence = ALONE

    @property
    def replaces(self) -> bool:
        """Whether the layer's output is another one than the model's own."""
        return False

    def concerns(self, call: "AttentionCall", past: Cache | None) -> bool:
        """Whether there is something to do in a layer; past: the forward's cache, which is not gatekv's.

        Raises:
            ValueError: what the context asks cannot be done behind these tokens.
        """
        return self.sequence.size > 1  # its heads and tokens have to change places

    def attend(self, call: "AttentionCall", x: Inputs) -> torch.Tensor:
        """[batch, heads, queries, head_dim]: the layer's output, where the context `replaces` it."""
        raise NotImplementedError

    def observe(self, call: "AttentionCall", module: "SelfAttention", x: Inputs, plain: torch.Tensor) -> None:
        """Record something beside the layer's own output, plain [batch, queries, heads, head_dim], which stays."""


@dataclass
class AttentionCall:
    """What a gated self_attn hands to the attention function, beside q, k, v.

    Attributes:
        hidden: [batch, tokens, hidden_size], the layer's input; from `prepare` on, what the gate reads. Where processes
            share rows, of this one's tokens.
        layer_idx: of the layer. rotary: `position_embeddings` of the new tokens as the layer was handed them, or None;
            `turning` says what they mean. module: the self_attn, once its attention function is called.
        gate: the gate in force or None; spec: its GateSpec. less: the low-rank maps in force, or None.
        memory: the gatekv cache layer, which answers; or None:
        context: what the pass over whole sequences asks (gatekv.passes); record: called with what was found.
        sinks: [heads], the layer's learned attention sinks, set by the attention function; or None.
        latent: of a layer that caches latents, what turns its queries; or None.
        silent: nobody will read the answer: tokens are taken in alone.
        follows: the keys and values are those of an earlier layer, whose index and spec these are, and so are flags.
        shared: what the model hands from layer to layer in this forward (`shared_kv_states`), or None.
        geometry: sizes of the layer, or None where nobody told them.
        answered: set by the attention function; a model that never calls it would go on without a word.
    """

    hidden: torch.Tensor
    layer_idx: int
    rotary: Rotary | tuple[torch.Tensor, torch.Tensor] | torch.Tensor | None = None
    gate: torch.nn.Module | None = None
    spec: GateSpec = LATER
    less: LessMaps | None = None
    memory: Memory | None = None
    context: PassContext = LATER
    geometry: Geometry | None = None
    sinks: torch.Tensor | None = None
    latent: Latent | None = None
    silent: bool = False
    follows: bool = False
    shared: MutableMapping[str, Any] | None = None
    record: Callable[[object], None] = LATER
    answered: bool = False
    module: "SelfAttention | None" = None

    def prepare(self, k: torch.Tensor) -> None:
        """From here on `hidden` is what the gate reads: the layer's input, or the new keys k [B, K, Q, D]."""
        if self.gate is not None and self.gate.reads == "keys":
            self.hidden = key_features(k, self.turning())

    def turning(self, strict: bool = True) -> Rotary | None:
        """How RoPE turns the new tokens in this layer; None: the layer is handed no positions.

        strict: raise where it is not known, too; else None.

        Raises:
            ValueError: the layer turns them in a way that is not known here.
        """
        if self.rotary is not None and not isinstance(self.rotary, Rotary):
            try:
                self.rotary = rotary_of(self.module, self.rotary)
            except ValueError:
                if strict:
                    raise
                return None
        return self.rotary

    def columns(self, of: Callable[[torch.Tensor], torch.Tensor]) -> "AttentionCall":
        """The call of some of the new tokens, or all in another order: `of` tells which from a tensor [batch or 1,
        tokens, ...]."""
        rotary = self.rotary
        if isinstance(rotary, Rotary):
            rotary = rotary.columns(of)
        elif rotary is not None:
            rotary = of(rotary) if isinstance(rotary, torch.Tensor) else (of(rotary[0]), of(rotary[1]))
        return replace(self, hidden=of(self.hidden), rotary=rotary)

    @property
    def replaces(self) -> bool:
        """Whether the layer's output is another one than the model's own."""
        return self.memory is not None or self.context.replaces


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


def name_of(implementation: str | None) -> str:
    """The name of gatekv's attention function in the gated layers of a model of that attention implementation.

    Raises:
        ValueError: transformers makes no masks for it, so that pads would be taken for tokens.
    """
    if implementation in NAMES:
        return NAMES[implementation]
    if implementation is None or implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attention implementation {implementation!r} has no mask function, so gatekv could not tell pads from "
            "tokens: call model.set_attn_implementation('sdpa'), or register one with transformers' "
            "AttentionMaskInterface."
        )
    logger.warning_once(
        f"gatekv's attention answers in gated layers instead of {implementation}, whose result it cannot weigh; other "
        "layers, and calls with other caches, keep it."
    )
    return INSTEAD


def _forward(base: str, instead: bool = False) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
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
        gatekv: AttentionCall | Probe | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kwargs, given = {"dropout": dropout} | kwargs, (q, k, v)

        def own() -> tuple[torch.Tensor, torch.Tensor | None]:
            return _function(base, module)(module, *given, attention_mask, scaling=scaling, **kwargs)

        call = gatekv
        if call is None:
            return own()
        if isinstance(call, Probe):
            call.see(q, k)
        if call.answered:
            refuse(module, "calls attention more than once a layer")
        call.answered, call.module = True, module
        tiles = tiles_of(k, call.geometry)
        q, k, v = untiled(q, tiles), k[:, : k.shape[1] // tiles], v[:, : v.shape[1] // tiles]
        check_call(module, k, v, kwargs, call.geometry)
        call.prepare(k)
        call.sinks, cap = kwargs.get("s_aux"), kwargs.get("softcap")
        scaling = Scale(scaling, cap if cap is None or instead or _caps(_function(base, module)) else None)
        sequence = ALONE if call.memory is not None else call.context.sequence
        q, k, v = map(sequence.into, (q, k, v))
        given = given if sequence.size == 1 else (q, k, v)
        if instead:
            keys = None if call.memory is not None else k.shape[2]
            attention_mask = whole_mask(module, attention_mask, q, keys, kwargs.get("position_ids"))
        weights = None
        if not call.replaces:
            out, weights = own()
        elif base == "eager" and (kwargs.get("output_attentions") or getattr(module.config, "output_attentions", 0)):
            if call.memory is None or not call.memory.dense:
                raise ValueError(
                    "output_attentions: where tokens are evicted, or gates weigh them, there are no weights over all "
                    "of them: ask for attentions of a whole prompt under a policy that evicts behind it "
                    '(prefill="dense"), or without gatekv\'s cache.'
                )
            weights = own()[1]
        mask = visible_keys(module, attention_mask)
        q, k, v = map(attended, (q, k, v))
        with without_autocast(q.device):
            if not call.replaces:
                plain = untiled(out.transpose(1, 2), tiles).transpose(1, 2)
                call.context.observe(call, module, Inputs(q, k, v, mask, scaling), plain)
                return sequence.out_of(out), weights
            if call.memory is not None:
                call.latent = latent_of(module, k, lambda: own()[0].transpose(1, 2))
                out = call.memory.attend(call, q, k, v, mask, scaling)
            else:
                out = call.context.attend(call, Inputs(q, k, v, mask, scaling))
        return sequence.out_of(tiled(out, tiles).transpose(1, 2)).contiguous(), weights

    return attention


def _function(base: str, module: "SelfAttention") -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """transformers' own attention function: of all models, or of the module's modelling file."""
    return ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward


def _caps(function: Callable[..., Any]) -> bool:
    """Whether a function looks at `softcap`: sdpa's passes over it in older transformers, and so do we then."""
    code = inspect.unwrap(function).__code__
    return "softcap" in (*code.co_varnames, *code.co_consts)


def tiles_of(k: torch.Tensor, geometry: Geometry | None) -> int:
    """How often the KV heads that are cached stand behind each other in k [batch, heads, tokens, head_dim]: JetMoe
    repeats them as a whole, so that query heads which read one KV head do not stand together."""
    if geometry is None or geometry.latent or k.shape[1] in (0, geometry.kv_heads) or k.shape[1] != geometry.heads:
        return 1
    times, rest = divmod(k.shape[1], geometry.kv_heads)
    parts = k.unflatten(1, (-1, geometry.kv_heads)) if not rest else k[:, :, None]
    return times if not rest and torch.equal(parts[:, 0], parts[:, -1]) else 1


def untiled(x: torch.Tensor, tiles: int) -> torch.Tensor:
    """Heads of x [batch, heads, ...] in the order in which those of one KV head stand together."""
    return x if tiles == 1 else x.unflatten(1, (tiles, -1)).transpose(1, 2).flatten(1, 2)


def tiled(x: torch.Tensor, tiles: int) -> torch.Tensor:
    """The way back."""
    return x if tiles == 1 else x.unflatten(1, (-1, tiles)).transpose(1, 2).flatten(1, 2)


def register() -> None:
    """Make the implementations known to transformers: the mask function too, else padding is silently lost."""
    for base, name in NAMES.items():
        AttentionInterface.register(name, _forward(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    AttentionInterface.register(INSTEAD, _forward("sdpa", instead=True))
    AttentionMaskInterface.register(INSTEAD, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
