"""Keep maps: which token each head of each layer holds, for several policies over one text, ready for JSON."""

import base64
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch

from gatekv.cache.kvcache import KVCache
from gatekv.evaluation.names import is_control
from gatekv.ops.naive import WHOLE
from gatekv.policies import resolve

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    GateModel = PeftModel | PreTrainedModel


def pack(keep: torch.Tensor) -> str:
    """Base64 of a bool tensor's bits in C order, eight to a byte, the first in the highest bit."""
    return base64.b64encode(numpy.packbits(keep.cpu().numpy()).tobytes()).decode()


def unpack(text: str, shape: tuple[int, ...]) -> numpy.ndarray:
    """The bool array of `shape` that `pack` wrote.

    Raises:
        ValueError: when the text holds another number of bytes than the shape needs.
    """
    data, size = numpy.frombuffer(base64.b64decode(text), dtype=numpy.uint8), int(numpy.prod(shape))
    if len(data) != (size + 7) // 8:
        raise ValueError(f"{len(data)} bytes of packed bits do not fill shape {shape}: pass the shape that was packed.")
    return numpy.unpackbits(data, count=size).astype(bool).reshape(shape)


def widths(text: str, shape: tuple[int, ...]) -> numpy.ndarray:
    """[*shape, 2] uint8 of the "bits" of a map: of each token's key and value."""
    return numpy.frombuffer(base64.b64decode(text), dtype=numpy.uint8).reshape(*shape, 2)


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[str]:
    """A string per token whose concatenation is the decoded text.

    A character whose bytes are split over tokens belongs to the last of them, the others get "". Each token is decoded
    behind the ones before it, because alone it may lose its leading blank.
    """
    decode = lambda part: cast(str, tokenizer.decode(part, clean_up_tokenization_spaces=False))  # noqa: E731
    texts: list[str] = []
    start, done = 0, 0  # ids[start:done] are spelled out and serve as context
    for i in range(len(ids)):
        before, now = decode(ids[start:done]), decode(ids[start : i + 1])
        if i + 1 < len(ids) and (now.endswith("\ufffd") or len(now) <= len(before)):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, i + 1
    return texts


def _decided(model: "GateModel", undecided: KVCache, ids: torch.Tensor, policy: str, budget: float | None) -> KVCache:
    """The text under one policy; threshold gates act inside the prefill, so they need one of their own."""
    resolved = resolve(policy, budget)
    if resolved.needs.scope == "token":
        cache = KVCache(model, policy, budget, strict=True)
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache
    return undecided.decide(policy, budget, decode="keep", strict=True)


@torch.no_grad()
def keep_map(
    model: "GateModel",
    tokenizer: "PreTrainedTokenizerBase",
    ids: list[int] | torch.Tensor,
    policies: list[str],
    budgets: list[float | int | None],
) -> dict:
    """What every policy holds of one text at every budget, after one dense prefill.

    Args:
        ids: token ids, a list or a tensor of shape [tokens] or [1, tokens].
        policies: names like "snapkv+ada"; gates need an adapter. budgets: shares of the tokens, or numbers of them;
            None: a gate's own threshold.

    Returns a dict that json can write: "tokens" (see `token_texts`); "layers" L, "heads" K (full-attention layers
    only) and "layer_indices", their places in the model; "maps" [{"policy", "budget", "ratio" of bytes held, "keep":
    `pack` of bool [L, K, tokens]; where some are in few bits, "bits": see `widths`}]; "refused" [{"policy", "budget",
    "refused": why}].

    Raises:
        ValueError: an unknown policy, an untrained one, or ids of another shape.
    """
    ids = torch.as_tensor(ids, device=model.device)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != 1 or not ids.numel():
        raise ValueError(f"ids must be one text's token ids, [tokens] or [1, tokens]; got shape {list(ids.shape)}.")
    for policy in policies:
        if is_control(policy):
            raise ValueError(
                f"policy {policy!r} needs an untrained adapter, which keep maps do not make: leave it out."
            )
        resolve(policy, 1.0)  # an unknown name is a mistake, not a refusal
    undecided = KVCache.undecided(model)
    model(ids, past_key_values=undecided, logits_to_keep=1)
    layers = undecided.evicting()
    out: dict[str, Any] = {"tokens": token_texts(tokenizer, ids[0].tolist()), "layers": len(layers)}
    out |= {"heads": layers[0].window.keys.shape[1], "layer_indices": [layer.layer_idx for layer in layers]}
    out |= {"maps": [], "refused": []}
    for policy in policies:
        for budget in budgets:
            try:
                cache = _decided(model, undecided, ids, policy, budget)
            except ValueError as error:
                out["refused"].append({"policy": policy, "budget": budget, "refused": str(error)})
                continue
            bits = torch.stack([bits[0] for bits in cache.bits()]).cpu()
            entry = {"policy": policy, "budget": budget, "ratio": cache.memory()["ratio"]}
            if ((0 < bits) & (bits < WHOLE)).any():
                entry["bits"] = base64.b64encode(bits.numpy().tobytes()).decode()
            out["maps"].append(entry | {"keep": pack(bits[..., 0] > 0)})
    return out
