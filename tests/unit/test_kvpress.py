"""A gate as a press of kvpress: the same tokens stay, the same logits come, and nothing evicts beside it."""

import subprocess
import sys

import pytest
import torch
from conftest import gated, padded_batch, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import gatekv

# Its `fire` below 0.7 imports `pipes`, which Python 3.13 no longer has.
kvpress = pytest.importorskip("kvpress", exc_type=ImportError)
from gatekv.integrations.kvpress import GateKVPress
from gatekv.modules import base_model, wrappers
from gatekv.policies import AdaKV, Gate

TOKENS, MORE, VOCAB = 96, 5, 128


def test_importing_gatekv_imports_neither_library_and_without_one_the_cure_is_named():
    code = """
import importlib, sys, gatekv
assert not {"kvpress", "trl"} & set(sys.modules)
for name in ("kvpress", "trl"):
    sys.modules[name] = None
    try:
        importlib.import_module(f"gatekv.integrations.{name}")
    except ImportError as error:
        print(name, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["kvpress", "trl"], done.stderr
    assert all("pip install 'gatekv[interop]'" in line for line in lines)


def ids_of(rows=1, tokens=TOKENS + MORE):
    """No token twice: among equal scores, which the first layer would give it, kvpress's topk and ours may differ."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(VOCAB, generator=generator)[:tokens] for _ in range(rows)])


def model_of(family="llama", dtype=torch.float64, **spec):
    return gated(model=tiny(family, dtype, vocab_size=VOCAB), dtype=dtype, **{"window": 8, "sinks": 2} | spec)


def prefill(model, press, ids):
    """The cache of ids [batch, tokens] under a press, and under nothing."""
    pruned, whole = DynamicCache(), DynamicCache()
    with press(model):
        model(ids, past_key_values=pruned)
    model(ids, past_key_values=whole)
    return pruned, whole


def kept(pruned, whole):
    """[layers, batch, kv_heads, tokens] bool: which keys of the whole cache are in the pruned one."""
    pairs = [(p.keys, w.keys) for p, w in zip(pruned.layers, whole.layers)]
    return torch.stack([(w[:, :, :, None] == p[:, :, None]).all(-1).any(-1) for p, w in pairs])


def ask(model, cache, ids):
    positions = torch.arange(TOKENS, ids.shape[1])[None].expand(len(ids), -1)
    return model(ids[:, TOKENS:], past_key_values=cache, position_ids=positions).logits


@torch.no_grad()
@pytest.mark.parametrize("observed, policy", [(Gate.observed, "gate+uniform"), (0.0, "gate_alone+uniform")])
@pytest.mark.parametrize("gate", ["mlp", "key_mlp", "attention"])
def test_the_same_tokens_stay_and_the_same_logits_come(family, gate, observed, policy):
    model, ids = model_of(family, gate=gate), ids_of(rows=2)
    pruned, whole = prefill(model, GateKVPress(0.75, observed=observed), ids[:, :TOKENS])
    assert all(layer.keys.shape[2] == TOKENS // 4 for layer in pruned.layers)
    cache = gatekv.KVCache(model, policy, 0.25, decode="keep")
    model(ids[:, :TOKENS], past_key_values=cache)
    assert torch.equal(kept(pruned, whole), torch.stack(cache.flags()))
    wanted, found = ask(model, cache, ids), ask(model, pruned, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert (ask(model, whole, ids) - wanted).abs().max() > 1e-3, "eviction shows"


@torch.no_grad()
def test_sinks_and_window_are_those_asked_for():
    model, ids = model_of(), ids_of(tokens=TOKENS)
    pruned, whole = prefill(model, GateKVPress(0.5, sinks=5, window=40), ids)
    flags = gatekv.flags(model, ids, policy="gate+uniform", budget=0.5, sinks=5, window=40, decode="keep")
    assert torch.equal(kept(pruned, whole), flags) and flags[..., :5].all() and flags[..., -40:].all()


@torch.no_grad()
def test_heads_compete_in_kvpress_own_wrapper_and_its_other_presses_run_beside(family):
    """AdaKVPress masks single heads while decoding, outside of any context: the attention must be the model's own.

    (It does so by a key that is far from all queries at once: there is one for a token's, in heads of 8 numbers.)
    """
    model, ids = model_of(family), ids_of(tokens=TOKENS + 1)
    press, pruned = GateKVPress(0.75), DynamicCache()
    with press.on(model) as inner:
        other = DynamicCache()
        with kvpress.SnapKVPress(0.5, window_size=16)(inner):
            inner(ids[:, :TOKENS], past_key_values=other)
        with kvpress.AdaKVPress(press)(inner):
            inner(ids[:, :TOKENS], past_key_values=pruned)
    flags = torch.ones(2, 3, TOKENS, dtype=torch.bool)
    for layer, w in zip(flags, wrappers(model)):
        layer[w.module.masked_key_indices[1:]] = False
    found = ask(model, pruned, ids)
    cache = gatekv.KVCache(model, AdaKV(Gate(), floor="hard"), 0.25, decode="keep")
    model(ids[:, :TOKENS], past_key_values=cache)
    assert torch.equal(flags, torch.stack(cache.flags())[:, 0])
    assert len({int(n) for n in flags.sum(-1).flatten()}) > 1, "heads of unequal length"
    torch.testing.assert_close(found, ask(model, cache, ids), rtol=1e-9, atol=1e-9)
    assert all(layer.keys.shape[2] == TOKENS // 2 for layer in other.layers)


@torch.no_grad()
def test_the_pipeline_answers_from_the_pruned_cache():
    words = Tokenizer(models.WordLevel({f"w{i:03}": i for i in range(VOCAB)}, unk_token="w001"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w001", bos_token="w002", eos_token="w003")
    model, cache = model_of(dtype=torch.float32), DynamicCache()
    model.generation_config.eos_token_id = VOCAB
    pipe = kvpress.KVPressTextGenerationPipeline(model=base_model(model), tokenizer=tokenizer)
    context = "".join(f" w{i:03}" for i in ids_of(tokens=TOKENS - 1)[0].tolist())
    asked = dict(questions=["w005 w006", "w007"], max_new_tokens=6)
    answers = pipe(context, **asked, press=GateKVPress(0.75), cache=cache)["answers"]
    assert [layer.keys.shape[2] for layer in cache.layers] == [TOKENS // 4] * 2
    ours = gatekv.KVCache(model, "gate+uniform", 0.25, decode="keep")
    ids = tokenizer("w002" + context, return_tensors="pt").input_ids
    model(ids, past_key_values=ours)
    for question, answer in zip(asked["questions"], answers):
        whole = torch.cat([ids, tokenizer(question + " \n", return_tensors="pt").input_ids], 1)
        out = model.generate(input_ids=whole, past_key_values=ours.snapshot(), max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(out[0, whole.shape[1] :]) == answer
    assert answers != pipe(context, **asked)["answers"]


def test_the_model_is_as_before_also_after_an_error():
    model, ids = model_of(), ids_of(tokens=TOKENS)
    before = [*wrappers(model)]
    with pytest.raises(RuntimeError, match="stop"), GateKVPress(0.5)(model):
        assert wrappers(model) == before, "nothing steps aside"
        raise RuntimeError("stop")
    assert wrappers(model) == before
    assert not any(w.module._forward_pre_hooks or w.module._forward_hooks for w in before)
    assert 0 < gatekv.flags(model, ids, policy="gate").float().mean() < 1


@torch.no_grad()
def test_kvpress_may_be_imported_after_a_model_has_its_gates(monkeypatch):
    """It wraps every attention function that is registered by then, gatekv's too, and calls it its own way."""
    model, ids = model_of(), ids_of()
    wanted = gatekv.flags(model, ids, policy="gate+global", budget=0.4)
    name = model.config._attn_implementation
    wrapped = kvpress.attention_patch.attention_patch(ALL_ATTENTION_FUNCTIONS[name])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, wrapped)
    assert torch.equal(gatekv.flags(model, ids, policy="gate+global", budget=0.4), wanted)
    assert prefill(model, GateKVPress(0.75), ids)[0].get_seq_length() == len(ids[0]) // 4


def test_lora_of_the_adapter_stays_in_force():
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model, ids = model_of(lora=lora), ids_of(tokens=TOKENS)
    pruned, whole = prefill(model, GateKVPress(0.75), ids)
    flags = gatekv.flags(model, ids, policy="gate+uniform", budget=0.25, decode="keep")
    assert torch.equal(kept(pruned, whole), flags)


def refused(press, model, said, forward=None):
    with pytest.raises(ValueError, match=said), press(model):
        forward(model)


def test_what_would_be_wrong_is_refused():
    model, ids = model_of(), ids_of(tokens=TOKENS)
    refused(GateKVPress(0.5), tiny(), "0 of 2 have one in force: load a gatekv adapter")
    with model.disable_adapter():
        refused(GateKVPress(0.5), model, "0 of 2 .* or enable it")
    refused(GateKVPress(0.5), gated(relaxation="decay"), "gates whose tokens fade")
    refused(GateKVPress(0.5), gated("ministral", window=4), "sliding window")
    eager = tiny()
    eager.set_attn_implementation("eager")
    refused(GateKVPress(0.5), gated(model=eager), "attn_implementation='sdpa'")
    refused(kvpress.AdaKVPress(GateKVPress(0.5)), base_model(model), "press.on")
    ours = gatekv.KVCache(model, "gate+uniform", 0.5)
    refused(GateKVPress(0.5), model, "DynamicCache", lambda m: m(ids, past_key_values=ours))
    refused(GateKVPress(0.5), model, "DynamicCache", lambda m: m(ids, use_cache=False))
    short = lambda m: m(ids[:, :16], past_key_values=DynamicCache())  # noqa: E731
    refused(GateKVPress(0.5), model, "below the 10 that sinks", short)
    padded, mask = padded_batch([40, 60])
    refused(GateKVPress(0.5), model, "rows of one length",
            lambda m: m(padded, attention_mask=mask, past_key_values=DynamicCache()))  # fmt: skip
