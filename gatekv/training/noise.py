"""Passes without noise: teacher and student are the same model but for its gates, so what the base draws at random (any
dropout, layerdrop, router jitter) would be learned as if eviction had done it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from gatekv.modules import base_model

logger = logging.get_logger(__name__)


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, all of a model is in evaluation mode; then each module is in the mode it was in."""
    with _still(list(model.modules())):
        yield


@contextmanager
def quiet(model: nn.Module, lora: bool = True) -> Iterator[None]:
    """Inside, nothing but what learns draws at random: gates, low-rank maps and, unless `lora` is False, LoRA are in
    the mode they were in, all else is in evaluation mode.

    Gradient checkpointing works on: it asks for training mode, so its layers keep that, and drop it only for what they
    compute, in the forward pass and again in the backward pass, which comes after this context.
    """
    kinds = ("gatekv_", "lora_") if lora else ("gatekv_",)
    own = {name: m for name, m in model.named_modules() if not any(p.startswith(kinds) for p in name.split("."))}
    layers = {n: m for n, m in own.items() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing}
    functions = []
    for name, layer in layers.items():
        inside = [m for n, m in own.items() if n == name or n.startswith(name + ".")]
        function: Callable[..., Any] = vars(layer)["_gradient_checkpointing_func"]
        functions.append((layer, function))
        vars(layer)["_gradient_checkpointing_func"] = _inside(function, inside)
    try:
        with _still([m for n, m in own.items() if n not in layers]):
            yield
    finally:
        for layer, function in functions:
            vars(layer)["_gradient_checkpointing_func"] = function


@contextmanager
def _still(modules: list[nn.Module]) -> Iterator[None]:
    before = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m, mode in zip(modules, before):
            m.training = mode


def _inside(checkpoint: Callable[..., Any], modules: list[nn.Module]) -> Callable[..., Any]:
    """A checkpointing function that runs a layer, whenever it does, with its modules in evaluation mode."""

    def quietly(forward: Callable[..., Any], *args: Any) -> Any:
        def still(*inputs: Any) -> Any:
            with _still(modules):
                return forward(*inputs)

        return checkpoint(still, *args)

    return quietly


def announce(model: nn.Module) -> None:
    """Say in one line, once, which noise of a base is off while it is trained on; nothing where there is none."""
    inner = base_model(model)
    fields = inner.config.get_text_config(decoder=True).to_dict()
    noise = [
        f"{name}={value}" for name, value in fields.items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
    ]  # fmt: skip
    if noise:
        logger.warning_once(
            f"{type(inner).__name__}: {', '.join(noise)} off in training; gates learn against the model without noise."
        )
