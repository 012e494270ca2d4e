"""A batch as a step sees it: what the model reads lies on its device, what decides shapes stays on the CPU.

Every look at a number on an accelerator waits for all that was asked of it before. What a step has to know (where a
prompt ends, which tokens are real, which are predicted) was known when the rows were read, so it is kept from then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from gatekv.gates.documents import Documents
from gatekv.geometry import foreign_layers, remembers
from gatekv.masks import told_of_pads_alone
from gatekv.modules import base_model
from gatekv.ops.naive import causal_mask
from gatekv.ops.sequence import ALONE, Sequence

Batch = Mapping[str, torch.Tensor]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tokens on the device; no dict, all of whose tensors data-parallel wrappers would move."""
    return MappingProxyType(dict(batch) | {"input_ids": batch["input_ids"].to(device, non_blocking=True)})


class _Passing(DynamicLayer):
    """Hands keys and values on, and holds none."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What was given."""
        return key_states, value_states


@dataclass(frozen=True)
class Rows:
    """Whole rows of a batch.

    Attributes:
        ids: [batch, tokens]. positions: [batch, tokens], each document's from 0, on their device.
        mask: as models take it, on their device: [batch, tokens], [batch, 1, tokens, tokens] bool, or None where every
            token sees all before it, or transformers finds the borders in the positions; whole: the former.
        valid, weights: [batch, tokens], on the CPU, if the batch was. documents: of packed rows, or None.
        sequence: the processes that share the rows.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    whole: bool
    valid: torch.Tensor
    weights: torch.Tensor | None
    documents: Documents | None
    sequence: Sequence = ALONE

    @classmethod
    def of(cls, batch: Batch, model: nn.Module, sequence: Sequence = ALONE) -> "Rows":
        """batch: input_ids, attention_mask, weights [batch, tokens] and, packed, segments and position_ids. input_ids
        say which device; the rest may lie on the CPU. model: whose masks these are.

        Raises:
            ValueError: several packed rows, for an attention that finds the documents of one.
        """
        ids, mask, inner = batch["input_ids"], batch["attention_mask"], base_model(model)
        segments, valid = batch.get("segments"), batch["attention_mask"].bool()
        packed = segments is not None and bool((segments.amax(-1) > 0).any())
        positions = batch["position_ids"] if segments is not None else (mask.cumsum(-1) - 1).clamp_min(0)
        seen: torch.Tensor | None = mask.to(ids.device)
        whole = not packed and bool(valid.all())
        if packed and remembers(inner):
            raise ValueError(
                f"{type(inner).__name__} has layers that keep a state, which runs through all documents of a packed "
                "row: pack=false."
            )
        if whole:
            seen = None
        elif inner.config._attn_implementation == "sdpa" and not any(foreign_layers(inner)):
            seen = visible(valid.to(ids.device), segments if segments is None else segments.to(ids.device))
        elif segments is not None and not remembers(inner):
            if packed and len(ids) > 1 and told_of_pads_alone(inner.config._attn_implementation):
                raise ValueError(
                    f"{inner.config._attn_implementation} tells documents apart in one packed row at a time, and this "
                    f"batch has {len(ids)}: set per_device_train_batch_size=1, or load the model with "
                    "attn_implementation='sdpa'."
                )
            seen = None  # transformers reads the borders off positions that start anew, for sliding layers too
        documents = None if segments is None else Documents(segments, ids.device)
        positions, of_row = positions.to(ids.device), sequence.of(ids.shape[1])
        return cls(ids, positions, seen, whole, valid, batch.get("weights"), documents, of_row)

    def hidden(self, decoder: nn.Module, past: Cache | None = None, start: int = 0) -> torch.Tensor:
        """Last hidden states of the tokens from `start` on; those before are in `past`. Of a shared row, of the tokens
        of this process."""
        ids, positions = (self.sequence.part(t[:, start:], 1) for t in (self.ids, self.positions))
        holds, mask = past is not None, self.mask
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules())
        state = remembers(base_model(decoder))
        if past is None and self.whole and self.sequence.size == 1 and not checkpointed and not state:
            past = Cache(layer_class_to_replicate=_Passing)  # without one transformers looks for packed rows, and waits
        if mask is not None and mask.ndim == 4:
            mask = mask[:, :, start:]
        return decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=holds
        ).last_hidden_state


def visible(valid: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
    """Which keys [batch, 1, tokens, tokens] each token of whole rows sees; valid, segments: [batch, tokens]."""
    seen = causal_mask(valid.shape[1], valid.shape[1], valid.device) & valid[:, None, None]
    return seen if segments is None else seen & (segments[:, None, :, None] == segments[:, None, None])
