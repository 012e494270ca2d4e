"""`KVCache`: a transformers cache from which tokens really leave."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import LinearAttentionLayer

from gatekv.cache import refusals, storage
from gatekv.cache.config import CacheConfig
from gatekv.cache.hybrid import HybridKVLayer, States, Steps
from gatekv.cache.latents import LatentKVLayer
from gatekv.cache.layer import KVLayer
from gatekv.cache.ranking import adopt
from gatekv.cache.segments.foreign import Foreign
from gatekv.cache.settings import config_of
from gatekv.cache.siblings import Siblings
from gatekv.geometry import cache_layers, readers_of
from gatekv.modules import attach, base_model, wrappers
from gatekv.policies import Full, Policy, Scorer
from gatekv.policies.scorer import ALL
from gatekv.support import shallow


def distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage once, whole even where a tensor views a part of it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


class KVCache(States):
    """Pass it as `past_key_values` to `generate` or to the model; it evicts in prefill and while decoding.

    Args:
        model: a transformers or PEFT model; its self_attn are gated in place (`gatekv.detach` undoes it).
        policy: a name like "gate", "gate+global", "snapkv+ada", a scorer object, or None: the adapter's gate if there
            is one, else "full".
        budget: what a KV head holds on average of each row's real prompt tokens, sinks and window inside it: a share
            in (0, 1], or a number of tokens above 1, as 512; 1 and 1.0 are all. A prompt of fewer tokens is held whole.
            None: a gate's own threshold.
        prefill: "dense": the prompt attends to all of itself and flags act after it; "sparse": a gate's flags act
            inside the prompt too. Default: sparse for threshold gates, dense otherwise.
        decode: "evict": tokens that follow the prompt are judged too: by a gate one by one, by policies that stream
            (H2O, TOVA, StreamingLLM, L2) within a buffer of the size the prompt left; "keep": they all stay. Default:
            what the policy's paper does.
        sinks, window: protected tokens; default: as the adapter was trained, or what the scorer's paper protects.
        prompt_tokens: length of the prompt as fed, for prompts that arrive in several calls (`prefill_chunk_size`).
        turns: tokens after the prompt stay until `compress` applies the budget to them, turn by turn.
        block_size: tokens in a page of the storage.
        strict: refuse a prompt whose budget is below what the policy protects. Without it such a row is held whole (by
            a threshold that evicts as tokens come, and knows no end of the prompt: its sinks and window), a budget that
            layers left whole cost alone leaves the others what is protected, and `memory()` counts these rows.
        kinds: [batch, prompt] integers that say what each token is, `fastgen.token_kinds(tokenizer)[input_ids]`, for
            FastGen; without them it knows its sinks for special tokens and no punctuation.
        dtype: of what is held, as torch.bfloat16 or its name; None: the model's.
        backend: of paged attention: "torch", "triton", "flash"; None = the best that can run; `print(cache)` names it.

    Raises:
        ValueError: unknown policy, prefill or backend, impossible budget, a gate without an adapter or calibration; in
            use `gatekv.policies.budgets.BudgetError`, a ValueError, see strict.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy | Scorer | str | None = None,
        budget: float | int | None = None,
        *,
        prefill: str | None = None,
        decode: str | None = None,
        sinks: int | None = None,
        window: int | None = None,
        prompt_tokens: int | None = None,
        turns: bool = False,
        block_size: int = 16,
        dtype: torch.dtype | str | None = None,
        backend: str | None = None,
        kinds: torch.Tensor | None = None,
        strict: bool = False,
    ) -> None:
        attach(model)
        self.model = model
        self._build(
            config_of(
                model, policy, budget, prefill=prefill, decode=decode, sinks=sinks, window=window,
                prompt_tokens=prompt_tokens, turns=turns, block_size=block_size, dtype=dtype, backend=backend,
                kinds=kinds, strict=strict,
            )
        )  # fmt: skip

    def _build(self, settings: CacheConfig) -> None:
        """Our layers where the model has full attention; transformers' own where a sliding window bounds them."""
        if any(w.geometry.latent for w in wrappers(self.model)):
            refusals.check_latent(settings)
        self.config, config = settings, base_model(self.model).config.get_text_config(decoder=True)
        # Up to here Phi-3's generate would put another cache in our place, whatever its rotation.
        self._replaced_until = getattr(config, "original_max_position_embeddings", 0) or 0
        layers, readers = cache_layers(base_model(self.model)), readers_of(base_model(self.model))
        for w in wrappers(self.model):
            own = layers[w.layer_idx]
            if isinstance(own, LinearAttentionLayer):
                layers[w.layer_idx] = HybridKVLayer(settings, w.layer_idx, own.number_of_states)
            elif w.geometry.latent:
                layers[w.layer_idx] = LatentKVLayer(settings, w.layer_idx, w.geometry.value_dim)
            else:
                layers[w.layer_idx] = KVLayer(settings, w.layer_idx)
            layers[w.layer_idx].readers = sum(source == w.layer_idx for source in readers.values())
        super().__init__(layers=layers)
        self._steps = Steps()
        self._introduce()

    def _introduce(self) -> None:
        """Make the layers known to each other."""
        others = [(i, layer) for i, layer in enumerate(self.layers) if not isinstance(layer, KVLayer)]
        siblings = Siblings(self.evicting(), [(i, o) for i, o in others if Foreign(o).attends], self._steps)
        for layer in self.evicting():
            layer.siblings = siblings

    @classmethod
    def undecided(cls, model: nn.Module, queries: int = ALL, dtype: torch.dtype | str | None = None) -> "KVCache":
        """A cache that watches one dense prefill and evicts nothing, so that many policies can share it by `decide`.

        queries: how many of the last queries to remember for scorers that look at them. dtype: as for `KVCache`.
        """
        cache = cls(model, Full(queries=queries), dtype=dtype)
        cache._build(replace(cache.config, defer=True))
        return cache

    def decide(
        self, policy: Policy | Scorer | str | None, budget: float | int | None = None, **kwargs: Any
    ) -> "KVCache":
        """A new cache: this undecided one's prompt, compressed under a policy (arguments as for `KVCache`).

        Scores are computed once for all budgets and rules under which they are asked for.
        """
        if not self.config.defer:
            raise ValueError("decide() needs a cache made by KVCache.undecided(model), after its prompt was read.")
        cache = KVCache(self.model, policy, budget, prefill="dense", dtype=self.config.dtype, **kwargs)
        wanted = cache.config.queries
        if min(wanted, self.get_seq_length()) > self.config.policy.scorer.queries:
            raise ValueError(f"this policy looks at {wanted} queries: use KVCache.undecided(model, queries={wanted}).")
        parts = {w.layer_idx: (w.gate(), w.less()) for w in wrappers(self.model)}
        for mine, theirs in zip(cache.evicting(), self.evicting()):
            adopt(mine, theirs, *parts[mine.layer_idx])
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, KVLayer):
                cache.layers[i] = Foreign(layer).fork().layer
            elif isinstance(layer, HybridKVLayer):
                cast(HybridKVLayer, cache.layers[i]).state = layer.state.fork()
        cache._introduce()
        for layer in cache.evicting():
            layer.evictor.on_prompt_end(layer)
        for layer in cache.evicting():
            layer.evidence.known = None  # what it sees from here on is its own
        return cache

    def compress(self) -> None:
        """End the turn: of the tokens fed since the last decision, keep `budget` (sinks and window as for a prompt).

        Earlier decisions stand. Raises ValueError without `turns=True`; a turn too short for its budget is as such a
        prompt: it stays whole, or raises BudgetError in a strict cache.
        """
        if not self.config.turns:
            raise ValueError("compress() needs KVCache(…, turns=True), which keeps what a later decision looks at.")
        for layer in self.evicting():
            if not (layer.decided and layer.stage.whole) or layer.seen == layer.base:
                raise ValueError("nothing has been fed since the last decision: feed the turn first, then compress().")
        for layer in self.evicting():
            layer.evictor.on_prompt_end(layer)

    def snapshot(self) -> "KVCache":
        """An independent copy that shares storage until either side changes: several questions over one context."""
        twin = shallow(self)
        twin.layers = [
            layer.fork() if isinstance(layer, KVLayer) else Foreign(layer).fork().layer for layer in self.layers
        ]
        twin._steps = self._steps.fork()
        twin._introduce()
        return twin

    def __bool__(self) -> bool:
        """False where a model asks whether there is a cache in order to drop it: Phi-3's, while what was seen is within
        `original_max_position_embeddings`. What it does so for, another rotation of keys, is refused in the call."""
        return not self._replaced_until or self.get_seq_length() > self._replaced_until

    __copy__ = shallow

    def __deepcopy__(self, memo: dict) -> "KVCache":
        """A snapshot: the model is shared, as by every cache of it."""
        return self.snapshot()

    def __getstate__(self) -> dict:
        """What pickle takes: no model, gate or map. Give what is read back its model: `cache.model = model`."""
        refusals.check_whole(self.evicting()[0])
        return vars(self.snapshot()) | {"model": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._introduce()

    def restore(self, snapshot: "KVCache") -> None:
        """Become again what `snapshot` holds; the snapshot stays usable."""
        vars(self).update(vars(snapshot.snapshot()))

    def save(self, path: str) -> None:
        """Write the compressed cache to one safetensors file, so that a prompt is compressed once and reused."""
        storage.save(self, path)

    @classmethod
    def load(cls, path: str, model: nn.Module, backend: str | None = None) -> "KVCache":
        """Read a cache that `save` wrote, for the same model and adapter.

        Raises:
            FileNotFoundError, ValueError: no such file, another model or adapter, a missing or mis-shaped tensor.
        """
        return storage.load(cls, path, model, backend)

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        self._build(self.config)

    def flags(self) -> list[torch.Tensor]:
        """What is still held: per evicting layer [batch, kv_heads, tokens seen] bool.

        Raises:
            ValueError: nothing has been fed yet.
        """
        return [bits[..., 0] > 0 for bits in self.bits()]

    def bits(self) -> list[torch.Tensor]:
        """Per evicting layer [batch, kv_heads, tokens seen, 2] uint8: bits a number of each token's key and value as
        they are held; 16: as they came, 0: not at all. Errors as for `flags`."""
        if not all(layer.is_initialized for layer in self.evicting()):
            raise ValueError("this cache has seen no token yet, so it holds none: feed the prompt first.")
        return [layer.stage.bits(layer) for layer in self.evicting()]

    def memory(self) -> dict[str, float]:
        """Bytes of every storage held ("bytes"), of a full cache of the same real tokens ("full_bytes"), their "ratio".

        The same of the layers that gatekv holds alone: "gated_bytes", "gated_full_bytes", "gated_ratio"; the others
        have a sliding window, or a state. "whole_rows": rows whose prompt, or last turn, was too short for the budget
        and is held whole (see strict).
        """
        held, full, gated, gated_full = 0, 0, 0, 0
        for layer in cast("list[Any]", self.layers):
            if isinstance(layer, KVLayer):
                if layer.is_initialized:
                    other = distinct_bytes(layer.state.tensors() if isinstance(layer, HybridKVLayer) else [])
                    held, full = held + other, full + other
                    keys, values = layer.window.stored
                    token = keys.shape[1] * (keys.shape[3] + values.shape[3]) * keys.element_size()
                    gated += distinct_bytes(layer.tensors()) - other
                    gated_full += int(layer.real.sum()) * token
            else:
                other = distinct_bytes(Foreign(layer).tensors())
                held, full = held + other, full + other
        unmet = next((layer.unmet for layer in self.evicting()), None)
        held, full = held + gated, full + gated_full
        return {
            "bytes": held,
            "full_bytes": full,
            "ratio": held / full if full else 0.0,
            "whole_rows": 0 if unmet is None else int(unmet.sum()),
            "gated_bytes": gated,
            "gated_full_bytes": gated_full,
            "gated_ratio": gated / gated_full if gated_full else 0.0,
        }

    def __repr__(self) -> str:
        p = self.config
        size = self.memory()
        short = f", {size['whole_rows']} rows too short for the budget held whole" if size["whole_rows"] else ""
        backend = next(
            (layer.store.pages.backend for layer in self.evicting() if layer.is_initialized), p.backend or "auto"
        )
        return (
            f"KVCache({p.policy}, budget={p.policy.budget}, "
            f"prefill={'dense' if p.dense_prefill else 'sparse'}, sinks={p.sinks}, window={p.window}, "
            f"block_size={p.block_size}, backend={backend}, "
            f"seen={self.get_seq_length()}, bytes={size['bytes']}, ratio={size['ratio']:.3f}{short})"
        )


@torch.no_grad()
def flags(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    policy: Policy | Scorer | str | None = None,
    budget: float | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Which tokens of a prompt a policy keeps, without generating anything.

    input_ids, attention_mask: [batch, tokens], pads on the left; policy, budget and more: see `KVCache`, errors too.
    Returns [layers, batch, kv_heads, tokens] bool, full-attention layers only; pads are False.
    """
    cache = KVCache(model, policy, budget, **kwargs)
    model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, logits_to_keep=1)
    return torch.stack(cache.flags())
