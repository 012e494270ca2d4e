"""Evictors of a prompt that is ranked at its end, and who follows them."""

from typing import TYPE_CHECKING, cast

import torch

from gatekv.attention import sink_tokens
from gatekv.cache import alignment
from gatekv.cache.config import CacheConfig
from gatekv.cache.decision import Selection, Undecided, choose
from gatekv.cache.eviction import Evictor, FixedBuffer, KeepAll
from gatekv.cache.gate_eviction import Cut, Decay, GateEvictor, Threshold
from gatekv.cache.gate_stream import GateStream
from gatekv.cache.refusals import NO_ROTARY
from gatekv.policies import View

if TYPE_CHECKING:
    from gatekv.cache.layer import KVLayer
    from gatekv.less.maps import LessMaps

Tensor = torch.Tensor


class OneShot(Evictor):
    """The prompt waits whole; at its end scores are ranked once."""

    evicts = True

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.page_scores = self.buffered = config.policy.scorer.evicts_in_decode and not (
            config.keep_later or config.turns
        )

    def on_prompt_end(self, layer: "KVLayer") -> None:
        together = layer.siblings.layers if self.config.needs.scope == "model" else [layer]
        if layer is not together[-1]:
            return
        undecided = [cast(OneShot, other.evictor).undecided(other) for other in together]
        for other, selection in zip(together, choose(self.config, undecided, together[0].fed())):
            cast(OneShot, other.evictor).apply(other, selection)

    def undecided(self, layer: "KVLayer") -> Undecided:
        """What the layer brings to the decision."""
        place, valid = layer.siblings.layers.index(layer), layer.fed()
        before = layer.real - valid.sum(-1, keepdim=True)
        return Undecided(place, lambda: self.view(layer), self.scores(layer), self.logits(layer), before)

    def view(self, layer: "KVLayer") -> View:
        """What a scorer sees of a prompt or turn that is still whole."""
        window, evidence = layer.window, layer.evidence
        queries = cast(Tensor, evidence.queries)  # None only for scorers that look at no query
        parts = (window.keys, window.values, queries, window.valid, evidence.scaling, layer.layer_idx)
        return View(*parts, lambda: self.gate_logits(layer), _kinds(layer), evidence.sinks)

    def gate_logits(self, layer: "KVLayer") -> Tensor:
        """[batch, kv_heads, n], for scorers that look at them.

        Raises:
            ValueError: no gate has read these tokens.
        """
        raise ValueError("this scorer asks for a gate's logits: say so by `gate = True` in its class.")

    def scores(self, layer: "KVLayer") -> Tensor:
        """[batch, kv_heads, n] since the prompt or turn began, higher keeps."""
        scorer, known = self.config.policy.scorer, layer.evidence.known
        if known is None:
            return scorer.score(self.view(layer))
        of = (repr(scorer), self.reader(), self.config.kinds)  # a dataclass's repr names all else that matters
        if of not in known:
            known[of] = scorer.score(self.view(layer))
        return known[of]

    def reader(self) -> object:
        """The gate, where scores hang on one."""
        return None

    def logits(self, layer: "KVLayer") -> Tensor | None:
        """[batch, kv_heads, n] of a gate, where later tokens will be measured by them."""
        return None

    def apply(self, layer: "KVLayer", selection: Selection) -> None:
        """Hold exactly what was selected, and go on."""
        window = layer.window
        window.flags = self.flags(layer, selection)
        if layer.folded > layer.base:
            layer.store.filter(selection.keep, layer.real)
        layer.unmet = selection.unmet
        if self.buffered:
            sinks = sink_tokens(window.valid, self.config.sinks)[:, None]
            window.scores = selection.scores.float().masked_fill(sinks, torch.inf)  # they never leave
        else:
            layer.store.pages.scores = None
            window.scores = window.scores if self.config.turns else None
        self.hand_over(layer, self.successor(selection), selection.bits)

    def flags(self, layer: "KVLayer", selection: Selection) -> Tensor:
        """[batch, kv_heads, window] bool: what becomes of the tokens in the window."""
        return selection.keep[..., layer.folded - layer.base :] & layer.window.valid[:, None]

    def successor(self, selection: Selection | None = None) -> Evictor:
        if self.config.turns:
            return self
        return FixedBuffer(self.config, selection) if self.buffered else KeepAll(self.config)


def _kinds(layer: "KVLayer") -> Tensor | None:
    """[batch, slots since base] of what the cache was told about its tokens; 0 for later ones."""
    kinds = layer.config.kinds
    if kinds is None:
        return None
    kinds = torch.nn.functional.pad(kinds.to(layer.real.device), (0, max(layer.seen - kinds.shape[1], 0)))
    return alignment.pads_first(layer, kinds[:, : layer.seen])[:, layer.base :]


class GateOneShot(GateEvictor, OneShot):
    """A gate reads the prompt as it comes, and its scores are ranked at the end.

    In a sparse prefill provisional flags, at thresholds of 1.5 times the budget, act before that.
    """

    loose = 1.5
    window_scores = True

    def __init__(self, config: CacheConfig, stream: GateStream | None = None) -> None:
        super().__init__(config, stream)
        self.buffered = config.policy.rule.fades and not config.keep_later
        self.provisional = not config.dense_prefill
        self.page_scores = self.provisional or config.policy.rule.fades

    def thresholds(self, layer: "KVLayer", valid: Tensor, real: Tensor, start: int) -> Tensor:
        if self.provisional and not layer.decided:
            return self.calibrated(layer, valid, real, start)
        return super().thresholds(layer, valid, real, start)

    def gate_logits(self, layer: "KVLayer") -> Tensor:
        window = layer.window
        if window.scores is None:
            hidden = cast(Tensor, layer.evidence.hidden)
            window.scores = self.stream.read(hidden, window.valid, window)[0].float()
        return window.scores

    def scores(self, layer: "KVLayer") -> Tensor:
        if self.config.policy.rule.fades:
            return self.gate_logits(layer)
        if not self.provisional or layer.decided:
            return super().scores(layer)
        held = cast(Tensor, layer.window.scores)
        scores = held.new_full((*held.shape[:2], layer.seen), -torch.inf)  # what flags evicted
        layer.store.pages.scatter(scores, cast(Tensor, layer.store.pages.scores), layer.real)
        mine = held.masked_fill(~layer.window.flags, -torch.inf)
        there = scores[..., layer.folded :]  # where the window has a pad between turns, older tokens stand in pages
        scores[..., layer.folded :] = torch.where(layer.window.valid[:, None], mine, there)
        return scores

    def reader(self) -> object:
        return self.stream.gate

    def logits(self, layer: "KVLayer") -> Tensor | None:
        if self.config.keep_later or self.config.turns or self.config.policy.rule.fades:
            return None
        return self.scores(layer) if self.provisional else self.gate_logits(layer)

    def flags(self, layer: "KVLayer", selection: Selection) -> Tensor:
        flags, window, cut = super().flags(layer, selection), layer.window, selection.cut
        if cut is None:
            return flags
        # Tokens still in the window were kept for that alone; their own logits decide when they leave it.
        n = flags.shape[-1]
        young = torch.arange(n, device=flags.device) > n - max(self.config.window, 1)
        sinks = sink_tokens(window.valid, self.config.sinks, layer.real - window.valid.sum(-1, keepdim=True))[:, None]
        return torch.where(young, ((cast(Tensor, window.scores) > cut) & window.valid[:, None]) | sinks, flags)

    def successor(self, selection: Selection | None = None) -> Evictor:
        if self.config.turns:
            return self
        if self.config.keep_later:
            return KeepAll(self.config)
        kind = Decay if self.config.policy.rule.fades else Cut
        return kind(self.config, self.stream, selection)


def evictor_of(config: CacheConfig) -> Evictor:
    """Who is in charge of a prompt, by what its policy needs."""
    needs = config.needs
    if needs.scope == "token":
        return Threshold(config)
    return GateOneShot(config) if needs.gate else OneShot(config)


def adopt(layer: "KVLayer", other: "KVLayer", gate: torch.nn.Module | None, maps: "LessMaps | None") -> None:
    """Let an empty layer take over an undecided one's whole prompt, sharing its tensors; gate judges it from here on,
    and maps remember it.

    Raises:
        ValueError: a policy that turns queries by RoPE, and a model whose rotation was not known.
    """
    if layer.config.turns_queries and other.evidence.rotary is None:
        raise ValueError(NO_ROTARY)
    layer.lazy_initialization(*(t[:, :, :0] for t in other.window.stored))
    layer.window, layer.evidence = other.window.fork(), other.evidence.fork()
    layer.evidence.known = other.evidence.known  # one for all who ask
    layer.seen, layer.folded, layer.real, layer.calls = other.seen, other.folded, other.real, other.calls
    if isinstance(layer.evictor, GateEvictor):
        layer.evictor.stream.gate = cast(torch.nn.Module, gate)
    layer.store.remainder.use(maps, layer.window)
    layer.window.psi = layer.store.remainder.features(layer.window.keys)
