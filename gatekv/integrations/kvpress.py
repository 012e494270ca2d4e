"""`GateKVPress`: trained gates as a press, so that kvpress's harness scores them beside its own methods.

kvpress prunes a transformers cache in hooks on `self_attn`, after a dense prefill. A transformers cache
makes a gated self_attn the model's own, so nothing evicts but the press.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

try:
    from kvpress import ScorerPress
except ImportError as error:
    raise ImportError(
        "gatekv.integrations.kvpress is for use with kvpress, which cannot be imported: pip install 'gatekv[interop]'."
    ) from error

from gatekv.attention import AttentionCall, Inputs, sink_tokens
from gatekv.cache.kvcache import KVCache
from gatekv.geometry import foreign_layers, geometry_of
from gatekv.modules import attention_layers, base_model, wrappers
from gatekv.passes import Observe
from gatekv.policies import Gate, View
from gatekv.policies.budgets import check_counts, ranked
from gatekv.policies.gate import OBSERVED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gatekv.support import SelfAttention


@dataclass(frozen=True, kw_only=True)
class Prefill(Observe):
    """One layer's prefill under a press: the plain answer, and, recorded beside it, the `View` that a scorer reads."""

    def observe(self, call: AttentionCall, module: "SelfAttention", x: Inputs, plain: torch.Tensor) -> None:
        """Shapes as in `Observe.observe`."""
        (q, k, v, _, scaling), valid = x, x.valid()
        if not valid.all():
            raise ValueError(
                "kvpress prunes all rows of a batch alike, real tokens and pads: feed rows of one length, or use "
                "gatekv.KVCache, which knows pads."
            )
        last = q[:, :, -OBSERVED:]
        call.record(
            View(k, v, last, valid, scaling, call.layer_idx, lambda: self.judge(call, valid)[0], None, call.sinks)
        )


@dataclass
class GateKVPress(ScorerPress):
    """Keeps what `gatekv.KVCache(model, "gate+uniform", 1 - compression_ratio, decode="keep")` keeps of a prompt.

    `with press(model)` and kvpress's pipeline take it as any press. Presses that wrap another one do not hand the model
    on, so that around these, and around kvpress's own on the same model, `with press.on(model)` is needed:

        with press.on(peft_model) as model:
            pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
            pipe(context, question=question, press=AdaKVPress(press))  # AdaKV(Gate(), floor="hard")

    Args:
        compression_ratio: share of the prompt that is pruned.
        observed: weight of what the prompt's last 32 queries attend to; 0: the gate alone (`gate_alone+uniform`).
        sinks, window: first and last tokens that are kept, inside the budget; None: as the adapter was trained.

    Raises:
        ValueError: on use, see `on`; in a forward: padded rows, a cache that is none or gatekv's own, a budget below
            sinks + window.
    """

    observed: float = Gate.observed
    sinks: int | None = None
    window: int | None = None
    model: object = field(default=None, init=False, repr=False, compare=False)  # inside `on`
    views: dict[int, View] = field(default_factory=dict, init=False, repr=False, compare=False)  # of the layer at hand

    @contextmanager
    def on(self, model: "PreTrainedModel") -> Iterator[nn.Module]:
        """Inside, presses work on a model with gatekv's gates; yields the transformers model that kvpress takes.

        model: the PEFT model, or the transformers model inside it. It is as before afterwards.

        Raises:
            ValueError: no gates in force, gates that fade, sliding-window layers, attention other than sdpa.
        """
        inner = base_model(model)
        gates = {w.layer_idx: (w.gate(), w.specs[name]) for w in wrappers(inner) if (name := w.active())}
        layers = attention_layers(inner)
        if len(gates) < len(layers):
            raise ValueError(
                f"GateKVPress needs a gate in every layer, and in this {type(inner).__name__} {len(gates)} of "
                f"{len(layers)} have one in force: load a gatekv adapter with peft.AutoPeftModelForCausalLM, or enable "
                "it."
            )
        if any(spec.relaxation == "decay" for _, spec in gates.values()):
            raise ValueError("gates whose tokens fade evict at every step, a press once: use gatekv.KVCache.")
        if any(geometry_of(module).latent for _, module in layers):
            raise ValueError(
                "kvpress prunes keys and values by head, and this model caches latents (MLA): use KVCache."
            )
        if any(foreign_layers(inner)):
            raise ValueError("kvpress takes layers with a sliding window, or a state, for whole ones: use KVCache.")
        if inner.config._attn_implementation != "sdpa":
            raise ValueError("kvpress masks single heads in sdpa only: load the model with attn_implementation='sdpa'.")

        views = self.views

        def prepare(module: "SelfAttention", args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            cache, hidden = kwargs.get("past_key_values"), kwargs["hidden_states"]
            if cache is None or isinstance(cache, KVCache):
                raise ValueError("a press prunes a cache of transformers' own: pass past_key_values=DynamicCache().")
            seen, new = cache.get_seq_length(module.layer_idx), hidden.shape[1]
            # kvpress asks for what transformers >= 5.4 does not hand to attention any more.
            kwargs.setdefault("cache_position", torch.arange(seen, seen + new, device=hidden.device))
            views.clear()  # the layer before has been pruned: its keys and values shall not outlive that
            if not seen:
                gate, spec = gates[module.layer_idx]
                rotary = kwargs.get("position_embeddings")
                call = AttentionCall(hidden, module.layer_idx, rotary, gate, spec, context=Prefill())
                call.record = partial(views.__setitem__, module.layer_idx)
                kwargs["gatekv"] = call
            return args, kwargs

        hooks = [m.register_forward_pre_hook(prepare, with_kwargs=True) for _, m in layers]
        self.model = inner
        try:
            yield inner
        finally:
            self.model = None
            views.clear()
            for hook in hooks:
                hook.remove()

    @contextmanager
    def __call__(self, model: "PreTrainedModel") -> Iterator[None]:
        """As every press's; model: as for `on`."""
        inner = base_model(model)
        with nullcontext() if self.model is inner else self.on(inner), super().__call__(inner):
            yield

    def post_init_from_model(self, model: "PreTrainedModel") -> None:
        """Called by the press in use, which may be another one around this."""
        if self.model is not base_model(model):
            raise ValueError("a press around a GateKVPress is used inside `with press.on(model)`, press the inner one.")

    def score(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """[batch, kv_heads, tokens] float32, higher keeps; what is kept in any case scores infinity."""
        view, spec = self.views[kwargs["gatekv"].layer_idx], kwargs["gatekv"].spec
        tokens = view.valid.shape[1]
        sinks = spec.sinks if self.sinks is None else self.sinks
        window = spec.window if self.window is None else self.window
        young = torch.arange(tokens, device=keys.device) >= tokens - window
        protected = (sink_tokens(view.valid, sinks) | young)[:, None]
        keep = 1 - self.compression_ratio
        check_counts((view.valid.sum(-1) * keep).long(), protected, keep, view.valid)
        return ranked(Gate(observed=self.observed).score(view), protected, view.valid)
