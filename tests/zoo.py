"""A tiny random model of every type that transformers can build, and whether gatekv serves it as the plain model does.

`python tests/zoo.py [--image] [--json FILE] [types...]` prints what became of each type.
"""

import argparse
import contextlib
import gc
import inspect
import json
import logging
import os
import time
import traceback
import warnings
from pathlib import Path

if __name__ == "__main__":  # read when transformers is imported: nothing here needs a download
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import gatekv
from gatekv import GateKVConfig
from gatekv.modules import base_model, gates_off, wrappers

VOCAB, FIRST, LAST = 128, 5, 97  # text is drawn from FIRST to LAST; what lies behind means images and the like
LARGEST = 30_000_000  # parameters: a model with more was not shrunk

# -- how a config is cut down

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "layers")
HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
num_encoder_attention_heads num_decoder_attention_heads""".split()
KV_HEADS = "num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads swa_num_key_value_heads".split()
WIDTHS = """embed_dim hidden_size d_model n_embd n_embed embedding_dim embedding_size word_embed_proj_dim dim emb_dim lru_width
out_hidden_size adapter_out_dim projection_dim text_hidden_size projector_hidden_size projection_hidden_dim output_dim
attention_hidden_size projection_hidden_size vision_hidden_size decoder_hidden_size backbone_hidden_size""".split()
INNER = """intermediate_size ffn_dim d_ff dff n_inner dim_ff encoder_ffn_dim decoder_ffn_dim mlp_dim ffn_hidden_size
feed_forward_size d_inner intermediate_size_mlp shared_intermediate_size share_expert_dim expert_ffn_hidden_size
dense_intermediate_size shared_experts_intermediate_size""".split()
EXPERT_INNER = """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
moe_hidden_size""".split()
EXPERTS = "num_experts n_routed_experts num_local_experts moe_num_experts".split()
POSITIONS = (
    "max_position_embeddings n_positions n_ctx max_target_positions max_sequence_length max_seq_len seq_length".split()
)
TEXT = {
    **dict.fromkeys(HEADS, 4), **dict.fromkeys(KV_HEADS, 2), **dict.fromkeys(WIDTHS, 64), **dict.fromkeys(INNER, 96),
    **dict.fromkeys(EXPERT_INNER, 32), **dict.fromkeys(EXPERTS, 4), **dict.fromkeys(POSITIONS, 512),
    "vocab_size": VOCAB, "decoder_vocab_size": VOCAB, "encoder_layers": 4, "num_encoder_layers": 4, "head_dim": 16,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "moe_top_k": 2, "top_k_experts": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "topk_group": 1, "n_group": 1, "first_k_dense_replace": 1,
    "sliding_window": 16, "attention_chunk_size": 16, "attention_window_size": 16, "local_attention": 32,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "qk_head_dim": 24, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16,
    "state_size": 16, "mamba_d_ssm": 128, "time_step_rank": 4, "mamba_dt_rank": 4, "num_nextn_predict_layers": 0,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16, "global_head_dim": 32,
    "query_pre_attn_scalar": 16, "rotary_dim": 8, "expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
TOWER = {
    **dict.fromkeys(HEADS, 2), **dict.fromkeys(KV_HEADS, 2), **dict.fromkeys(WIDTHS, 32), **dict.fromkeys(INNER, 32),
    "num_hidden_layers": 2, "depth": 2, "encoder_layers": 2, "num_layers": 2, "decoder_layers": 2, "layers": 2, "head_dim": 16,
    "out_hidden_size": 64, "adapter_out_dim": 64, "projection_dim": 64, "text_hidden_size": 64, "output_dim": 64,
    "encoder_hidden_size": 32, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
TEXT_NAMES = ("text_config", "decoder", "decoder_config", "llm_config", "language_config", "global_config")
# Model type -> what the rules above do not find; a dictionary is a sub-config's. `keep` chooses layers, `default` is
# what the config is made with before it is cut down.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
S, F, L, C = "sliding_attention", "full_attention", "linear_attention", "conv"
GROUPS = dict(num_expert_group=2, n_group=2, topk_group=1, num_experts_per_token=2, num_experts=8)
KDA = dict(linear_head_dim=16, linear_num_heads=4, model_max_length=512, **GROUPS)
MAMBA1 = dict(mamba_dt_rank=4, attention_hidden_size=128, attention_head_dim=32, layers_block_type=[L, "hybrid"] * 2)
VQ = dict(
    base_channels=32, channel_multiplier=[1, 1], num_embeddings=16, embed_dim=8, latent_channels=8, num_res_blocks=1
)
INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=32, indexer_compress_ratio=4,
               shared_expert_intermediate_size=32, hc_lowrank=8)  # fmt: skip
SWA = dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=24, swa_kv_lora_rank=16,
           swa_head_dim=24, swa_qk_nope_head_dim=16, swa_v_head_dim=16)  # fmt: skip
CHANGES: dict[str, dict] = {
    "dots3_note_text": SWA,
    "dots3_note": dict(text_config=SWA, vision_config=dict(per_layer_config={}, adapter_in_dim=32),
                       audio_config=dict(adapter_input_size=32)),
    "bailing_hybrid": KDA,
    "kimi_linear": KDA,
    "cohere_compass_text": dict(rope_parameters={F: {"rope_type": "default", "rope_theta": 10000.0}}),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16, num_experts=4, moe_topk=2),
    "lfm2_moe": dict(layer_types=[C, F, C, F], num_dense_layers=1),
    "mamba2": dict(head_dim=32),
    "mistral": dict(sliding_window=None),  # as mistralai/Mistral-7B-Instruct-v0.3
    "ministral": dict(head_dim=16, layer_types=[S, F] * 2),  # as mistralai/Ministral-8B-Instruct-2410
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp_text": dict(INDEXER, intermediate_size=96),
    "qwen4_exp": dict(text_config=dict(INDEXER, intermediate_size=96)),
    "reformer": dict(num_buckets=4, attn_layers=["local", "lsh"] * 2, attention_head_size=16, axial_pos_shape=(16, 32), axial_pos_embds_dim=(32, 32)),
    "xmod": dict(default_language="en_XX"),
    "xlstm": dict(chunk_size=64, hidden_size=128, embedding_dim=128),
    "zamba": MAMBA1,
    "zamba2": dict(mamba_headdim=16, attention_hidden_size=128, attention_head_dim=32, n_mamba_heads=8, mamba_d_state=16,
                   layers_block_type=[L, "hybrid"] * 2, hybrid_layer_ids=[1, 3], num_query_groups=4, kv_channels=16),
    "glm4v_moe": dict(text_config=dict(rope_parameters=dict(MROPE, mrope_section=[2, 1, 1], partial_rotary_factor=0.5))),
    **{name: dict(text_config=dict(rope_parameters=MROPE))
       for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl")},
    "qwen2_vl": dict(text_config=dict(rope_parameters=MROPE), vision_config=dict(embed_dim=32, hidden_size=64)),
    "ernie4_5_vl_moe": dict(text_config=dict(rope_parameters=dict(MROPE, mrope_section=[3, 3, 2]))),
    "blt": dict(
        encoder_hash_byte_group_vocab=101, encoder_hash_byte_group_size=[3, 4],
        encoder_config=dict(hidden_size_global=64, hidden_size=64, num_attention_heads=4, num_key_value_heads=4),
        decoder_config=dict(hidden_size_global=64, num_key_value_heads=4),
        global_config=dict(num_key_value_heads=4), patcher_config=dict(num_key_value_heads=2),
    ),
    "dbrx": dict(attn_config=dict(rope_theta=10000.0, kv_n_heads=2, clip_qkv=8.0), ffn_config=dict(hidden_size=64, ffn_hidden_size=96)),
    "chameleon": dict(vocabulary_map={"<image>": 120}, vq_config=VQ),
    "emu3": dict(vocabulary_map={"<image>": 120}, vq_config=dict(VQ, codebook_size=16, hidden_size=64, latent_channels=4)),
    "janus": dict(vq_config=dict(VQ, image_token_embed_dim=64, projection_dim=64), vision_config=dict(projection_dim=64)),
    "cohere_compass": dict(text_config=dict(rope_parameters={F: {"rope_type": "default", "rope_theta": 10000.0}})),
    "deepseek_ocr2": dict(text_config=dict(num_experts_per_tok=2, mlp_layer_types=["dense"] + ["sparse"] * 3)),
    "florence2": dict(
        vision_config=dict(depths=(1,) * 4, embed_dim=(8, 16, 32, 64), num_heads=(1, 2, 4, 8), num_groups=(1, 2, 4, 8),
                           projection_dim=64)
    ),
    "glm5_next": dict(text_config=dict(qk_rope_head_dim=0)),
    "granite4_vision": dict(downsample_rate="1/2", deepstack_layer_map=[], vision_config=dict(hidden_size=64),
                            qformer_config=dict(hidden_size=64, encoder_hidden_size=64)),
    "inkling_mm_model": dict(vision_config=dict(n_layers=2, text_hidden_size=64, hidden_size=32, patch_size=8)),
    "qwen2_5_omni_thinker": dict(vision_start_token_id=120, text_config=dict(rope_parameters=MROPE)),
    "molmo2": dict(adapter_config=dict(vision_feature_layer=[1, 0], text_hidden_size=64)),
    "muse_spark": dict(audio_config=dict(num_hidden_layers=4, hidden_sizes=(8, 16, 32, 64), depths=(1,) * 4)),
    "qwen3_omni_moe_thinker": dict(vision_start_token_id=120, text_config=dict(num_experts=4)),
    "step3p7": dict(text_config=dict(
        layer_types=[F, S, S, S], sliding_window=16, num_sliding_attention_heads=8,
        rope_parameters={n: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": p}
                         for n, p in ((F, 0.5), (S, 1.0))})),
    "hunyuan_vl": dict(text_config=dict(head_dim=16, rope_parameters=dict(MROPE, mrope_section=[2, 2, 2, 2]))),
}  # fmt: skip
# The shape of released models, cut down in depth and width only: pattern of layers, heads, sinks, windows.
PARTIAL = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
GATED_DELTA = dict(keep=range(4), num_attention_heads=8, num_key_value_heads=1, head_dim=32)
QWEN35 = dict(GATED_DELTA, rope_parameters=dict(PARTIAL, mrope_section=[2, 1, 1], mrope_interleaved=True))
QWEN35_DENSE = dict(QWEN35, num_key_value_heads=2)
WIDE = dict(keep=range(6), num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32)
SHARING = dict(
    num_hidden_layers=10, layer_types=([S] * 4 + [F]) * 2, num_kv_shared_layers=5, num_attention_heads=8,
    num_key_value_heads=1, head_dim=16, hidden_size_per_layer_input=16,
)  # fmt: skip
GEMMA4_31B = dict(
    keep=range(6), attention_k_eq_v=True, num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=2,
    head_dim=16, global_head_dim=32, hidden_size_per_layer_input=0,
)  # fmt: skip
LATENT = dict(num_attention_heads=8, num_key_value_heads=8, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
REAL: dict[str, dict] = {
    "qwen3_next": dict(GATED_DELTA, rope_parameters=PARTIAL),  # as Qwen/Qwen3-Next-80B-A3B-Instruct
    "qwen3_5_text": QWEN35_DENSE,  # as Qwen/Qwen3.5-9B
    "qwen3_5": dict(text_config=QWEN35_DENSE),
    "qwen3_5_moe_text": QWEN35,  # as Qwen/Qwen3.5-35B-A3B
    "qwen3_5_moe": dict(text_config=QWEN35),
    "gemma3_text": dict(WIDE, num_key_value_heads=1),  # as google/gemma-3-1b-it
    "gemma3": dict(text_config=WIDE),  # as google/gemma-3-4b-it
    "gemma3n_text": dict(SHARING, intermediate_size=[96] * 10, activation_sparsity_pattern=[0.95] * 5 + [0.0] * 5,
                         num_key_value_heads=2, laurel_rank=8),  # as google/gemma-3n-E2B-it
    "gemma4": dict(text_config=GEMMA4_31B),  # as google/gemma-4-31B-it
    "gemma4_text": dict(SHARING, global_head_dim=32, use_double_wide_mlp=True),  # as google/gemma-4-E2B-it
    "gemma2": dict(head_dim=32, query_pre_attn_scalar=32, attn_logit_softcapping=50.0, keep=range(4)),  # google/gemma-2-9b
    "gpt_oss": dict(num_attention_heads=8, num_key_value_heads=1, head_dim=16, keep=range(4)),  # as openai/gpt-oss-20b
    "llama4_text": dict(keep=range(4), num_attention_heads=5, num_key_value_heads=1),  # as Llama-4-Scout-17B-16E
    "llama4": dict(text_config=dict(keep=range(4), num_attention_heads=5, num_key_value_heads=1)),
    "glm4": dict(num_attention_heads=16, num_key_value_heads=1,
                 rope_parameters=dict(PARTIAL, partial_rotary_factor=0.5)),  # as THUDM/GLM-4-9B-0414
    "glm4_moe": dict(num_attention_heads=12, num_key_value_heads=1, attention_bias=True, use_qk_norm=True,
                     rope_parameters=dict(PARTIAL, partial_rotary_factor=0.5)),  # as zai-org/GLM-4.5
    "minimax": dict(num_hidden_layers=8, layer_types=[L] * 7 + [F], head_dim=16, block_size=16, num_attention_heads=8,
                    num_key_value_heads=1),  # as MiniMaxAI/MiniMax-Text-01
    "mimo_v2_flash": dict(
        keep=range(6), num_attention_heads=16, num_key_value_heads=1, head_dim=24, v_head_dim=16,
    ),  # as XiaomiMiMo/MiMo-V2-Flash
    "phi3": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=96, original_max_position_embeddings=256,
                 sliding_window=None, rope_parameters=dict(PARTIAL, rope_type="longrope", partial_rotary_factor=0.75,
                 short_factor=[1.0] * 6, long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
                 original_max_position_embeddings=256)),  # as microsoft/Phi-4-mini-instruct
    "phi": dict(num_key_value_heads=4),  # as microsoft/phi-1_5
    "deepseek_v2": dict(LATENT, q_lora_rank=None, topk_method="greedy", num_experts_per_tok=2),  # as deepseek-ai/DeepSeek-V2-Lite
    "deepseek_v3": dict(LATENT, n_group=2, topk_group=1),  # as deepseek-ai/DeepSeek-V3
    "lfm2_vl": dict(text_config=dict(num_hidden_layers=6, layer_types=[C, C, F] * 2, full_attn_idxs=None)),  # as LiquidAI/LFM2-VL-1.6B
    "idefics2": dict(text_config=dict(sliding_window=None)),
    "lfm2": dict(num_attention_heads=8, num_hidden_layers=6, layer_types=[C, C, F] * 2, full_attn_idxs=None),  # as LiquidAI/LFM2-1.2B
    "bamba": dict(num_hidden_layers=6, attn_layer_indices=[2, 5]),  # as ibm-ai-platform/Bamba-9B-v2
    "jamba": dict(num_hidden_layers=8, attn_layer_period=4, attn_layer_offset=2),  # as ai21labs/AI21-Jamba-Mini-1.5
    "granitemoehybrid": dict(num_hidden_layers=6, layer_types=[L, L, F] * 2, num_attention_heads=12, head_dim=16,
                             num_key_value_heads=4, hidden_size=192, mamba_n_heads=24,
                             position_embedding_type="nope"),  # as ibm-granite/granite-4.0-h-tiny
    "nemotron_h": dict(layers_block_type=[L, "moe", L, F, "moe", L, F, "mlp"], num_attention_heads=16,
                       num_key_value_heads=1),  # as nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
    "zaya": dict(num_experts_per_tok=1, num_attention_heads=8, num_key_value_heads=2),  # as Zyphra/ZAYA1-base
    "cohere2": dict(keep=range(4), num_attention_heads=8, num_key_value_heads=2),  # as CohereLabs/c4ai-command-r7b-12-2024
    "olmo3": dict(keep=range(4), num_attention_heads=4, num_key_value_heads=4),  # as allenai/Olmo-3-7B-Instruct
    "smollm3": dict(keep=range(4), num_attention_heads=8, num_key_value_heads=2),  # as HuggingFaceTB/SmolLM3-3B
    "exaone4": dict(num_attention_heads=10, num_key_value_heads=2, layer_types=[S, S, S, F], head_dim=16,
                    sliding_window_pattern=4),  # as LGAI-EXAONE/EXAONE-4.0-32B
}  # fmt: skip
# Types that cannot be built, or be driven by token ids alone.
TIMM = "its image tower comes from the package timm, which is not a dependency."
PIXELS = "its forward wants an image beside the token ids."
UNBUILT: dict[str, str] = {
    "gemma4_assistant": "it drafts from the hidden states and the cache of another model.",
    "gemma4_unified_assistant": "it drafts from the hidden states and the cache of another model.",
    "musicgen": "it reads several streams of audio codes a row, not token ids.",
    "musicgen_melody": "it reads several streams of audio codes a row, not token ids.",
    "blt": "transformers' own generate fails on its config, which has no `num_hidden_layers`.",
    "gemma3n": TIMM,
    "fast_vlm": TIMM,
    "perception_lm": TIMM,
    **dict.fromkeys("blip blip-2 idefics instructblip instructblipvideo kosmos-2 pix2struct pp_formulanet "
                    "vision-encoder-decoder".split(), PIXELS),
    "florence2": "it is an encoder-decoder: the tokens that it reads are not those that it continues.",
    "t5gemma2": "it is an encoder-decoder whose encoder wants its own input.",
    "udop": "it wants the bounding box of each token.",
    "pi0": "it gives a robot's actions, not tokens.",
    "evolla": "it answers about a protein that it must be given, and its mapping's class takes no such config.",
    "diffusion_gemma": "it denoises a canvas of tokens and has no causal decoding.",
}  # fmt: skip


def causal_types() -> list[str]:
    return list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_types() -> list[str]:
    return list(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def chosen_layers(values: dict, count: int) -> list[int]:
    """Which layers stay: of each kind the first, then of each the second, until there are four."""
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == count]
    kinds: dict[str, list[int]] = {}
    for i in range(count):
        kinds.setdefault(repr([v[i] for v in lists if not isinstance(v[i], float)]), []).append(i)
    groups = list(kinds.values())[:6]
    order = [g[turn] for turn in range(4) for g in groups if turn < len(g)]
    return order[: max(4, len(groups))]


def smaller_rope(rope: dict, half: int) -> dict:
    """Sections of a rotation over several axes add up to half of what is rotated."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: smaller_rope(v, half) if isinstance(v, dict) else v for k, v in rope.items()}
    if "mrope_section" not in rope:
        return rope
    n = int(half * rope.get("partial_rotary_factor", 1.0))
    sections = [n // len(rope["mrope_section"])] * len(rope["mrope_section"])
    sections[0] += n - sum(sections)
    return {**rope, "mrope_section": sections}


def same(a, b) -> bool:
    return isinstance(b, PreTrainedConfig) or a == b


def shrink(config: PreTrainedConfig, changes: dict, text: bool = True, ids: list | None = None) -> PreTrainedConfig:
    """The same config, tiny. changes: what is set by name in place of the rules."""
    ids = list(range(VOCAB - 1, LAST, -1)) if ids is None else ids
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    rules = dict(TEXT if text else TOWER)
    count = next((values[n] for n in LAYERS if isinstance(values.get(n), int)), None)
    keep = (changes.get("keep") or chosen_layers(values, count)) if text and count else None
    own: dict = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            part = changes.get(name, {})
            own[name] = shrink(value, part, name in TEXT_NAMES, ids) if isinstance(part, dict) else part
        elif keep and name in LAYERS and isinstance(value, int):
            own[name] = len(keep)
        elif keep and isinstance(value, (list, tuple)) and len(value) == count and count > 1:
            own[name] = [value[i] for i in keep]
        elif name in rules and (type(value) in (int, float, bool) or name.endswith("token_id")):
            own[name] = rules[name]
        elif type(value) is int and value >= LAST and name.endswith(("token_id", "token_index", "_id")):
            own[name] = ids.pop(0)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and text:
            own[name] = smaller_rope(value, changes.get("head_dim", 16) // 2)
        elif name == "is_decoder":
            own[name] = True
    if own.get("kv_lora_rank") or values.get("kv_lora_rank"):  # each head has its own keys, made of one latent vector
        own["num_key_value_heads"] = own.get("num_attention_heads", 4)
        if values.get("head_dim") == values.get("qk_rope_head_dim"):
            own["head_dim"] = changes.get("qk_rope_head_dim", own.get("qk_rope_head_dim"))
    default = vars(type(config)())
    own |= {k: v for k, v in values.items() if k not in own and k in default and not same(default[k], v)}
    own.update({k: v for k, v in changes.items() if k != "keep" and not isinstance(values.get(k), PreTrainedConfig)})
    return type(config)(**own)


def merged(changes: dict, more: dict) -> dict:
    """Both; what is in both and a dictionary is merged too, and else more's."""
    both = {
        k: merged(changes[k], v) for k, v in more.items() if isinstance(v, dict) and isinstance(changes.get(k), dict)
    }
    return {**changes, **more, **both}


def build(model_type: str, image: bool = False, dtype=torch.float32, seed: int = 0, more: dict | None = None):
    """A tiny random model in eval mode whose attention is peaked; ValueError where it cannot be built.

    more: what is set in its config beside `CHANGES` and `REAL`.
    """
    if model_type in UNBUILT:
        raise ValueError(UNBUILT[model_type])
    changes = merged({**CHANGES.get(model_type, {}), **REAL.get(model_type, {})}, more or {})
    config = shrink(CONFIG_MAPPING[model_type](**changes.pop("default", {})), changes)
    if not image and getattr(config, "is_encoder_decoder", False):
        config.is_encoder_decoder = False
    auto = AutoModelForImageTextToText if image else AutoModelForCausalLM
    with torch.device("meta"):
        sizes = {n: p.shape for n, p in auto.from_config(config).named_parameters()}
    if sum(s.numel() for s in sizes.values()) > LARGEST:
        large = sorted(sizes.items(), key=lambda item: -item[1].numel())[:6]
        raise RuntimeError(f"not shrunk: {[(n, tuple(s)) for n, s in large]}")
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():  # families differ in how they initialise, and most say too little
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.2 * noise if p.dim() > 1 else p + 0.1 * noise)
    model = model.to(dtype).eval()
    if any("experts" in n for n, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the default, a grouped matrix product, has no float64
    model.generation_config.update(pad_token_id=0, bos_token_id=1)
    model.generation_config.eos_token_id = None
    return model


# -- how it is driven


def inputs(model, lengths=(60, 41), seed: int = 3) -> dict:
    """Left-padded rows of random text: ids, mask, and positions where the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(FIRST, LAST, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def takes(model, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


@torch.no_grad()
def logits(model, batch, cuts=(), cache=None, use_cache=True):
    """Logits of a batch that arrives in several calls."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    edges, pieces = [0, *cuts, ids.shape[1]], []
    for a, b in zip(edges, edges[1:]):
        call = dict(input_ids=ids[:, a:b], attention_mask=mask[:, :b], use_cache=use_cache)
        if takes(base_model(model), "position_ids"):
            call["position_ids"] = positions[:, a:b].contiguous()
        if cache is not None:
            call["past_key_values"] = cache
        out = model(**call)
        pieces.append(out.logits)
        if use_cache:
            cache = out.past_key_values
    return torch.cat(pieces, 1)


def difference(a, b, mask) -> float:
    """Largest difference at real tokens, relative to the largest number."""
    b = b[mask.bool()]
    return float((a[mask.bool()] - b).abs().max() / b.abs().max())


def generate(model, batch, **options):
    return model.generate(**batch, max_new_tokens=8, do_sample=False, **options)


def plain_runs(model) -> None:
    """The model alone answers, in finite numbers, and generates."""
    batch = inputs(model)
    out = logits(model, batch, use_cache=False)
    assert out[batch["attention_mask"].bool()].isfinite().all(), "the plain model's logits are not finite"
    assert out.shape[:2] == batch["input_ids"].shape, f"logits of shape {tuple(out.shape)}"
    assert generate(model, batch).shape[1] > 60, "the plain model generates nothing"


def close(what: str, got, wanted, mask, tolerance: float) -> float:
    found = difference(got, wanted, mask)
    assert found <= tolerance, f"{what}: {found:.1e}"
    return found


def own_cache_gap(model) -> float:
    """How far the plain model with its own cache is from itself without."""
    batch = inputs(model, (68, 49))
    got, wanted = logits(model, batch, (7, 30, 60, 61)), logits(model, batch, use_cache=False)
    return difference(got, wanted, batch["attention_mask"])


def check(model, tolerance: float = 1e-5) -> float:
    """A full budget is the plain model, in prefill, in chunks and in decoding; half a budget saves memory.

    Returns the largest relative difference from the plain model.
    """
    batch, worst = inputs(model, (68, 49)), 0.0
    mask, steps = batch["attention_mask"], range(60, 68)
    whole = logits(model, batch, use_cache=False)
    for policy in ("snapkv", "full"):
        for name, cuts, prompt in (("prefill and decode", [*steps], None), ("chunks", [7, 30, *steps], 60)):
            cache = gatekv.KVCache(model, policy, 1.0, decode="keep", prompt_tokens=prompt)
            got, wanted = logits(model, batch, cuts, cache), whole
            if difference(got, whole, mask) > tolerance:  # the plain model's own cache may say something else too
                wanted = logits(model, batch, cuts)
            worst = max(worst, close(f"{policy}, {name}", got, wanted, mask, tolerance))
    prompt = inputs(model)
    wanted = generate(model, prompt)
    got = generate(model, prompt, past_key_values=gatekv.KVCache(model, "snapkv", 1.0, decode="keep"))
    assert torch.equal(got, wanted), "generate at a full budget gives other tokens"
    alone = {k: v[1:, 19:] for k, v in batch.items()}
    plain = difference(logits(model, alone, use_cache=False), whole[1:, 19:], alone["attention_mask"])
    for policy in ("streaming_llm", "snapkv"):
        cache = gatekv.KVCache(model, policy, 0.5, window=4)
        got = logits(model, batch, [*steps], cache)
        assert got[mask.bool()].isfinite().all(), f"{policy}: not finite"
        ratio = cache.memory()["ratio"]
        assert ratio < 1, f"{policy}: half a budget holds {ratio}"
        cache = gatekv.KVCache(model, policy, 0.5, window=4)
        row = logits(model, alone, [s - 19 for s in steps], cache)
        if plain <= tolerance:
            close(f"{policy}, row alone", row, got[1:, 19:], alone["attention_mask"], tolerance)
    return worst


def gated(model):
    """The model as a PEFT model whose random gates drop about half of the tokens."""
    dtype = next(model.parameters()).dtype
    peft = get_peft_model(model, GateKVConfig(gate="linear", window=4, sinks=2)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for w in wrappers(peft):
        for name, p in w.gatekv_gate["default"].named_parameters() if w.active() else ():
            with torch.no_grad():
                if name in ("out.weight", "out_weight", "distance"):
                    p.copy_(torch.randn(p.shape, generator=generator))
                if name in ("out.bias", "out_bias"):
                    p.zero_()
    return peft.eval()


def check_gates(model, tolerance: float = 1e-4) -> float:
    """What is trained is what is deployed, and every gate learns. Returns the relative difference of the two forms."""
    peft = gated(model)
    batch = inputs(model, (60, 41))
    mask = batch["attention_mask"]
    with gatekv.parallel(peft):
        wanted = logits(peft, batch, use_cache=False)
    with gates_off(peft):
        off = logits(peft, batch, use_cache=False)
    assert (effect := difference(off, wanted, mask)) > 1e-4, "the gates evict nothing"
    gaps = []
    for cuts in ((7, 30, 31, 32), range(40, 60)):  # in chunks; where the plain model differs then, the prompt whole
        got = logits(peft, batch, cuts, gatekv.KVCache(peft, "gate"))
        if (found := difference(got, wanted, mask)) <= tolerance:
            break
        with gates_off(peft):
            plain = difference(logits(peft, batch, cuts), off, mask)
        gaps.append(f"{found:.1e} (the plain model's own cache: {plain:.1e}, what the gates change: {effect:.1e})")
        assert plain > tolerance, f"the two forms differ: {', '.join(gaps)}"
        if found <= 2 * plain and found <= effect / 20:  # as the plain model rounds, and far from another choice
            break
    else:
        raise AssertionError(f"the two forms differ: {', '.join(gaps)}")
    peft.train()
    with gatekv.parallel(peft, "ste"):
        kinds = [n for n in ("token_type_ids", "mm_token_type_ids") if takes(base_model(peft), n)]  # all of it is text
        call = dict(batch, use_cache=False, **{n: torch.zeros_like(mask) for n in kinds})
        peft(**call).logits.float().logsumexp(-1).mean().backward()
    for name, p in peft.named_parameters():
        if "gatekv_gate" in name:
            assert p.grad is not None and p.grad.isfinite().all(), f"{name} has no finite gradient"
    for w in wrappers(peft):
        grads = [p.grad.abs().max() for p in w.gatekv_gate["default"].parameters()]
        assert max(grads) > 0, f"the gate of layer {w.layer_idx} has no gradient"
    return found


# -- the survey


def outcome(function, *args) -> str:
    """ok, refused, wrong or crash, and what was said."""
    try:
        return f"ok {function(*args):.0e}"
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError) and Path(frames[-1].filename).parts[-2:-1] != ("tests",):
            if Path(gatekv.__file__).parent in Path(frames[-1].filename).parents:
                return f"refused: {text}"
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        return f"crash: {type(error).__name__} {text} ({where})"


def survey_type(model_type: str, image: bool) -> dict:
    start, found = time.perf_counter(), {"type": model_type}
    if model_type in UNBUILT:
        return {**found, "plain": f"unbuilt: {UNBUILT[model_type]}"}

    def made(dtype):
        model = build(model_type, image, dtype)
        plain_runs(model)
        return model

    model, said = None, ""
    for dtype in (torch.float64, torch.float32):
        try:
            model = made(dtype)
            break
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__} {' '.join(str(error).split())[:300]} ({Path(frame.filename).name}:{frame.lineno})"
    if model is None:
        return {**found, "plain": f"crash: {said}", "seconds": time.perf_counter() - start}
    found.update(plain="ok", dtype=str(dtype).split(".")[1], model=type(model).__name__)
    with contextlib.suppress(Exception):  # of models without such a cache
        if (gap := own_cache_gap(model)) > 1e-5:
            found["own_cache_gap"] = f"{gap:.0e}"
    found["cache"] = outcome(check, model)
    gatekv.detach(model)
    if found["cache"].startswith("refused"):
        found["gates"] = outcome(check_gates, model)
    else:
        found["gates"] = outcome(check_gates, build(model_type, image, dtype))
    found["seconds"] = round(time.perf_counter() - start, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--image", action="store_true", help="of the image-text-to-text mapping")
    parser.add_argument("--json", type=Path, help="file that results are added to")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for model_type in args.types or (image_types() if args.image else causal_types()):
        found = survey_type(model_type, args.image)
        print(" | ".join(f"{k} {v}" if k != "type" else str(v) for k, v in found.items()), flush=True)
        results[model_type] = found
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
        gc.collect()


if __name__ == "__main__":
    main()
