"""Random two-layer models of each family, and gates with something to say."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gatekv import GateKVConfig
from gatekv.modules import wrappers

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
            if name.startswith("out.weight") or name == "distance":
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator))
            if name == "out.bias":
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


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
