"""Gradient checkpointing of a model with gates: a layer is computed again in the backward pass, under the same orders.

What a step asks of the gates (threshold, split, documents, seed …) lies beside the layers' inputs and is gone when
the backward pass comes. Each layer's recomputation therefore gets back what stood there in its forward pass.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from gatekv.modules import GatedAttention, base_model, wrappers

ORDERS = (
    "form", "off", "threshold", "split", "documents", "seed", "received", "local", "lesson", "recorded", "sequence",
)  # fmt: skip


def recompute_layers(model: nn.Module) -> None:
    """Switch gradient checkpointing on: activations of one layer at a time, for a third more computation.

    The non-reentrant form: the reentrant one runs layers without a graph at first, and what gates said there, beside
    the layers' outputs, would have no gradient.
    """
    layers = wrappers(model)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        orders = [{name: vars(w)[name] for name in ORDERS} for w in layers]
        return nullcontext(), _under(layers, orders)

    settings = {"use_reentrant": False, "context_fn": contexts}
    base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


@contextmanager
def _under(layers: list[GatedAttention], orders: list[dict[str, Any]]) -> Iterator[None]:
    now = [{name: vars(w)[name] for name in ORDERS} for w in layers]
    for w, then in zip(layers, orders):
        vars(w).update(then)
    try:
        yield
    finally:
        for w, before in zip(layers, now):
            vars(w).update(before)
