"""Attention that is more than softmax over keys of each head: under every policy a full budget is the plain model, and
each row of a batch is itself."""

import pytest
import torch
import zoo
from peft import get_peft_model

import gatekv
from gatekv import GateKVConfig
from gatekv.modules import base_model, wrappers

# Learned sinks; keys and values that later layers read; latents; capped scores; values narrower than keys; one KV head.
KINDS = ["gpt_oss", "gemma4_text", "deepseek_v3", "gemma2", "mimo_v2_flash", "gpt_bigcode"]
POLICIES = {
    "h2o": 0.5, "tova": 0.5, "streaming_llm": 0.5, "l2": 0.5, "snapkv+ada": 0.5, "keydiff+pyramid": 0.6, "nacl": 0.5,
    "fastgen": 0.5, "d2o": 0.8, "elastic": 0.6, "snapkv+global": 0.5, "h2o+qaq": 0.5, "snapkv+think": 0.8,
}  # fmt: skip
APART = ("d2o", "elastic", "h2o+qaq", "snapkv+think")  # treat keys and values apart, which latents do not have
START, LONG = 60, 68
TOLERANCE = {"gemma2": 2e-5, "deepseek_v3": 1e-6, "mimo_v2_flash": 1e-6}


def built(kind):
    return zoo.build(kind, dtype=torch.float32 if kind == "gemma2" else torch.float64)


def gated(kind):
    """With gates of a PEFT adapter that drop about half of the tokens."""
    model = built(kind)
    peft = get_peft_model(model, GateKVConfig(gate="linear", window=4, sinks=2)).to(model.dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for w in wrappers(peft):
        out = w.gatekv_gate["default"].out
        with torch.no_grad():
            out.weight.copy_(torch.randn(out.weight.shape, generator=generator))
            out.bias.zero_()
    return peft


@torch.no_grad()
def go_on(model, batch, cache, start):
    """Logits of what follows the first `start` tokens, which the cache has seen, token by token."""
    mask, outs = batch["attention_mask"], []
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for i in range(start, mask.shape[1]):
        places = {"position_ids": positions[:, i : i + 1]} if zoo.takes(base_model(model), "position_ids") else {}
        ids = batch["input_ids"][:, i : i + 1]
        outs.append(model(ids, attention_mask=mask[:, : i + 1], past_key_values=cache, **places).logits)
    return torch.cat(outs, 1)


def assert_close(kind, got, wanted, mask):
    assert zoo.difference(got, wanted, mask) <= TOLERANCE.get(kind, 1e-9)


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_budget_and_rows_alone(kind, policy):
    if kind == "deepseek_v3" and policy in APART:
        with pytest.raises(ValueError, match="caches latents .MLA., whose values are a part of their keys"):
            gatekv.KVCache(built(kind), policy, 0.5)
        return
    model, steps = built(kind), [*range(START, LONG)]
    batch = zoo.inputs(model, (LONG, 49))
    mask = batch["attention_mask"]
    if "+qaq" not in policy and "+think" not in policy:
        wanted = zoo.logits(model, batch, use_cache=False)
        cache = gatekv.KVCache(model, policy, 1.0, decode="keep")
        assert_close(kind, zoo.logits(model, batch, steps, cache), wanted, mask)
    cache = gatekv.KVCache(model, policy, POLICIES[policy], window=4, sinks=2)
    got = zoo.logits(model, batch, steps, cache)
    assert cache.memory()["gated_ratio"] < 1.4 and got[mask.bool()].isfinite().all()  # half-empty pages of few tokens
    alone = {name: t[1:, LONG - 49 :] for name, t in batch.items()}
    cache = gatekv.KVCache(model, policy, POLICIES[policy], window=4, sinks=2)
    row = zoo.logits(model, alone, [s - (LONG - 49) for s in steps], cache)
    assert_close(kind, row, got[1:, LONG - 49 :], alone["attention_mask"])


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_deployed_as_they_are_trained(kind):
    model = gated(kind)
    batch = zoo.inputs(model)
    with gatekv.parallel(model):
        wanted = zoo.logits(model, batch, use_cache=False)
    got = zoo.logits(model, batch, (7, 30, 31, 32), gatekv.KVCache(model, "gate"))
    assert_close(kind, got, wanted, batch["attention_mask"])
    plain = zoo.logits(base_model(model).eval(), batch, use_cache=False)
    assert zoo.difference(wanted, plain, batch["attention_mask"]) > 1e-4, "the gates evicted something"


@pytest.mark.parametrize("kind", ["gemma4_text", "deepseek_v3"])
def test_layers_that_are_computed_again_give_the_same_gradients(kind):
    grads = []
    for again in (False, True):
        model = gated(kind).train()
        if again:
            model.gradient_checkpointing_enable()
        with gatekv.parallel(model, "ste"):
            model(**zoo.inputs(model), use_cache=False).logits.logsumexp(-1).mean().backward()
        grads.append([p.grad for name, p in model.named_parameters() if "gatekv_gate" in name])
    for a, b in zip(*grads):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy,budget", [("gate", None), ("gate+global", 0.5), ("h2o", 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_files_beams_and_bytes(kind, policy, budget, tmp_path):
    model = gated(kind)
    batch, options = zoo.inputs(model, (START, 41)), {} if budget is None else dict(window=4, sinks=2)
    cache = gatekv.KVCache(model, policy, budget, **options)
    start = {name: t[:, : START - 6] for name, t in batch.items()}
    zoo.logits(model, start, (), cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded, snapshot = gatekv.KVCache.load(tmp_path / "cache.safetensors", model), cache.snapshot()
    cut = START - 6

    wanted = go_on(model, batch, cache, cut)
    assert torch.equal(go_on(model, batch, loaded, cut), wanted)
    assert torch.equal(go_on(model, batch, snapshot, cut), wanted)
    assert loaded.memory()["gated_full_bytes"] == cache.memory()["gated_full_bytes"]
    beams = dict(max_new_tokens=6, do_sample=False, num_beams=2)
    plain = base_model(model).generate(**batch, **beams)
    full = gatekv.KVCache(model, "snapkv", 1.0, decode="keep")
    assert torch.equal(model.generate(**batch, past_key_values=full, **beams), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prefill_decides_as_one_of_its_own(kind):
    model = built(kind)
    batch = zoo.inputs(model, (LONG, 49))
    cut = {name: t[:, :START] for name, t in batch.items()}
    undecided = gatekv.KVCache.undecided(model)
    zoo.logits(model, cut, (), undecided)
    for policy in ("snapkv", "h2o", "streaming_llm"):
        decided, own = undecided.decide(policy, 0.5, window=4), gatekv.KVCache(model, policy, 0.5, window=4)
        zoo.logits(model, cut, (), own)
        assert decided.memory()["gated_bytes"] == own.memory()["gated_bytes"]
        outs = [go_on(model, batch, held, START) for held in (decided, own)]
        assert torch.equal(*outs)


def test_what_later_layers_cannot_follow_is_refused_before_anything_changes():
    model = built("gemma4_text")
    batch = zoo.inputs(model, (40, 40))
    cache = gatekv.KVCache(model, "h2o", 0.5, window=4)
    first = {name: t[:, :30] for name, t in batch.items()}
    zoo.logits(model, first, (), cache)
    with pytest.raises(ValueError, match="feed what follows the prompt token by token"), torch.no_grad():
        model(batch["input_ids"][:, 30:], attention_mask=batch["attention_mask"], past_key_values=cache)
    assert cache.evicting()[0].seen == 30
    cache = gatekv.KVCache(model, "snapkv", 0.5, window=4, prompt_tokens=20)
    with pytest.raises(ValueError, match="feed the prompt in a call of its own"):
        zoo.logits(model, first, (), cache)
    with pytest.raises(ValueError, match="low-rank maps belong to the queries of one layer"):
        get_peft_model(model, GateKVConfig(gate="none", less_rank=4))
    assert not wrappers(model) or not any(w.gatekv_less for w in wrappers(model))


def test_latents_refuse_what_takes_keys_and_values_apart():
    model = built("deepseek_v3")
    for config, said in ((dict(gate="key_mlp"), "use mlp"), (dict(gate="none", less_rank=4), "less_rank=0")):
        with pytest.raises(ValueError, match=f"caches latents .MLA.*{said}"):
            get_peft_model(model, GateKVConfig(**config))
    with pytest.raises(ValueError, match="positions='original'"):
        gatekv.KVCache(model, gatekv.policies.StreamingLLM(positions="cache"), 0.5)
    with pytest.raises(ValueError, match="use 'torch'"):
        gatekv.KVCache(model, "snapkv", 0.5, backend="triton")
    assert not wrappers(model) or all(not w.in_force() for w in wrappers(model))


def test_one_kv_head_is_stored_once():
    model = built("gpt_bigcode")
    cache = gatekv.KVCache(model, "snapkv", 0.5, window=4)
    zoo.logits(model, zoo.inputs(model), (), cache)
    assert [w.geometry.kv_heads for w in wrappers(model)] == [1] * len(wrappers(model))
    assert {layer.window.keys.shape[1] for layer in cache.evicting()} == {1}


def test_target_modules_narrow_the_layers_and_wrong_names_are_told():
    model = built("gpt_bigcode")
    with pytest.raises(ValueError, match="called …attn"):
        get_peft_model(model, GateKVConfig(target_modules=["self_attn"]))
    assert not wrappers(model)
    peft = get_peft_model(model, GateKVConfig(target_modules=["h.1.attn"]))
    assert [w.layer_idx for w in wrappers(peft) if w.active()] == [1]
    assert peft.peft_config["default"].target_modules == ["h.1.attn"]
