"""How a model gets gatekv and loses it again: in place, without a hook, a wrapper or another name.

The class of each self_attn is swapped for a subclass of itself, as torch.distributed.fsdp.fully_shard does. What gatekv
keeps beside a layer (`GatedAttention`) is a plain attribute of the module, and an adapter's gates are submodules of it;
no name, hook, attribute or isinstance of the model changes, and `detach` leaves nothing behind.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from gatekv import attention
from gatekv.attention import AttentionCall, Memory
from gatekv.config import GateSpec
from gatekv.geometry import GATED, attention_modules, cache_layers, crossing, geometry_of, readers_of
from gatekv.passes import PassContext, Plain, Relaxed
from gatekv.recompute import Pass, follow_passes
from gatekv.support import LATER, NO_INTERFACE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from gatekv.gates.calibration import Calibration
    from gatekv.less.maps import LessMaps
    from gatekv.rotary import Rotation
    from gatekv.support import SelfAttention

LEARNING = Relaxed()  # what a forward in training mode does, where no pass is running
PARTS = ("gatekv_gate", "gatekv_less")  # submodules of a gated self_attn: adapter name -> gate, -> low-rank maps


class GatedAttention:
    """What gatekv keeps beside one self_attn, as its attribute `gatekv`; `wrappers` finds them.

    Transparent unless a gatekv cache is passed, a pass is running (`gated_pass`), or a gate is in force and the module
    in training mode: else the model's own forward runs, under the model's own config.

    Attributes:
        module: the attention. geometry: its sizes. specs, calibrations: by adapter name. running: the pass that is in
        force, or None. rotation: how the layer turns keys by position, once somebody asked (`gatekv.rotary`).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = cast("SelfAttention", module)
        self.layer_idx, self.geometry = self.module.layer_idx, geometry_of(module)
        self.specs: dict[str, GateSpec] = {}
        self.calibrations: dict[str, Calibration | None] = {}
        self.running: Pass | None = None
        self.rotation: Rotation | str | None = None

    @property
    def recorded(self) -> Any:
        """What the running pass found out about this layer (a `gatekv.passes.GateOutput`, of gates); None outside."""
        return None if self.running is None else self.running.recorded.get(self.layer_idx)

    @property
    def gatekv_gate(self) -> nn.ModuleDict:
        """Adapter name -> gate; empty on a model without an adapter."""
        return self._parts("gatekv_gate")

    @property
    def gatekv_less(self) -> nn.ModuleDict:
        """Adapter name -> low-rank maps; empty on a model without an adapter."""
        return self._parts("gatekv_less")

    def _parts(self, name: str) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.module._modules.get(name, nn.ModuleDict()))

    def in_force(self) -> list[str]:
        """Names of the adapters in force; a model without an adapter has none."""
        parts = self.module._modules.get("gatekv_gate")  # PEFT switches the container (gatekv.adapter.Parts)
        return [] if parts is None or parts.disable_adapters else list(cast("list[str]", parts.active_adapters))

    def _active(self, name: str) -> str | None:
        held = self.module._modules.get(name)
        if held is None:
            return None
        return next((adapter for adapter in self.in_force() if adapter in cast(nn.ModuleDict, held)), None)

    def active(self) -> str | None:
        """Name of the gate in force; a model without an adapter has none."""
        return self._active("gatekv_gate")

    def gate(self) -> nn.Module | None:
        """The gate in force, or None."""
        name = self.active()
        return self.gatekv_gate[name] if name else None

    def less(self) -> "LessMaps | None":
        """The low-rank maps in force (`gatekv.less.maps.LessMaps`), or None."""
        name = self._active("gatekv_less")
        return cast("LessMaps", self.gatekv_less[name]) if name else None

    def calibration(self) -> "Calibration | None":
        """Calibrated thresholds of the gate in force, or None."""
        name = self.active()
        return self.calibrations.get(name) if name else None

    def call(
        self,
        hidden: torch.Tensor,
        past: object,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        shared: MutableMapping[str, Any] | None = None,
        follows: bool = False,
    ) -> AttentionCall | None:
        """What the attention function is asked in this forward; None: the model's own attention, and nothing beside.

        hidden: [batch, tokens, hidden_size], the layer's input; past: the forward's cache or None; rotary: (cos, sin).
        shared, follows: see `AttentionCall`.

        Raises:
            ValueError: gates that shall apply to whole sequences, and a cache with tokens before them.
        """
        cache = past if isinstance(past, Cache) else None
        held = cache.layers[self.layer_idx] if cache is not None and self.layer_idx < len(cache.layers) else None
        memory = held if isinstance(held, Memory) else None
        context: PassContext | None = LEARNING if self.module.training else None
        record: Callable[[object], None] = _forget
        if self.running is not None:
            context, record = self.running.context, functools.partial(self.running.recorded.__setitem__, self.layer_idx)
        if memory is None and context is None:
            return None
        name = self.active()
        gate, spec = (self.gatekv_gate[name], self.specs[name]) if name else (None, LATER)
        call = AttentionCall(hidden, self.layer_idx, rotary, gate, spec, self.less(), memory, geometry=self.geometry)
        if follows:
            call.gate, call.less, call.follows = None, None, name is not None
            call.memory = None if memory is None else memory.reader()
        call.shared = shared
        if memory is not None:
            if not follows:
                memory.expect(hidden.shape[1])
            return call
        assert context is not None
        for asked in (context, Plain(sequence=context.sequence)):
            if asked.concerns(call, cache):
                call.context, call.record = asked, record
                return call
        return None

    def config(self) -> "PretrainedConfig":
        """The module's own config, live, but that it names gatekv's attention function."""
        return _view(self.module.config)


class ReadingAttention(GatedAttention):
    """The same beside an attention that reads an earlier layer's keys and values: it goes by that one's flags.

    Attributes:
        source: what gatekv keeps beside the earlier layer.
    """

    def __init__(self, module: nn.Module, source: GatedAttention) -> None:
        super().__init__(module)
        self.source = source

    def call(
        self,
        hidden: torch.Tensor,
        past: object,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        shared: MutableMapping[str, Any] | None = None,
        follows: bool = True,
    ) -> AttentionCall | None:
        call = self.source.call(hidden, past, rotary, shared, follows=True)
        return call if call is None else replace(call, geometry=self.geometry)


def _forget(found: object) -> None:
    """Nobody asked for what gates say."""


def _view(config: "PretrainedConfig") -> "PretrainedConfig":
    view: PretrainedConfig = object.__new__(_named(type(config)))
    object.__setattr__(view, "__dict__", config.__dict__)  # shared: what is changed later is seen
    return view


_CLASSES: dict[tuple[str, type], type] = {}  # made once for each class of the model's


def _named(plain: type) -> type:
    if ("named", plain) in _CLASSES:
        return _CLASSES["named", plain]

    def name(self: Any) -> str:
        return attention.name_of(self._attn_implementation_internal)

    members = {"_attn_implementation": property(name), "__module__": plain.__module__}
    return _CLASSES.setdefault(("named", plain), type(plain.__name__, (plain,), members))


def _gated(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a self_attn's class that asks its `gatekv` in every forward; named as the class is."""
    if ("gated", plain) in _CLASSES:
        return _CLASSES["gated", plain]
    own = plain.forward
    names = [*inspect.signature(own).parameters][2:]

    @functools.wraps(own)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; hidden_states [batch, tokens, hidden_size]."""
        given = dict(zip(names, args)) | kwargs if args else kwargs
        call = kwargs.pop("gatekv", None)
        if call is None:
            past = given.get("past_key_values", given.get("layer_past"))  # the older name is GPT-2's and GPT-NeoX's
            rotary, shared = given.get("position_embeddings"), given.get("shared_kv_states")
            call = self.gatekv.call(hidden_states, past, rotary, shared)
        if call is None:
            return own(self, hidden_states, *args, **kwargs)
        config, self.config = self.config, self.gatekv.config()
        try:
            out = own(self, hidden_states, *args, gatekv=call, **kwargs)
        finally:
            self.config = config
        if not call.answered:
            raise ValueError(NO_INTERFACE.format(plain.__name__))
        return out

    def reduce(self: Any, protocol: Any) -> tuple:
        return _again, (plain,), self.__dict__  # pickle finds classes by name, and this name is the plain class's

    names_of = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    members = {"forward": forward, "__reduce_ex__": reduce, "gatekv_plain": plain}
    return _CLASSES.setdefault(("gated", plain), type(plain.__name__, (plain,), names_of | members))


def _again(plain: type[nn.Module]) -> nn.Module:
    gated = _gated(plain)
    return gated.__new__(gated)


def gate(module: nn.Module, source: GatedAttention | None = None) -> GatedAttention:
    """Swap the class of one attention; where it is swapped, what is kept beside it. source: see `ReadingAttention`."""
    if "gatekv" not in vars(module):
        plain = type(module)
        vars(module)["gatekv"] = GatedAttention(module) if source is None else ReadingAttention(module, source)
        module.__class__ = _gated(plain)
        _follow(module, plain)
    return cast(GatedAttention, module.gatekv)


def ungate(module: nn.Module) -> None:
    """Give one self_attn its class back, and drop what an adapter put into it."""
    if "gatekv" not in vars(module):
        return
    gated, plain = type(module), cast("type[nn.Module]", module.gatekv_plain)
    for name in PARTS:
        module._modules.pop(name, None)
    del module.gatekv
    module.__class__ = plain
    _follow(module, gated)


def _follow(module: nn.Module, before: type[nn.Module]) -> None:
    """Hooks of accelerate (offloading, device_map) hold the forward that they found: let them hold the one in force."""
    for name in ("forward", "_old_forward"):
        held = vars(module).get(name)
        if isinstance(held, MethodType) and held.__func__ is before.forward:
            vars(module)[name] = MethodType(type(module).forward, module)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: of its tensors, quantised weights too; of offloaded ones where their hook puts them."""
    hooks = [vars(m).get("_hf_hook") for m in module.modules()]
    placed = next((d for h in hooks if (d := getattr(h, "execution_device", None)) is not None), None)
    if placed is not None:
        return torch.device(placed)  # a number: of the accelerator that there is
    tensors, nowhere = chain(module.parameters(), module.buffers()), torch.device("meta")
    return next((t.device for t in tensors if t.device != nowhere), nowhere)


def wrappers(model: nn.Module) -> list[GatedAttention]:
    """What gatekv keeps beside the model's attentions, by layer."""
    found = [cast(GatedAttention, vars(m)["gatekv"]) for m in model.modules() if "gatekv" in vars(m)]
    return sorted((w for w in found if not isinstance(w, ReadingAttention)), key=lambda w: w.layer_idx)


def saved_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name of a tensor in the model -> its name in adapter files and hashes.

    Until 2026-11-29 a wrapper stood around each gated self_attn, and LoRA inside it was saved under its name. Files
    keep that form, so that older versions read them; both are read.
    """
    gated = [f"{n.replace('_fsdp_wrapped_module.', '')}." for n, m in model.named_modules() if "gatekv" in vars(m)]
    out = {}
    for name in names:
        start = next((g for g in gated if name.startswith(g) and ".lora_" in name), None)
        out[name] = name if start is None else f"{start}base_layer.{name.removeprefix(start)}"
    return out


def gate_spec(model: nn.Module) -> GateSpec | None:
    """What the gates in force are, or None on a model without."""
    return next((w.specs[name] for w in wrappers(model) if (name := w.active())), None)


def attention_layers(model: nn.Module) -> list[tuple[nn.Module, "SelfAttention"]]:
    """(parent, attention) of every full-attention layer of the (text) decoder, by depth.

    Raises:
        ValueError: when the model has none that gatekv can gate, or would answer wrongly; says why.
    """
    inner = base_model(model)
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; gatekv evicts from the cache of decoder-only models.")
    found, layers = attention_modules(inner), cache_layers(inner)
    wanted = [i for i, layer in enumerate(layers) if type(layer) in GATED and i not in crossing(inner)]
    full = [(p, m) for p, m in found if m.layer_idx in wanted]
    if not full:
        raise ValueError(
            f"every layer of {name} has a sliding window, or none: its cache is bounded already. Where the window is "
            "longer than any input (Phi-3 128k), load the model with sliding_window=None."
        )
    if without := sorted({*wanted} - {m.layer_idx for _, m in full}):
        if other := next((m for m in inner.modules() if getattr(m, "layer_idx", None) == without[0]), None):
            raise ValueError(NO_INTERFACE.format(type(other).__name__))
        raise ValueError(
            f"{name} keeps keys and values for layer {without[0]}, and no attention module of its own belongs to it "
            "(several layers share one?): gatekv evicts from each layer by its own module's attention."
        )
    for _, module in full:  # said here already, so as not to fail in the middle of a run
        geometry_of(module)
    return full


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself; ValueError when there is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a model is wanted, not {model!r}: load it with transformers' AutoModelForCausalLM.from_pretrained, or an "
            "adapter's with peft's AutoPeftModelForCausalLM."
        )
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} is no transformers model, and holds none.")
    return found


def use_attention(model: nn.Module) -> None:
    """Make gatekv's attention function known, and check that the model would call it; its config stays as it is.

    Raises:
        ValueError: an attention implementation, or a model, that gatekv cannot take part in.
    """
    inner = base_model(model)
    text = inner.config.get_text_config(decoder=True)
    # An image tower may compute attention by itself; the last model with the decoder's config is the decoder.
    models = [m for m in inner.modules() if isinstance(m, PreTrainedModel)]
    decoder = [inner, *(m for m in models if m.config.model_type == text.model_type)][-1]
    attention.name_of(text._attn_implementation)
    if not decoder._can_set_attn_implementation():
        raise ValueError(NO_INTERFACE.format(type(inner).__name__))
    attention.register()


def attach(model: nn.Module) -> None:
    """Put gatekv into a model, without gates (for training-free policies); does nothing where it is."""
    layers = attention_layers(model)
    use_attention(model)
    for _, module in layers:
        gate(module)
    attach_readers(model)


def attach_readers(model: nn.Module) -> None:
    """Let the layers that read a gated layer's keys and values go by its flags."""
    inner = base_model(model)
    of_layer = {w.layer_idx: w for w in wrappers(inner)}
    places = {module.layer_idx: module for _, module in attention_modules(inner)}
    for place, source in readers_of(inner).items():
        if source in of_layer:
            gate(places[place], of_layer[source])


def detach(model: nn.Module) -> nn.Module:
    """Take gatekv out of a model, gates and all; returns the transformers model. See gatekv.lora.detach."""
    inner = base_model(model)
    for module in [*inner.modules()]:
        ungate(module)
    return inner


@contextmanager
def gated_pass(model: nn.Module, context: PassContext) -> Iterator[dict[int, Any]]:
    """Inside, forwards without a gatekv cache do what the context asks of the gated layers; see `gatekv.passes`.

    A layer that gradient checkpointing computes again, after the pass too, does so under the same context. Passes may
    lie inside each other: the inner one is in force.

    Yields what was found out, by layer index: `GateOutput` or `LayerError` of the last forward. It keeps its graph for
    as long as it is held.
    """
    layers, running = wrappers(model), Pass(context, {})
    follow_passes(model, layers)
    before = [w.running for w in layers]
    for w in layers:
        w.running = running
    try:
        yield running.recorded
    finally:
        for w, outer in zip(layers, before):
            w.running = outer


@contextmanager
def parallel(
    model: nn.Module, form: str = "hard", threshold: float | None = None, split: int | None = None
) -> Iterator[list[GatedAttention]]:
    """Inside, forwards without a cache apply the gates as a mask over whole sequences: the form that is trained.

    Args:
        form: "hard" (deployed flags) or a relaxation. threshold: on the logits, for "hard"; None = the adapter's own.
        split: length of the prompt as fed, pads included: flags act after it, and what follows is all kept
            (`prefill="dense"`). None: they act as tokens leave the window.

    Yields what is kept beside each layer; inside, each one's `recorded` is a `gatekv.passes.GateOutput`.
    """
    layers = wrappers(model)
    if not any(w.active() for w in layers):
        raise ValueError("the parallel form needs gates: load or create a gatekv adapter on this model first.")
    with gated_pass(model, Relaxed(form=form, threshold=threshold, split=split)):
        yield layers


@contextmanager
def gates_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as if it had no gates, in training mode too: the teacher, with no second copy.

    LoRA of the same adapter stays as it is: the teacher of a tuned model is the tuned model with its whole cache.
    """
    with gated_pass(model, Plain()):
        yield
