"""`KVCache`: a transformers cache from which tokens really leave."""

import copy
from dataclasses import replace

import torch
from transformers import Cache, DynamicCache
from transformers.utils import logging

from gatekv.cache import storage
from gatekv.cache.decision import Decision
from gatekv.cache.layer import KVLayer, Phase
from gatekv.cache.plan import Plan
from gatekv.config import GateSpec, check_choice
from gatekv.gates.relaxations import logit_of
from gatekv.modules import attach, base_model, gate_spec, wrappers
from gatekv.ops.backends import BACKENDS
from gatekv.policies import Full, Gate, resolve
from gatekv.policies.budgets import Decay, Threshold
from gatekv.policies.scorer import ALL

DEFAULT = GateSpec()
logger = logging.get_logger(__name__)


def distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage once, whole even where a tensor views a part of it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def _warn_of_other_training(spec, policy) -> None:
    """Low-rank maps work under any policy; they were trained for one."""
    if spec.less_policy is None:
        return
    trained, used = resolve(spec.less_policy, spec.less_budget), replace(policy, remainder=None)
    if str(trained) != str(used) or trained.ratio != used.ratio:
        logger.warning_once(
            f"gatekv: these low-rank maps were trained for {trained} at budget {trained.ratio}, not for {used} at "
            f"{used.ratio}; measure before relying on it."
        )


class KVCache(Cache):
    """Pass it as `past_key_values` to `generate` or to the model; it evicts in prefill and while decoding.

    Args:
        model: a transformers or PEFT model; gets gatekv's wrappers if it has none (`gatekv.detach` undoes it).
        policy: a name like "gate", "gate+global", "snapkv+ada", a scorer object, or None: the adapter's gate if there
            is one, else "full".
        budget: share of each row's real prompt tokens that a KV head holds on average, sinks and window inside it.
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
        backend: of paged attention: "torch", "triton", "flash"; None = the best that can run; `print(cache)` names it.

    Raises:
        ValueError: unknown policy, prefill or backend, impossible budget, a gate without an adapter or calibration.
    """

    def __init__(
        self,
        model,
        policy=None,
        budget: float | None = None,
        *,
        prefill: str | None = None,
        decode: str | None = None,
        sinks: int | None = None,
        window: int | None = None,
        prompt_tokens: int | None = None,
        turns: bool = False,
        block_size: int = 16,
        backend: str | None = None,
    ):
        attach(model)
        self.model = model
        active = [w for w in wrappers(model) if w.active()]
        spec = gate_spec(model) or DEFAULT
        policy = resolve(policy if policy is not None else ("gate" if active else "full"), budget)
        learned, streaming = isinstance(policy.scorer, Gate), isinstance(policy.rule, Threshold)
        if learned and not active:
            raise ValueError("policy 'gate' needs an adapter with gates: load one with peft.PeftModel.from_pretrained.")
        whole = learned and spec.context == "prompt"
        if whole:  # everything was judged when the prompt ended; what follows stays
            decode = decode or "keep"
            prefill = prefill or ("sparse" if streaming and spec.mask_prompt else "dense")
        prefill = prefill or ("sparse" if streaming else "dense")
        check_choice("prefill", prefill, ("dense", "sparse"))
        decode = decode or policy.scorer.decode
        check_choice("decode", decode, ("evict", "keep"))
        if decode == "evict" and (whole or not policy.scorer.streams):
            what = "a gate that reads the whole prompt" if whole else type(policy.scorer).__name__
            raise ValueError(f"decode='evict': {what} decides once, at the prompt's end; leave decode out.")
        if block_size < 1:
            raise ValueError(f"block_size is the number of tokens in a page, at least 1; got {block_size}.")
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        if turns and streaming:
            raise ValueError("turns=True has nothing to do for a threshold gate: it evicts as it goes. Leave it out.")
        if prefill == "sparse" and not learned:
            raise ValueError(
                f"prefill='sparse' needs a causal gate; {type(policy.scorer).__name__} decides after the prompt."
            )
        if whole and prefill == "sparse" and (policy.ratio is not None or not streaming):
            raise ValueError(
                "a gate that reads the whole prompt masks the prompt's own queries at its threshold only: leave budget "
                "and rule out, or use prefill='dense'."
            )
        fades = spec.relaxation == "decay"
        if learned and fades != isinstance(policy.rule, Decay):
            raise ValueError(
                "gates whose tokens fade (relaxation='decay') and the budget rule 'decay' belong together: "
                + ("use policy='gate+decay' with a budget." if fades else "this adapter's gates do not fade.")
            )
        if isinstance(policy.rule, Decay) and (turns or not learned):
            raise ValueError("budget rule 'decay' is for gates, and decides while decoding: leave turns out.")
        if policy.scorer.slots and policy.width is not None:
            raise ValueError("positions='slot' and thin keys are not made for each other: leave think out.")
        if policy.remainder is not None:
            maps = next((w.less() for w in wrappers(model) if w.less()), None)
            if maps is None:
                raise ValueError(
                    "remainder 'less' needs low-rank maps, and no adapter in force has any: train one with "
                    "GateKVConfig(less_rank=8), or leave less out of the policy."
                )
            later = isinstance(policy.rule, Decay) if learned else policy.scorer.streams
            if policy.width is not None and later and decode == "evict":
                raise ValueError("thin keys cannot be folded later: leave think or less out, or use decode='keep'.")
            _warn_of_other_training(maps.spec, policy)
        calibration = active[0].calibration() if active else None
        if learned and policy.ratio is not None and (streaming or prefill == "sparse") and calibration is None:
            raise ValueError(
                "a number as budget streams through calibrated thresholds, and this adapter has none: run "
                "gatekv.training.calibrate, leave budget=None, or use prefill='dense' with uniform, ada or global."
            )
        own_sinks = spec.sinks if policy.scorer.sinks is None else policy.scorer.sinks
        own_window = spec.window if policy.scorer.window is None else policy.scorer.window
        plan = Plan(
            policy=policy,
            sinks=own_sinks if sinks is None else sinks,
            window=own_window if window is None else window,
            dense=prefill == "dense",
            keep_later=decode == "keep",
            prompt_tokens=prompt_tokens,
            threshold=logit_of(spec.threshold),
            turns=turns,
            block_size=block_size,
            backend=backend,
            whole=whole,
        )
        if calibration is not None:
            plan.thresholds = calibration.thresholds(plan.sinks, plan.window)
        self._build(plan)

    def _build(self, plan: Plan) -> None:
        """Our layers where the model has full attention; transformers' own where a sliding window bounds them."""
        self.plan = plan
        layers = DynamicCache(config=base_model(self.model).config.get_text_config(decoder=True)).layers
        for w in wrappers(self.model):
            layers[w.layer_idx] = KVLayer(plan, w.layer_idx)
        super().__init__(layers=layers)
        plan.decide = Decision(plan, self.evicting())

    @classmethod
    def undecided(cls, model, queries: int = ALL) -> "KVCache":
        """A cache that watches one dense prefill and evicts nothing, so that many policies can share it by `decide`.

        queries: how many of the last queries to remember for scorers that look at them.
        """
        cache = cls(model, Full(queries=queries))
        cache.plan.defer = True
        return cache

    def decide(self, policy, budget: float | None = None, **kwargs) -> "KVCache":
        """A new cache: this undecided one's prompt, compressed under a policy (arguments as for `KVCache`)."""
        if not self.plan.defer:
            raise ValueError("decide() needs a cache made by KVCache.undecided(model), after its prompt was read.")
        cache = KVCache(self.model, policy, budget, prefill="dense", **kwargs)
        wanted = cache.plan.queries
        if min(wanted, self.get_seq_length()) > self.plan.policy.scorer.queries:
            raise ValueError(f"this policy looks at {wanted} queries: use KVCache.undecided(model, queries={wanted}).")
        parts = {w.layer_idx: (w.gate(), w.less()) for w in wrappers(self.model)}
        for mine, theirs in zip(cache.evicting(), self.evicting()):
            mine.adopt(theirs, *parts[mine.layer_idx])
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, KVLayer):
                cache.layers[i] = copy.copy(layer)
        for layer in cache.evicting():
            layer.end_prompt()
        return cache

    def compress(self) -> None:
        """End the turn: of the tokens fed since the last decision, keep `budget` (sinks and window as for a prompt).

        Earlier decisions stand. Raises ValueError without `turns=True`, or when the turn is too short for its budget.
        """
        if not self.plan.turns:
            raise ValueError("compress() needs KVCache(…, turns=True), which keeps what a later decision looks at.")
        for layer in self.evicting():
            if layer.phase is not Phase.TURN or layer.seen == layer.base:
                raise ValueError("nothing has been fed since the last decision: feed the turn first, then compress().")
        for layer in self.evicting():
            layer.end_prompt()

    def snapshot(self) -> "KVCache":
        """An independent copy that shares storage until either side changes: several questions over one context."""
        twin = copy.copy(self)
        twin.plan = copy.copy(self.plan)
        twin.layers = [layer.twin() if isinstance(layer, KVLayer) else copy.copy(layer) for layer in self.layers]
        twin.plan.decide = Decision(twin.plan, twin.evicting())
        for layer in twin.evicting():
            layer.plan = twin.plan
        return twin

    def restore(self, snapshot: "KVCache") -> None:
        """Become again what `snapshot` holds; the snapshot stays usable."""
        vars(self).update(vars(snapshot.snapshot()))

    def save(self, path: str) -> None:
        """Write the compressed cache to one safetensors file, so that a prompt is compressed once and reused."""
        storage.save(self, path)

    @classmethod
    def load(cls, path: str, model, backend: str | None = None) -> "KVCache":
        """Read a cache that `save` wrote, for the same model and adapter.

        Raises:
            FileNotFoundError, ValueError: no such file, another model or adapter, a missing or mis-shaped tensor.
        """
        return storage.load(cls, path, model, backend)

    def evicting(self) -> list[KVLayer]:
        """The layers that gatekv holds, by depth."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    def flags(self) -> list[torch.Tensor]:
        """What is still held: per evicting layer [batch, kv_heads, tokens seen] bool."""
        return [layer.held() for layer in self.evicting()]

    def memory(self) -> dict[str, float]:
        """Bytes of every storage held, of a full cache of the same real tokens, and their ratio."""
        held, full = 0, 0
        for layer in self.layers:
            if isinstance(layer, KVLayer) and layer.is_initialized:
                held += distinct_bytes(layer.tensors())
                keys = layer.tail.keys
                full += int(layer.real.sum()) * keys.shape[1] * 2 * keys.shape[3] * keys.element_size()
            elif layer.is_initialized:
                held += (own := distinct_bytes([layer.keys, layer.values]))
                full += own
        return {"bytes": held, "full_bytes": full, "ratio": held / full if full else 0.0}

    def __repr__(self) -> str:
        p = self.plan
        size = self.memory()
        backend = next((layer.kept.backend for layer in self.evicting() if layer.is_initialized), p.backend or "auto")
        return (
            f"KVCache({p.policy}, budget={p.policy.ratio}, "
            f"prefill={'dense' if p.dense else 'sparse'}, sinks={p.sinks}, window={p.window}, "
            f"block_size={p.block_size}, backend={backend}, "
            f"seen={self.get_seq_length()}, bytes={size['bytes']}, ratio={size['ratio']:.3f})"
        )


@torch.no_grad()
def flags(model, input_ids, attention_mask=None, policy=None, budget: float | None = None, **kwargs) -> torch.Tensor:
    """Which tokens of a prompt a policy keeps, without generating anything.

    input_ids, attention_mask: [batch, tokens], pads on the left; policy, budget and more: see `KVCache`, errors too.
    Returns [layers, batch, kv_heads, tokens] bool, full-attention layers only; pads are False.
    """
    cache = KVCache(model, policy, budget, **kwargs)
    model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, logits_to_keep=1)
    return torch.stack(cache.flags())
