"""Text decoders beside something else: images for cross-attention, image towers of their own ways, stacks run in turns."""

import pytest
import torch
from accelerate import Accelerator
from conftest import SHAPE, VOCAB, gated
from test_rotary import NO_TOKENS, model_of
from test_training import ToyData, config
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    HrmTextConfig,
    HrmTextForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

import gatekv
from gatekv.cache.forecast import forecast
from gatekv.modules import wrappers
from gatekv.training.loop import train
from gatekv.training.objective import Objective

IDS = torch.randint(1, 90, (1, 60), generator=torch.Generator().manual_seed(0))
GREEDY = dict(max_new_tokens=8, do_sample=False)
TEXT = SHAPE | NO_TOKENS


def mllama():
    """(model, an image for it): its second layer looks at images alone."""
    torch.manual_seed(0)
    text = TEXT | dict(num_hidden_layers=3, cross_attention_layers=[1], bos_token_id=1, eos_token_id=96)
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
                  image_size=28, patch_size=14, vision_output_dim=64, intermediate_layers_indices=[0], max_num_tiles=1,
                  supported_aspect_ratios=[[1, 1]])  # fmt: skip
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=96))
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for gate in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
                getattr(layer, gate, torch.zeros(1)).fill_(1.0)  # 0 at the start of its training: images say nothing
    ones = torch.ones(1, 1, dtype=torch.long)
    image = dict(pixel_values=torch.randn(1, 1, 1, 3, 28, 28), aspect_ratio_ids=ones, aspect_ratio_mask=ones[None])
    model.generation_config.eos_token_id = None
    return model.eval(), image


@torch.no_grad()
@pytest.mark.parametrize("seen", [True, False])
def test_layers_that_look_at_images_stay_whole(tmp_path, seen):
    model, image = mllama()
    image = image if seen else {}
    cache = gatekv.KVCache(model, "full")
    assert torch.equal(
        model.generate(IDS, past_key_values=cache, **image, **GREEDY), model.generate(IDS, **image, **GREEDY)
    )
    assert [w.layer_idx for w in wrappers(model)] == [0, 2]
    cache = gatekv.KVCache(model, "snapkv", 0.6)
    told = forecast(cache, 60)
    model(IDS, past_key_values=cache, **image)
    assert all(0.5 < flags.float().mean() < 0.7 for flags in cache.flags()) and told.tokens[0] == 36
    twin = cache.snapshot()
    cache.save(tmp_path / "prompt.safetensors")
    loaded = gatekv.KVCache.load(tmp_path / "prompt.safetensors", model)
    assert all(torch.equal(a, b) for a, b in zip(cache.flags(), loaded.flags()))
    one, same, again = (model(IDS[:, :3], past_key_values=c).logits for c in (cache, twin, loaded))
    assert torch.equal(one, same) and torch.equal(one, again)
    blind = gatekv.KVCache(model, "snapkv", 0.6)
    model(IDS, past_key_values=blind)
    assert torch.equal(model(IDS[:, :3], past_key_values=blind).logits, one) == (not seen)


@torch.no_grad()
def test_an_image_tower_may_compute_attention_by_itself():
    """GOT-OCR2, PP-Chart2Table: the text decoder is Qwen2, and asks the interface."""
    torch.manual_seed(0)
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=32, image_size=128, patch_size=16,
                  output_channels=16, window_size=4, global_attn_indexes=[1], use_rel_pos=False)  # fmt: skip
    text = TEXT | dict(model_type="qwen2")
    model = GotOcr2ForConditionalGeneration(GotOcr2Config(vision_config=vision, text_config=text, image_token_index=96))
    pixels, ids = torch.randn(1, 3, 128, 128), torch.cat([IDS[:, :9], torch.full((1, 4), 96), IDS[:, 9:]], 1)
    wanted = model.eval().generate(ids, pixel_values=pixels, **GREEDY)
    full, small = gatekv.KVCache(model, "full"), gatekv.KVCache(model, "streaming_llm", 0.5)
    assert torch.equal(model.generate(ids, pixel_values=pixels, past_key_values=full, **GREEDY), wanted)
    assert not torch.equal(model.generate(ids, pixel_values=pixels, past_key_values=small, **GREEDY), wanted)
    assert small.get_seq_length() == 64 + 7 and torch.stack(small.flags()).float().mean() < 0.6
    names = {type(w.module).__name__ for w in wrappers(model)}
    assert names == {"Qwen2Attention"}
    gatekv.detach(model)
    assert torch.equal(model.generate(ids, pixel_values=pixels, **GREEDY), wanted)


def test_attentions_that_share_a_layer_index_are_refused_and_nothing_is_switched():
    shape = {name: value for name, value in TEXT.items() if name not in ("num_hidden_layers", "num_key_value_heads")}
    model = HrmTextForCausalLM(HrmTextConfig(**shape, num_layers_per_stack=2)).eval()
    with pytest.raises(ValueError, match="HrmTextForCausalLM has 2 attention modules for layer 0 of its cache"):
        gatekv.KVCache(model, "snapkv", 0.5)
    assert not wrappers(model)


@pytest.mark.parametrize("gate", ["linear", "key_mlp"])
def test_llama4_learns(tmp_path, gate):
    """Its rotary is one complex tensor, and its `base_model` is the causal LM itself."""
    model = gated(model=model_of("llama4_text").float(), dtype=torch.float32, gate=gate, window=4, sinks=2)
    assert model.base_model.model.base_model is model.base_model.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    objective = Objective(model.train(), sparsity="budget", oracle_weight=0.3)
    said = objective(ToyData().batch(0, 2), 0.5)
    assert said["task"] > 0 and abs(said["keep"] - 0.5) < 0.02
    train(objective, ToyData(), config(tmp_path, max_steps=1), Accelerator(cpu=True))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("gatekv_gate" in name for name in moved)
    assert VOCAB == objective.head.out_features
