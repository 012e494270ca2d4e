"""A model's own logits from its last hidden states: whatever it does behind its text decoder, losses see it too.

Families scale their logits (Cohere, Granite), scale the hidden states before them (MiniCPM), or cap them (Gemma). No
list of names could follow that. So the model's own forward makes the logits, with the decoder's answer put in the
decoder's place.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from gatekv.modules import base_model, gates_off
from gatekv.training.noise import as_evaluated

TRIED = 4  # tokens of the check


@dataclass
class _Said(BaseModelOutputWithPast):
    """What a decoder would have returned; of the rest that families add there is nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Told:
    """Stands for a decoder that returns hidden states it was told; all else about it is as it was."""

    def __init__(self, decoder: nn.Module, hidden: torch.Tensor) -> None:
        self.decoder, self.hidden = decoder, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> _Said:
        return _Said(last_hidden_state=cast(Any, self.hidden))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


class LogitHead:
    """The way from last hidden states to logits, and the decoder that the hidden states come from.

    Args:
        model: a transformers model, or a PEFT model around one, gates included. Found out here with four tokens, in
            evaluation mode with gates off; where weights are spread over processes (ZeRO-3), offloaded or not there
            yet (meta), when `ready` is called first. Then all processes must call it together.

    Raises:
        ValueError: the logits of a model cannot be made of its last hidden states, or something in the head learns.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.decoder: nn.Module = model  # of the text, once it is found
        self.owner: nn.Module = model  # whose forward makes logits of what the decoder returns
        self.path: list[str] = []  # from the owner to the decoder
        self.out_features = 0
        if not any(p.is_meta or hasattr(p, "ds_tensor") for p in model.parameters()):
            self.ready()

    def ready(self) -> None:
        """Find decoder and owner, if that is still to do, and compare with the model's own logits."""
        if self.path:
            return
        inner = base_model(self.model)
        name = f"{type(inner).__name__} ({inner.config.model_type})"
        ids = _plain_tokens(inner)
        with torch.no_grad(), as_evaluated(self.model), gates_off(self.model):
            logits = self._find(inner, ids, name)
            mask, positions = torch.ones_like(ids), torch.arange(TRIED, device=ids.device)[None]
            hidden = self.decoder(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            mine = self(hidden).to(logits)
        scale = logits.abs().max().clamp_min(torch.finfo(logits.dtype).tiny)
        if mine.shape != logits.shape or (mine - logits).abs().max() > torch.finfo(hidden.dtype).eps ** 0.5 * scale:
            self.path = []
            raise ValueError(
                f"{name} makes its logits of more than its last hidden states, which is not supported: losses would "
                "be those of another model. Train on a model whose logits follow from `last_hidden_state`."
            )

    def _find(self, inner: PreTrainedModel, ids: torch.Tensor, name: str) -> torch.Tensor:
        """The model's own logits; on the way, who returned hidden states last, and who made logits of them first."""
        decoders: list[nn.Module] = []
        owners: list[nn.Module] = []

        def listen(module: nn.Module, arguments: object, output: object) -> None:
            hidden = getattr(output, "last_hidden_state", None)
            if getattr(output, "logits", None) is not None:
                owners.append(module)
            elif isinstance(hidden, torch.Tensor) and hidden.shape[:2] == ids.shape:
                decoders.append(module)

        hooks = [m.register_forward_hook(listen) for m in inner.modules() if isinstance(m, PreTrainedModel)]
        try:
            logits = getattr(inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False), "logits", None)
        finally:
            for hook in hooks:
                hook.remove()
        inside = {m: path for path, m in owners[0].named_modules() if path} if owners else {}
        found = [m for m in decoders if m in inside]
        if logits is None or not found:
            raise ValueError(
                f"{name} returns no logits made of its decoder's `last_hidden_state`, which is not supported: load it "
                "with AutoModelForCausalLM, or another model."
            )
        self.owner, self.decoder, self.path = owners[0], found[-1], inside[found[-1]].split(".")
        self.out_features = logits.shape[-1]
        below = {id(p) for p in self.decoder.parameters()}
        behind = {n for n, p in self.owner.named_parameters() if p.requires_grad and id(p) not in below}
        learning = sorted(n for n in behind if "lora_" in n or "modules_to_save" in n)
        if learning:
            self.path = []
            raise ValueError(
                f"{learning[0]} lies behind the last hidden states, where nothing learns: leave it out of LoRA's "
                "target_modules and modules_to_save."
            )
        return logits

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [batch, tokens, hidden_size], or [tokens, hidden_size] -> logits [..., vocabulary]."""
        rows = hidden if hidden.dim() == 3 else hidden[None]
        told = _in_place_of(self.owner, self.path, rows)
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        # Not through `__call__`: hooks there (ZeRO-3, accelerate) are for the model as a whole; the head has its own.
        logits = type(self.owner).forward(told, input_ids=ids).logits
        return logits if hidden.dim() == 3 else logits[0]


def _in_place_of(module: nn.Module, path: list[str], hidden: torch.Tensor) -> Any:
    """A shallow copy of a module, at the end of whose path a decoder stands that returns `hidden`."""
    child = cast(nn.Module, module._modules[path[0]])
    shell = copy.copy(module)
    vars(shell).pop("forward", None)  # accelerate's, bound to the module that was copied
    vars(shell)["_modules"] = dict(module._modules)
    shell._modules[path[0]] = _in_place_of(child, path[1:], hidden) if path[1:] else cast(Any, _Told(child, hidden))
    return shell


def _plain_tokens(inner: PreTrainedModel) -> torch.Tensor:
    """[1, 4] token ids without a meaning of their own (pads, images), as far as the config tells."""
    text = inner.config.get_text_config(decoder=True)
    special: set[object] = set()
    for config in (inner.config, text):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                special |= set(value) if isinstance(value, list | tuple) else {value}
    plain = [i for i in range(min(text.vocab_size, len(special) + 2 * TRIED)) if i not in special]
    device = next(inner.get_input_embeddings().parameters()).device
    where = torch.device("cpu") if device.type == "meta" else device
    return torch.tensor([(plain[-TRIED:] * TRIED)[:TRIED] if plain else [0] * TRIED], device=where)
