"""Random two-layer models of each family, and gates with something to say."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on the CPU

from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gatekv import GateKVConfig
from gatekv.attention import AttentionCall
from gatekv.modules import base_model, wrappers

FAMILIES = ["llama", "qwen3"]
VOCAB = 97
SHAPE = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=8,
    vocab_size=VOCAB, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=False,
)  # fmt: skip


def tiny(family: str = "llama", dtype=torch.float64, seed: int = 0, **changes):
    """A random model whose attention is peaked enough that evicting the wrong token shows."""
    torch.manual_seed(seed)
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config, cls = kinds[family]
    model = cls(config(**{**SHAPE, **changes})).to(dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def gated(family: str = "llama", dtype=torch.float64, seed: int = 0, model=None, **spec):
    """A tiny PEFT model whose random gates drop about half of the tokens."""
    model = model or tiny(family, dtype, seed)
    peft = get_peft_model(model, GateKVConfig(**spec)).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    for w in wrappers(peft):
        for name, p in w.gatekv_gate["default"].named_parameters():
            if name in ("out.weight", "out_weight", "distance"):
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator))
            if name in ("out.bias", "out_bias"):
                torch.nn.init.zeros_(p)
    return peft.eval()


def padded_batch(lengths, seed: int = 3):
    """(ids, mask) of left-padded random rows."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids * mask, mask


class MaskedMemory:
    """Answers attention densely under a fixed mask: the reference that evicts nothing."""

    def __init__(self, live):
        self.live = live

    def attend(self, call, q, k, v, mask, scaling):
        groups = q.shape[1] // k.shape[1]
        k, v, live = (t.repeat_interleave(groups, 1) for t in (k, v, self.live.expand(-1, k.shape[1], -1, -1)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=live, scale=scaling)


@torch.no_grad()
def dense_reference(model, ids, live):
    """Logits of one uncached pass in which each layer's queries see what live [1, kv_heads, tokens, tokens] says."""
    n, undo = torch.arange(ids.shape[1]), []
    for w, layer_live in zip(wrappers(model), live):
        memory = MaskedMemory(layer_live & (n[:, None] >= n))

        def forward(hidden_states, w=w, memory=memory, **kwargs):
            call = AttentionCall(hidden_states, w.layer_idx, memory=memory)
            return w.base_layer(hidden_states, gatekv=call, **kwargs)

        w.forward = forward
        undo.append(w)
    try:
        return base_model(model)(ids, use_cache=False).logits
    finally:
        for w in undo:
            del w.forward


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
