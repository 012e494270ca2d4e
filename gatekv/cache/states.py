"""What layers with a state will hold (linear attention, Mamba, convolutions): their shapes, from one dry step."""

import inspect
from typing import cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from gatekv.cache.segments.foreign import Foreign
from gatekv.geometry import names_in

USES = {"update_conv_state", "update_recurrent_state", "get_conv_state", "get_recurrent_state"}
CACHE = ("cache_params", "past_key_values")  # what families call the cache
TOKENS = 8  # of the dry step: longer than the states of most convolutions, and than none matters


def _keeps_state(module: nn.Module) -> bool:
    return getattr(module, "layer_idx", None) is not None and bool(USES & names_in(module))


@torch.no_grad()
def state_bytes(model: PreTrainedModel) -> dict[int, int]:
    """Layer -> bytes of its states for one sequence; they do not grow. Weights are not read: shapes alone run through.

    Raises:
        ValueError: a layer keeps a state, and cannot be run by itself.
    """
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    wanted = [i for i, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionCacheLayerMixin)]
    for module in model.modules() if wanted else ():
        if not _keeps_state(module):
            continue
        names = inspect.signature(module.forward).parameters
        name = next((n for n in CACHE if n in names), None)
        own = (*module.named_parameters(), *module.named_buffers())
        empty = {n: torch.empty_like(t, device="meta") for n, t in own}
        hidden = torch.empty(1, TOKENS, config.hidden_size, dtype=model.dtype, device="meta")
        try:
            assert name is not None
            torch.func.functional_call(module, empty, (hidden,), {name: cache})
        except Exception as error:  # whatever a family's own code says to a step like this one
            raise ValueError(
                f"what layer {module.layer_idx} of {type(model).__name__} ({type(module).__name__}) keeps as its state "
                f"cannot be told beforehand ({type(error).__name__}: {error!s:.80}): measure it, by cache.memory()."
            ) from error
    out = {}
    for i in wanted:
        states = Foreign(cache.layers[i]).states().values()
        if not states:
            raise ValueError(
                f"layer {i} of {type(model).__name__} keeps a state, and no module of its own says what: measure it, "
                "by cache.memory()."
            )
        out[i] = sum(t.numel() * t.element_size() for t in cast("list[torch.Tensor]", [*states]))
    return out
