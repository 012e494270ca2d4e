"""Wrappers: installed once, undone whole, restored after errors, sliding layers left alone."""

import dataclasses

import pytest
import torch
from conftest import SHAPE, gated, padded_batch, tiny
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

import gatekv
from gatekv.attention import AttentionCall, Memory
from gatekv.cache.layer import KVLayer
from gatekv.modules import attach, attention_layers, gated_pass, parallel, wrappers
from gatekv.passes import Observe, Plain, Relaxed


def mixed():
    """Qwen3 with one sliding and one full layer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **{**SHAPE, "num_hidden_layers": 4}, use_sliding_window=True, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).double().eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def test_attach_is_idempotent_and_changes_no_name():
    model = tiny()
    names = [n for n, _ in model.named_modules()]
    attach(model)
    first = wrappers(model)
    attach(model)
    assert [id(w) for w in wrappers(model)] == [id(w) for w in first] and len(first) == 2
    assert [n for n, _ in model.named_modules()] == names
    assert model.config._attn_implementation == "sdpa"


def test_state_dict_of_a_detached_model_is_the_original():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attach(model)
    gatekv.detach(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_contexts_restore_after_an_error():
    model = gated()
    for context in (lambda: parallel(model, "hard", threshold=1.0), lambda: gated_pass(model, Observe())):
        with pytest.raises(RuntimeError), context():
            raise RuntimeError
        assert all(w.running is None for w in wrappers(model))


def test_the_inner_pass_is_in_force_and_the_outer_one_comes_back():
    model = gated(window=4)
    ids, _ = padded_batch([30])

    def logits():
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    plain = logits()
    with gated_pass(model, Relaxed(form="hard")) as outer:
        gates = logits()
        with gated_pass(model, Plain()), pytest.raises(RuntimeError), gated_pass(model, Observe()) as inner:
            assert torch.equal(logits(), plain) and set(inner) == {0, 1}
            raise RuntimeError
        assert torch.equal(logits(), gates) and not torch.equal(gates, plain) and set(outer) == {0, 1}
    assert torch.equal(logits(), plain) and wrappers(model)[0].recorded is None


def test_a_context_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Relaxed().form = "hard"


def test_parallel_needs_gates():
    model = tiny()
    attach(model)
    with pytest.raises(ValueError, match="needs gates"), parallel(model):
        pass


def test_parallel_records_what_the_gates_said():
    model = gated(window=4)
    ids, mask = padded_batch([20, 12])
    with torch.no_grad(), parallel(model) as layers:
        model(ids, attention_mask=mask, use_cache=False)
        logits, valid, *_ = layers[1].recorded
        assert logits.shape == (2, 3, 20) and torch.equal(valid, mask.bool())
    assert layers[1].recorded is None


def test_memory_protocol_is_what_a_cache_layer_offers():
    from transformers import DynamicCache

    model = tiny()
    cache = gatekv.KVCache(model, "full")
    assert isinstance(cache.layers[0], Memory) and isinstance(cache.layers[0], KVLayer)
    assert not isinstance(DynamicCache(config=model.config).layers[0], Memory)
    assert AttentionCall(torch.zeros(1), 0).memory is None


def test_sliding_layers_keep_transformers_own_cache():
    model = mixed()
    ids, mask = padded_batch([40, 31])
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    cache = gatekv.KVCache(model, "full")
    assert [w.layer_idx for w in wrappers(model)] == [1, 3] and len(cache.evicting()) == 2
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert torch.equal(got, wanted)
    small = gatekv.KVCache(model, "keydiff+global", 0.5)
    model.generate(ids, attention_mask=mask, past_key_values=small, max_new_tokens=4, do_sample=False)
    kept = torch.stack(small.flags())[..., :40].sum()
    assert len(small.flags()) == 2 and kept <= 0.5 * (40 + 31) * 3 * 2


@torch.no_grad()
def test_the_law_beside_sliding_layers():
    model = gated(model=mixed(), window=4, sinks=1)
    ids, _ = padded_batch([50])
    with parallel(model):
        wanted = model(ids, use_cache=False).logits
    cache = gatekv.KVCache(model, "gate")
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 21), (21, 22), (22, 50))]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=1e-9, atol=1e-9)


def test_a_model_of_sliding_layers_only_says_so():
    config = MistralConfig(**SHAPE, sliding_window=8)
    with pytest.raises(ValueError, match="bounded already|no `self_attn`"):
        gatekv.KVCache(MistralForCausalLM(config).eval(), "keydiff", 0.5)


def test_attention_layers_are_found_by_name_inside_any_wrapper():
    model = torch.nn.Sequential(tiny())
    assert len(attention_layers(model)) == 2
