"""A cache as people use it: with the wrong model, after an error, copied, pickled, dropped, with arguments of all kinds."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import gated, tiny
from transformers import DynamicCache
from transformers.utils import logging

import gatekv
from gatekv.policies.budgets import BudgetError

IDS = torch.randint(1, 90, (2, 60), generator=torch.Generator().manual_seed(3))
NEXT = torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(4))
POLICIES = [
    "full",
    "snapkv",
    "gate+global",
    "gate",
    "h2o",
    "streaming_llm",
    "snapkv+think",
    "qaq",
    "d2o",
    "snapkv+global",
]
KINDS = ["llama", "ministral"]  # all layers are ours; every other has a sliding window


def cache_of(model, policy, **options):
    options = {"decode": "keep"} | options if policy in ("qaq",) else options
    return gatekv.KVCache(model, policy, None if policy in ("full", "gate") else 0.5, **options)


def model_of(kind="llama"):
    return gated(kind, window=4, sinks=2)


@torch.no_grad()
def after(model, cache, ids=NEXT):
    return model(ids, past_key_values=cache).logits


@torch.no_grad()
def fed(model, policy, **options):
    cache = cache_of(model, policy, **options)
    model(IDS, past_key_values=cache)
    return cache


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_a_snapshot(policy, kind):
    model = model_of(kind)
    cache = fed(model, policy)
    twin = copy.deepcopy(cache)
    assert twin.model is model
    wanted = after(model, cache)
    assert torch.equal(after(model, twin), wanted), "and what the first one read since did not reach it"


@pytest.mark.parametrize("policy", POLICIES)
def test_pickle_holds_no_model(policy):
    model = model_of()
    cache = fed(model, policy)
    data = pickle.dumps(cache)
    again = pickle.loads(data)
    assert again.model is None and len(data) < 2 * sum(t.nbytes for w in cache.evicting() for t in w.tensors()) + 60_000
    again.model = model
    assert torch.equal(after(model, again), after(model, cache)) and again.memory()["bytes"] > 0


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_a_cache_goes_with_its_last_reference(policy):
    model = model_of()
    gc.collect()
    gc.disable()
    try:
        cache = DynamicCache(config=model.config) if policy is None else cache_of(model, policy)
        model.generate(IDS, past_key_values=cache, max_new_tokens=3, do_sample=False)
        held = weakref.ref(cache.layers[0])
        twin = None if policy is None else cache.snapshot()
        del cache, twin
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["full", "snapkv", "gate"])
def test_a_model_that_does_not_carry_the_cache_is_refused(policy, kind):
    model, stranger = model_of(kind), tiny(kind)
    with pytest.raises(ValueError, match="belongs to another model, or gatekv.detach"):
        after(stranger, cache_of(model, policy), IDS)
    cache = fed(model, policy)
    kept, wanted = cache.snapshot(), after(model, cache.snapshot())
    with pytest.raises(ValueError, match="belongs to another model"):
        stranger.generate(IDS, past_key_values=cache, max_new_tokens=2)
    if kind == "llama":
        assert torch.equal(after(model, cache.snapshot()), wanted), "a refusal changes nothing"
    else:  # a layer with a sliding window, before ours, had taken the tokens
        with pytest.raises(ValueError, match="was interrupted"):
            after(model, cache)
        cache.restore(kept)
        assert torch.equal(after(model, cache.snapshot()), wanted)
    with pytest.raises(ValueError, match="gatekv.detach was called"):
        after(gatekv.detach(model), cache)


@pytest.mark.parametrize("where", ["between layers", "inside attention"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_call_that_ends_in_the_middle_is_noticed(policy, where, monkeypatch):
    model = model_of()
    cache, layers = fed(model, policy), gatekv.modules.base_model(model).model.layers
    kept, wanted = cache.snapshot(), after(model, cache.snapshot())

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "between layers":
        hook = layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            after(model, cache)
        hook.remove()
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(cache.evicting()[0].store), "segments", stop)
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", stop)
            after(model, cache)
    for use in (lambda: after(model, cache), lambda: pickle.dumps(cache)):
        with pytest.raises(ValueError, match=r"was interrupted .* cache.reset\(\) .* cache.snapshot\(\)"):
            use()
    cache.restore(kept)
    assert torch.equal(after(model, cache), wanted)
    cache.reset()
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    assert torch.equal(after(model, cache), wanted)


@pytest.mark.parametrize("policy", ["snapkv", "gate+global", "h2o", "keydiff+ada"])
def test_a_refused_prompt_leaves_the_cache_as_it_was(policy):
    """Too short for a strict budget: the same cache takes a longer one."""
    model = model_of()
    cache = cache_of(model, policy, strict=True, window=10)
    for _ in range(2):
        with pytest.raises(BudgetError, match="budget"):
            after(model, cache, IDS[:, :12])
        assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    assert torch.equal(after(model, cache), after(model, fed(model, policy, strict=True, window=10)))


@pytest.mark.parametrize(
    "wrong",
    [dict(window=-1), dict(window=2.5), dict(window=True), dict(sinks=-3), dict(sinks="4"), dict(prompt_tokens=0),
     dict(prompt_tokens=-5), dict(prompt_tokens=8.0), dict(block_size=0), dict(block_size=16.0)],
    ids=str,
)  # fmt: skip
def test_numbers_of_tokens_are_whole_numbers(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is a number of tokens, a whole one of at least [01]; got"):
        gatekv.KVCache(tiny(), "snapkv", 0.5, **wrong)


def test_what_is_no_model_and_what_was_never_fed():
    with pytest.raises(ValueError, match="a model is wanted, not 'gpt2': load it with"):
        gatekv.KVCache("gpt2", "snapkv", 0.5)
    cache = gatekv.KVCache(tiny(), "snapkv", 0.5)
    with pytest.raises(ValueError, match="has seen no token yet"):
        cache.flags()
    assert cache.memory()["bytes"] == 0 and "seen=0" in repr(cache)


def phi3(rope, limit=64):
    """Phi-3 as it comes in 128k (longrope), and one whose rotation never changes."""
    parameters = {"rope_type": rope, "rope_theta": 1e4}
    if rope == "longrope":
        more = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=limit, factor=8.0)
        parameters |= more
    return tiny("phi3", rope_parameters=parameters, original_max_position_embeddings=limit, sliding_window=None)


@pytest.mark.parametrize("rope", ["longrope", "default"])
@pytest.mark.parametrize("prompt", [48, 64, 80])
def test_a_model_does_not_put_another_cache_in_our_place(prompt, rope):
    """transformers drops the cache of Phi-3 where a text grows beyond a length, for a prompt beyond it at once."""
    model, ids = phi3(rope), torch.randint(1, 90, (2, prompt), generator=torch.Generator().manual_seed(5))
    options = dict(max_new_tokens=24, do_sample=False)
    full, small = gatekv.KVCache(model, "full"), gatekv.KVCache(model, "streaming_llm", 0.5)
    if rope == "longrope" and prompt <= 64:
        for cache in (full, small):
            with pytest.raises(ValueError, match=r"longrope\) rotates keys otherwise beyond 64 positions"):
                model.generate(ids, past_key_values=cache, **options)
        short = gatekv.KVCache(model, "full")
        wanted = model.generate(ids[:, :40], **options)
        assert torch.equal(model.generate(ids[:, :40], past_key_values=short, **options), wanted)
        return
    wanted = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, past_key_values=full, **options), wanted)
    model.generate(ids, past_key_values=small, **options)
    assert full.get_seq_length() == small.get_seq_length() == prompt + 23
    assert torch.stack(small.flags()).float().mean() < 0.6, "and it evicts to the end"


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "gate+global"])
def test_where_the_prompt_ends_is_said_where_it_is_guessed(policy, caplog):
    """A second call of several tokens is a question; a prompt that is told to be longer than it is has not ended."""
    logger = logging.get_logger("gatekv.cache.refusals")
    logger.warning_once.cache_clear() if hasattr(logger.warning_once, "cache_clear") else None
    model = model_of()
    with caplog.at_level("WARNING"), _heard(logger, caplog):
        after(model, fed(model, policy), NEXT)
        assert "is taken for a question" in caplog.text
        caplog.clear()
        told = fed(model, policy, prompt_tokens=IDS.shape[1])
        after(model, told, NEXT)
        assert not caplog.text, "who says where it ends hears nothing"
        longer = fed(model, policy, prompt_tokens=IDS.shape[1] + 8)
        before = longer.memory()
        with pytest.raises(ValueError, match="a single token comes after 60"):
            after(model, longer, NEXT[:, :1])
        assert longer.memory() == before
        after(model, longer, NEXT), after(model, longer, NEXT[:, :3])
        assert longer.memory()["bytes"] < before["bytes"], "the rest of the prompt came, and it was compressed"


@contextlib.contextmanager
def _heard(logger, caplog):
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_keys_and_values_of_a_layer_are_what_it_holds(policy):
    model = model_of()
    cache = cache_of(model, policy)
    assert cache.layers[0].keys is None and not cache.layers[0].is_initialized
    model(IDS, past_key_values=cache)
    for token in NEXT.split(1, 1):
        model(token, past_key_values=cache)
    plain = DynamicCache(config=model.config)
    model(torch.cat([IDS, NEXT], 1), past_key_values=plain)
    for layer, whole, flags in zip(cache.layers, plain.layers, cache.flags()):
        assert layer.keys.shape == layer.values.shape == (2, 3, int(flags.sum(-1).max()), 8)
        assert torch.equal((layer.values != 0).any(-1).sum(-1), flags.sum(-1))
        if policy in ("full", "snapkv", "snapkv+global") and layer is cache.layers[0]:  # deeper ones see less
            for row in range(2):
                for head in range(3):
                    kept = whole.values[row, head][flags[row, head]]
                    mine = layer.values[row, head][-len(kept) :]
                    torch.testing.assert_close(mine.sort(0).values, kept.sort(0).values)
    with pytest.warns(FutureWarning, match="kept is called store now"):
        assert cache.layers[0].kept is cache.layers[0].store
