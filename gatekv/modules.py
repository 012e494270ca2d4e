"""The visible wrapper around each self_attn, and how a model gets and loses it. No hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from gatekv import attention
from gatekv.attention import AttentionCall, Judged, Lesson, Memory
from gatekv.config import GateSpec
from gatekv.gates.documents import Documents
from gatekv.gates.relaxations import logit_of
from gatekv.ops.sequence import ALONE
from gatekv.support import LATER, refuse, sliding_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from gatekv.gates.calibration import Calibration
    from gatekv.less.maps import LessMaps
    from gatekv.support import SelfAttention

ATTENTION_NAME = "self_attn"
NO_INTERFACE = (
    "{} computes attention by itself, not through transformers' attention interface, so gatekv cannot take part in it: "
    "this model is not supported."
)


class GatedAttention(nn.Module):
    """Stands where `self_attn` stood; adds the layer's input, its gate and its memory to the attention call.

    Transparent unless a gatekv cache is passed, or the gate is active and the module is in training mode or inside
    `gatekv.parallel(model)`: with any other cache, or none, the output is bit-identical to the wrapped module's.
    """

    layer_idx: int
    base_layer: "SelfAttention"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = cast("SelfAttention", base_layer)
        self.layer_idx = self.base_layer.layer_idx
        self.gatekv_gate = nn.ModuleDict()  # adapter name -> gate
        self.gatekv_less = nn.ModuleDict()  # adapter name -> low-rank maps
        self.specs: dict[str, GateSpec] = {}
        self.form: str | None = None  # what the parallel form applies outside training mode
        self.off: bool | str = False  # inside `gates_off`: the teacher
        self.threshold: torch.Tensor | float | None = None  # on the logits; None = the gate's own tau
        self.split: int | None = None  # the prompt's length, where flags act after it
        self.documents: Documents | None = None  # of packed rows
        self.seed: int | None = None  # of the gumbel relaxation's noise
        self.received = True  # whether listening measures the attention that tokens receive
        # (logits, valid) -> threshold, where the layer's own error is wanted
        self.local: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float] | None = None
        self.lesson: torch.Tensor | None = None  # what is kept of a prompt, while low-rank maps learn
        self.sequence = ALONE  # the processes that share the rows
        self.recorded: Judged | Lesson | None = None

    def active(self) -> str | None:
        """Name of the gate in force; a model without an adapter has none."""
        return next(iter(self.gatekv_gate), None)

    def gate(self) -> nn.Module | None:
        """The gate in force, or None."""
        name = self.active()
        return self.gatekv_gate[name] if name else None

    def less(self) -> "LessMaps | None":
        """The low-rank maps in force (`gatekv.less.maps.LessMaps`), or None."""
        return cast("LessMaps | None", next(iter(self.gatekv_less.values()), None))

    def calibration(self) -> "Calibration | None":
        """Calibrated thresholds of the gate in force, or None."""
        return None

    def in_force(self) -> list[str]:
        """Names of the adapters in force; a model without an adapter has none."""
        return []

    def forward(self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
        """As the wrapped self_attn; hidden_states [batch, tokens, hidden_size]."""
        name = self.active()
        gate, spec = (self.gatekv_gate[name], self.specs[name]) if name else (None, LATER)
        rotary = kwargs.get("position_embeddings")
        call = AttentionCall(
            hidden_states, self.layer_idx, rotary, gate=gate, spec=spec, split=self.split, documents=self.documents
        )
        call.seed, call.received, call.local, call.less = self.seed, self.received, self.local, self.less()
        call.sequence = self.sequence
        memory: object = None
        if isinstance(past_key_values, Cache) and self.layer_idx < len(past_key_values.layers):
            memory = past_key_values.layers[self.layer_idx]
        if isinstance(memory, Memory):
            call.memory = memory
        elif self.off == "listen" and (gate is not None or self.lesson is not None):
            call.form, call.record, call.lesson = "listen", self._record, self.lesson
        elif self.lesson is not None and not self.off:
            call.form, call.lesson = "lesson", self.lesson
        elif gate is not None and past_key_values is None and (self.training or self.form) and not self.off:
            call.form, call.record = self.form or spec.relaxation, self._record
            call.threshold = logit_of(spec.threshold) if self.threshold is None else self.threshold
        elif self.sequence.size > 1:
            call.form = "plain"
        else:
            return self.base_layer(hidden_states, past_key_values=past_key_values, **kwargs)
        out = self.base_layer(hidden_states, past_key_values=past_key_values, gatekv=call, **kwargs)
        if not call.answered:
            raise ValueError(NO_INTERFACE.format(type(self.base_layer).__name__))
        return out

    def _record(self, judged: Judged | Lesson) -> None:
        self.recorded = judged


def wrappers(model: nn.Module) -> list[GatedAttention]:
    """The model's gated attentions, by layer."""
    return sorted((m for m in model.modules() if isinstance(m, GatedAttention)), key=lambda m: m.layer_idx)


def judged(wrapper: GatedAttention) -> Judged:
    """What the wrapper's gate said in the pass before."""
    assert isinstance(wrapper.recorded, Judged)
    return wrapper.recorded


def gate_spec(model: nn.Module) -> GateSpec | None:
    """What the gates in force are, or None on a model without."""
    return next((w.specs[name] for w in wrappers(model) if (name := w.active())), None)


def attention_layers(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(parent, self_attn) of every full-attention layer of the (text) decoder.

    Raises:
        ValueError: when the model has none that gatekv can wrap, or would answer wrongly; says why.
    """
    inner = base_model(model)
    name, config = type(inner).__name__, inner.config.get_text_config(decoder=True)
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; gatekv evicts from the cache of decoder-only models.")
    named = [(p, m) for p in inner.modules() if isinstance(m := p._modules.get(ATTENTION_NAME), nn.Module)]
    unwrapped = [(p, m, cast("SelfAttention", m.base_layer if isinstance(m, GatedAttention) else m)) for p, m in named]
    # An image tower's attention bears the same name; it has another config and no place in the cache.
    found = [(p, m, base) for p, m, base in unwrapped if _in_cache(base, config)]
    if not found:
        raise ValueError(
            f"{name} has no `{ATTENTION_NAME}` modules with a place in the cache (`layer_idx`): gatekv knows models "
            "built like Llama, Qwen, Mistral, Gemma 3 and Phi-3."
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"layers of {name} read other layers' keys and values: gatekv evicts from each layer alone.")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} caches one latent vector a token (MLA), not keys and values per head.")
    sliding = sliding_layers(inner)
    full = [(p, m, base) for p, m, base in found if not sliding[base.layer_idx]]
    if not full:
        raise ValueError(
            f"every layer of {name} has a sliding window: its cache is bounded already. Where the window is longer "
            "than any input (Phi-3 128k), load the model with sliding_window=None."
        )
    for _, _, base in full:  # said here too, where the config tells, so as not to fail in the middle of a run
        if getattr(config, "attn_logit_softcapping", None) is not None:
            refuse(base, "caps its attention scores (`attn_logit_softcapping`)")
        if isinstance(getattr(base, "sinks", None), nn.Parameter):
            refuse(base, "has learned attention sinks (`sinks`)")
    return [(p, m) for p, m, _ in full]


def _in_cache(module: nn.Module, config: "PretrainedConfig") -> bool:
    own = getattr(module, "config", config)
    return getattr(module, "layer_idx", None) is not None and own.model_type == config.model_type


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself; ValueError when there is none."""
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} is no transformers model, and holds none.")
    return found


def use_attention(model: nn.Module) -> None:
    """Switch a model to gatekv's attention function, over the implementation it was loaded with."""
    inner = base_model(model)
    implementation = inner.config._attn_implementation
    if implementation in attention.NAMES.values():
        return
    if implementation not in attention.NAMES:
        raise ValueError(
            f"attention implementation {implementation!r} is not supported: load the model with "
            f"attn_implementation= one of {', '.join(attention.NAMES)}."
        )
    attention.register()
    inner.set_attn_implementation(attention.NAMES[implementation])
    if inner.config._attn_implementation != attention.NAMES[implementation]:  # transformers only logs a warning
        raise ValueError(NO_INTERFACE.format(type(inner).__name__))


def attach(model: nn.Module) -> None:
    """Install wrappers without gates (for training-free policies); does nothing where they are."""
    layers = attention_layers(model)
    use_attention(model)
    for parent, module in layers:
        if not isinstance(module, GatedAttention):
            setattr(parent, ATTENTION_NAME, GatedAttention(module))


def detach(model: nn.Module) -> nn.Module:
    """Take the wrappers off, and what they hold with them; returns the transformers model. See gatekv.lora.detach."""
    inner = base_model(model)
    for parent, module in attention_layers(inner):
        if isinstance(module, GatedAttention):
            setattr(parent, ATTENTION_NAME, module.base_layer)
    names = {name: base for base, name in attention.NAMES.items()}
    inner.set_attn_implementation(names.get(inner.config._attn_implementation, inner.config._attn_implementation))
    return inner


@contextmanager
def parallel(
    model: nn.Module, form: str = "hard", threshold: float | None = None, split: int | None = None
) -> Iterator[list[GatedAttention]]:
    """Inside, forwards without a cache apply the gates as a mask over whole sequences: the form that is trained.

    Args:
        form: "hard" (deployed flags) or a relaxation. threshold: on the logits, for "hard"; None = the adapter's own.
        split: length of the prompt as fed, pads included: flags act after it, and what follows is all kept
            (`prefill="dense"`). None: they act as tokens leave the window.

    Yields the wrappers; each one's `recorded` is a `gatekv.attention.Judged`.
    """
    layers = wrappers(model)
    if not any(w.active() for w in layers):
        raise ValueError("the parallel form needs gates: load or create a gatekv adapter on this model first.")
    for w in layers:
        w.form, w.threshold, w.split = form, threshold, split
    try:
        yield layers
    finally:
        for w in layers:
            w.form = w.threshold = w.split = w.recorded = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped at random (LoRA, low-rank maps); then the model is back in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def gates_off(model: nn.Module, listen: bool = False) -> Iterator[None]:
    """Inside, the model answers as if it had no gates, in training mode too: the teacher, with no second copy.

    LoRA of the same adapter stays as it is: the teacher of a tuned model is the tuned model with its whole cache.
    listen: the gates still judge what they see; each wrapper's `recorded` is a `Judged` whose logits have a gradient.
    """
    layers = wrappers(model)
    for w in layers:
        w.off = "listen" if listen else True
    try:
        yield
    finally:
        for w in layers:
            w.off = False
