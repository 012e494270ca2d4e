"""Gradient checkpointing of a model with gates: layers that are computed again do so under the pass of their forward.

What a pass asks of the gates lies beside the layers' inputs and is over when the backward pass comes. Whoever switched
checkpointing on (`model.gradient_checkpointing_enable()`, a Trainer, FSDP2 by torch's `checkpoint_wrapper`), its
function is made to put the pass back. The reentrant form becomes the other one: it runs layers without a
graph at first, and what gates said there, beside the layers' outputs, would have no gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from torch.utils.checkpoint import checkpoint

from gatekv.passes import PassContext

FUNCTION = "_gradient_checkpointing_func"  # transformers'


class Pass(NamedTuple):
    """A pass in force. recorded: what was found out, by layer index."""

    context: PassContext
    recorded: dict[int, Any]


class Layer(Protocol):
    """What takes part in passes: `gatekv.modules.GatedAttention`."""

    running: Pass | None


class Following:
    """A checkpointing function under which a layer that is computed again finds the passes of its forward."""

    def __init__(self, function: Callable[..., Any], layers: Sequence[Layer]) -> None:
        self.function, self.layers = function, list(layers)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        passes, again = [layer.running for layer in self.layers], False

        def run(*inputs: Any, **named: Any) -> Any:
            nonlocal again
            first, again = not again, True
            with nullcontext() if first else self._under(passes):
                return forward(*inputs, **named)

        return self.function(run, *args, **kwargs)

    @contextmanager
    def _under(self, passes: list[Pass | None]) -> Iterator[None]:
        now = [layer.running for layer in self.layers]
        for layer, then in zip(self.layers, passes):
            layer.running = None if then is None else Pass(then.context, {})  # what was recorded is not said twice
        try:
            yield
        finally:
            for layer, running in zip(self.layers, now):
                layer.running = running


def follow_passes(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Let the layers that checkpointing computes again follow the passes; does nothing where none is checkpointed."""
    for module in model.modules():
        if isinstance(module, CheckpointWrapper):
            module.checkpoint_fn = _following(module.checkpoint_fn, layers)  # type: ignore[assignment]  # no partial
            module.checkpoint_impl = CheckpointImpl.NO_REENTRANT
        elif getattr(module, "gradient_checkpointing", False) and FUNCTION in vars(module):
            setattr(module, FUNCTION, _following(vars(module)[FUNCTION], layers))


def _following(function: Any, layers: Sequence[Layer]) -> Following:
    if isinstance(function, Following) and function.layers == list(layers):
        return function
    settings = getattr(function, "keywords", {})
    if not settings.get("use_reentrant"):
        return Following(function, layers)
    return Following(partial(checkpoint, **settings | {"use_reentrant": False}), layers)


@contextmanager
def whole_layers(model: nn.Module) -> Iterator[None]:
    """Inside, no layer is computed again: transformers hands no cache to layers that it checkpoints."""
    paused = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for m in paused:
        m.gradient_checkpointing = False  # type: ignore[assignment]  # a plain flag
    try:
        yield
    finally:
        for m in paused:
            m.gradient_checkpointing = True  # type: ignore[assignment]  # as above


def recompute_layers(model: nn.Module) -> None:
    """Switch gradient checkpointing on, whatever transformers calls it: activations of one layer at a time, for a third
    more computation."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # type: ignore[operator]  # a method, which torch takes for a parameter
