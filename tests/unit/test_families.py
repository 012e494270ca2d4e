"""The laws in short over every family, and clear words for the models that gatekv cannot serve."""

import pytest
import torch
from accelerate import Accelerator
from conftest import (
    KINDS,
    SHAPE,
    assert_close,
    gated,
    padded_batch,
    parallel_logits,
    plain_logits,
    recurrent_logits,
    tiny,
)
from test_training import ToyData, config, make
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

import gatekv
from gatekv.attention import AttentionCall
from gatekv.modules import attention_layers, base_model, gated_pass, wrappers
from gatekv.passes import Observe
from gatekv.support import UNKNOWN_TO_THE_LAW, check_call
from gatekv.training.loop import train


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


@pytest.mark.parametrize("gate", ["linear", "mlp", "key_mlp", "attention"])
def test_parallel_equals_recurrent(kind, gate):
    model = gated(kind, gate=gate, window=6, sinks=2, context_window=9)
    ids, mask = padded_batch([60, 41, 17])
    wanted = parallel_logits(model, ids, mask)
    cache = gatekv.KVCache(model, "gate")
    assert_close(recurrent_logits(model, ids, mask, cache, [7, 30, 31, 32]), wanted, mask)
    assert (wanted - plain_logits(model, ids, mask))[mask.bool()].abs().max() > 1e-3, "the gates evicted something"
    assert len(cache.evicting()) == (1 if "layer_types" in KINDS[kind][1] else 2), "sliding layers are left alone"


@pytest.mark.covering(1)  # test_law has both on two families
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_gates_that_read_the_whole_prompt(kind, mask_prompt):
    model = gated(kind, gate="attention", context="prompt", mask_prompt=mask_prompt, window=5, sinks=2)
    ids, mask = padded_batch([60, 41, 30])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), gatekv.parallel(model, split=40):
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    got = recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate"), [40, 41, 55])
    assert_close(got, wanted, mask)
    assert (wanted - plain_logits(model, ids, mask))[mask.bool()].abs().max() > 1e-3


@pytest.mark.covering(1)  # test_law has every policy
@pytest.mark.parametrize("policy", ["full", "gate+global", "snapkv+ada", "nacl", "fastgen", "d2o+merge_near"])
def test_a_full_budget_is_the_plain_model(kind, policy):
    model = gated(kind, window=6)
    ids, mask = padded_batch([50, 20])
    options = dict(attention_mask=mask, max_new_tokens=16, do_sample=False)
    wanted = base_model(model).generate(input_ids=ids, **options)
    cache = gatekv.KVCache(model, policy, 1.0, decode="keep")
    assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **options), wanted)
    assert all(len(layer.store.pages) > 0 for layer in cache.evicting()), "it must take the same path"
    mask = torch.cat([mask, mask.new_ones(2, 16)], 1)
    got = recurrent_logits(model, wanted, mask, gatekv.KVCache(model, policy, 1.0, decode="keep"), [50, 51, 60])
    assert_close(got, plain_logits(model, wanted, mask), mask)


@pytest.mark.covering(1)  # test_cache has both searches on two families
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_that_evicts_equals_generation_without_a_cache(kind, beams):
    model = gated(kind, window=4, sinks=2, gate="attention", context_window=6)
    ids, mask = padded_batch([30, 22])
    options = dict(attention_mask=mask, max_new_tokens=24, do_sample=False, num_beams=beams)
    with gatekv.parallel(model):
        wanted = model.generate(input_ids=ids, use_cache=False, **options)
    cache = gatekv.KVCache(model, "gate")
    assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **options), wanted)
    assert 0.1 < torch.stack(cache.flags())[..., -51:-6].float().mean() < 0.9, "the search went through evictions"
    assert not torch.equal(model.generate(input_ids=ids, **options), wanted), "and what is evicted matters"


@pytest.mark.covering(1)  # test_turns has more policies
@pytest.mark.parametrize("policy,budget", [("gate", None), ("snapkv+ada", 0.75)])
def test_a_saved_cache_goes_on_as_if_it_had_never_left(tmp_path, kind, policy, budget):
    model = gated(kind, window=6, sinks=2, gate="attention", context_window=6)
    ids, mask = padded_batch([70, 55])
    cache = gatekv.KVCache(model, policy, budget)
    recurrent_logits(model, ids[:, :60], mask[:, :60], cache, [])
    cache.save(tmp_path / "prompt.safetensors")
    loaded = gatekv.KVCache.load(tmp_path / "prompt.safetensors", model)
    assert all(torch.equal(a, b) for a, b in zip(cache.flags(), loaded.flags()))
    positions = (mask.cumsum(-1) - 1)[:, 60:]
    with torch.no_grad():
        a, b = (
            model(ids[:, 60:], attention_mask=mask, position_ids=positions, past_key_values=c).logits
            for c in (cache, loaded)
        )
    assert torch.equal(a, b)


@torch.no_grad()
def test_detaching_is_bit_identical(kind):
    model = tiny(kind)
    ids, mask = padded_batch([40, 25])
    before, names = model(ids, attention_mask=mask).logits, list(model.state_dict())
    gatekv.KVCache(model, "snapkv", 0.5)
    assert wrappers(model) and torch.equal(model(ids, attention_mask=mask).logits, before), (
        "transparent without a cache"
    )
    gatekv.detach(model)
    assert not wrappers(model) and list(model.state_dict()) == names
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_every_gate_parameter_moves_and_no_base_parameter_does(tmp_path, kind):
    module = make(sparsity="budget", relaxation="ste", gate="attention", oracle_weight=0.3, family=kind)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    settings = config(tmp_path, sparsity="budget", target_keep=0.5, max_steps=2)
    train(module, ToyData(), settings, Accelerator(cpu=True))
    for name, p in module.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == ("gatekv_gate" in name), f"{name} {'moved' if moved else 'did not move'}"


# -- what gatekv cannot serve says so, before anything is installed


def other(model_type, **changes):
    """A tiny model of a family that gatekv does not serve."""
    shape = {**SHAPE, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **changes}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape), dtype=torch.float32).eval()


MIXED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
REFUSED = {
    "xglm": (dict(d_model=48, ffn_dim=64, num_layers=2, attention_heads=6), "XGLM.* computes attention by itself"),
    "mistral": (dict(sliding_window=8), "every layer of MistralForCausalLM has a sliding window"),
    "bert": (dict(is_decoder=False), "BertSelfAttention is not causal"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", list(REFUSED))
def test_models_that_would_be_answered_wrongly_are_refused(model_type):
    changes, reason = REFUSED[model_type]
    model = other(model_type, **changes)
    implementation = model.config._attn_implementation
    for use in (lambda: gatekv.KVCache(model, "keydiff", 0.5), lambda: gated(model=model)):
        with pytest.raises(ValueError, match=reason) as error:
            use()
        assert "\n" not in str(error.value)
        assert not wrappers(model) and model.config._attn_implementation == implementation


def test_an_encoder_decoder_is_refused():
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder")
             for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    model = BartForConditionalGeneration(BartConfig(vocab_size=97, d_model=16, max_position_embeddings=32, **sides))
    with pytest.raises(ValueError, match="encoder-decoder"):
        gatekv.KVCache(model, "keydiff", 0.5)


def test_differential_attention_is_refused_where_it_asks_twice():
    model = other("diffllama", num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    with pytest.raises(ValueError, match="DiffLlamaAttention .* calls attention more than once"), torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.long), past_key_values=gatekv.KVCache(model, "full"))


def test_a_bias_inside_the_mask_is_refused():
    model = tiny(dtype=torch.float32)
    model.set_attn_implementation("eager")
    ids, _ = padded_batch([12])
    causal = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)
    near = -0.1 * (torch.arange(12)[:, None] - torch.arange(12)).clamp_min(0)  # ALiBi's
    with torch.no_grad():
        model(ids, attention_mask=causal[None, None], past_key_values=gatekv.KVCache(model, "full"))
        with pytest.raises(ValueError, match="LlamaAttention .* bias .*in the mask"):
            model(ids, attention_mask=(causal + near)[None, None], past_key_values=gatekv.KVCache(model, "full"))


@pytest.mark.parametrize("name", list(UNKNOWN_TO_THE_LAW))
def test_arguments_that_change_attention_are_refused(name):
    model = gated(window=4)
    module = wrappers(model)[0].module
    k = torch.zeros(1, 3, 5, 8)
    harmless = dict(dropout=0.0, is_causal=None, output_attentions=False, position_ids=torch.arange(5)[None])
    check_call(module, k, k, {**harmless, name: None})
    with pytest.raises(ValueError, match=f"LlamaAttention .llama. .*{name}"):
        check_call(module, k, k, {**harmless, name: torch.ones(3)})
    # All the way through the model, where a gate or a cache takes part, and only there.
    ids, _ = padded_batch([12])
    with torch.no_grad(), gatekv.parallel(model), pytest.raises(ValueError, match=name):
        model(ids, use_cache=False, **{name: 3})


def test_other_shapes_and_directions_are_refused():
    w = wrappers(gated())[0]
    module, k = w.module, torch.zeros(1, 3, 5, 8)
    with pytest.raises(ValueError, match="keys of shape .3, 5, 8. and values of shape .3, 4, 8."):
        check_call(module, k, k[:, :, :4], {}, w.geometry)
    with pytest.raises(ValueError, match="2 KV heads of 8 numbers, where its own attributes say 3 KV heads of 8"):
        check_call(module, k[:, :2], k[:, :2], {}, w.geometry)
    with pytest.raises(ValueError, match="3 KV heads of 8 .keys. and 4 .values. numbers, where its own"):
        check_call(module, k, k[..., :4], {}, w.geometry)
    with pytest.raises(ValueError, match="not causal"):
        check_call(module, k, k, dict(is_causal=False), w.geometry)


def test_dropout_of_the_base_is_refused_in_training_only():
    model = gated(model=tiny(dtype=torch.float32, attention_dropout=0.1), dtype=torch.float32, window=4)
    ids, _ = padded_batch([20])
    plain = model(ids, use_cache=False).logits  # eval: nothing is dropped
    with gatekv.parallel(model), torch.no_grad():
        assert not torch.equal(model(ids, use_cache=False).logits, plain)
    model.train()
    with pytest.raises(ValueError, match="attention_dropout=0.0"):
        model(ids, use_cache=False)
    with pytest.raises(ValueError, match="attention_dropout=0.0"), gated_pass(model, Observe()):
        model(ids, use_cache=False)


def test_an_attention_that_never_asks_the_interface_is_noticed():
    class Own(nn.Module):
        layer_idx, config = 0, tiny().config

        def forward(self, hidden_states, past_key_values=None, **kwargs):
            return hidden_states, None

    model = tiny()
    model.model.layers[0].self_attn = Own()
    with pytest.raises(ValueError, match="Own computes attention by itself"):
        gatekv.KVCache(model, "full")
    assert AttentionCall(torch.zeros(1), 0).answered is False


def test_heads_without_groups_need_no_name():
    """OPT's config does not name KV heads; its positions are learned, which changes nothing here."""
    model = gated(
        model=other("opt", num_key_value_heads=None, ffn_dim=64, word_embed_proj_dim=48).double(), window=4, sinks=1
    )
    ids, mask = padded_batch([40])
    wanted = parallel_logits(model, ids, mask)
    assert_close(recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate"), [20, 21]), wanted, mask)
    assert wanted.isfinite().all() and model.peft_config["default"].base_fingerprint["num_key_value_heads"] == 6


def test_an_image_tower_keeps_its_own_attention():
    """Gemma 3 from 4B up comes with one, whose modules are named self_attn too."""
    text = dict(SHAPE, **MIXED, model_type="gemma3_text", query_pre_attn_scalar=8)
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    both = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(both, dtype=torch.float32).double().eval()
    assert sum(n.endswith("self_attn") for n, _ in model.named_modules()) == 4
    assert [m.layer_idx for _, m in attention_layers(model)] == [1]
    model = gated(model=model, window=4, sinks=1)
    ids, mask = padded_batch([40])
    wanted = parallel_logits(model, ids, mask)
    assert_close(recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate"), [20, 21]), wanted, mask)
