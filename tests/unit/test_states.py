"""Models whose other layers keep a state: linear attention, Mamba, convolutions; alone, or beside keys and values."""

import copy

import pytest
import torch
import zoo
from accelerate import Accelerator
from peft import get_peft_model
from test_training import ToyData, config

import gatekv
from gatekv import GateKVConfig
from gatekv.cache.forecast import forecast
from gatekv.cache.hybrid import HybridKVLayer
from gatekv.cache.segments.foreign import Foreign
from gatekv.modules import wrappers
from gatekv.training.loop import train
from gatekv.training.objective import Objective
from gatekv.training.packing import Row, collate
from gatekv.training.rows import Rows

# Gated delta rule; convolutions alone; Mamba in every layer, beside attention.
KINDS = ["qwen3_5_text", "lfm2", pytest.param("falcon_h1", marks=pytest.mark.exhaustive)]
LONG, SHORT = 60, 41


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def built(kind):
    return zoo.build(kind, dtype=torch.float32)


def close(a, b, tolerance=2e-5):
    assert (a - b).abs().max() / b.abs().max() <= tolerance


@torch.no_grad()
def fed(model, cache, batch, start=0, end=None):
    """Logits of the tokens from start to end."""
    mask = batch["attention_mask"][:, :end]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(
        batch["input_ids"][:, start:end], attention_mask=mask, position_ids=positions[:, start:], past_key_values=cache
    ).logits


def prompt_and_question(model):
    """(a batch of two rows, the second padded, of 60 tokens, where a question of five begins)."""
    return zoo.inputs(model, (LONG, SHORT)), LONG - 5


def test_a_snapshot_is_independent_of_what_is_written_in_place(kind):
    model = built(kind)
    batch, start = prompt_and_question(model)
    cache = gatekv.KVCache(model, "snapkv", 0.5, window=4)
    fed(model, cache, batch, 0, start)
    snapshot, other = cache.snapshot(), dict(batch, input_ids=batch["input_ids"].flip(0) % 50 + 3)
    fed(model, cache, other, start)
    wanted = fed(model, snapshot.snapshot(), batch, start)
    fed(model, snapshot.snapshot(), other, start)
    assert torch.equal(fed(model, snapshot, batch, start), wanted)
    cache.restore(copy.deepcopy(snapshot))
    assert cache.get_seq_length() == LONG


def test_a_saved_cache_goes_on_as_before(kind, tmp_path):
    model = built(kind)
    batch, start = prompt_and_question(model)
    cache = gatekv.KVCache(model, "h2o", 0.5, window=4)
    fed(model, cache, batch, 0, start)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = gatekv.KVCache.load(tmp_path / "prompt.safetensors", model)
    assert loaded.memory()["gated_full_bytes"] == cache.memory()["gated_full_bytes"]
    assert torch.equal(fed(model, loaded, batch, start), fed(model, cache, batch, start))


def test_a_reset_cache_is_as_new(kind):
    model = built(kind)
    batch, start = prompt_and_question(model)
    cache = gatekv.KVCache(model, "snapkv", 0.5, window=4)
    wanted = fed(model, cache, batch, 0, start)
    cache.reset()
    assert cache.memory()["bytes"] == 0
    assert torch.equal(fed(model, cache, batch, 0, start), wanted)


def test_beams_reorder_states_with_the_rest(kind):
    model = built(kind)
    batch = zoo.inputs(model, (30, 22))
    options = dict(max_new_tokens=10, do_sample=False, num_beams=3)
    wanted = model.generate(**batch, **options)
    cache = gatekv.KVCache(model, "snapkv", 1.0, decode="keep")
    assert torch.equal(model.generate(**batch, past_key_values=cache, **options), wanted)


def test_rows_are_chosen_and_repeated(kind):
    model = built(kind)
    batch, start = prompt_and_question(model)
    cache = gatekv.KVCache(model, "snapkv", 0.5, window=4)
    fed(model, cache, batch, 0, start)
    alone, twice = cache.snapshot(), cache.snapshot()
    alone.batch_select_indices(torch.tensor([1]))
    twice.batch_repeat_interleave(2)
    wanted = fed(model, cache, batch, start)
    close(fed(model, alone, {k: v[1:] for k, v in batch.items()}, start), wanted[1:])
    close(fed(model, twice, {k: v.repeat_interleave(2, 0) for k, v in batch.items()}, start)[::2], wanted)


def test_an_undecided_prompt_is_shared_by_policies(kind):
    model = built(kind)
    batch, start = prompt_and_question(model)
    undecided = gatekv.KVCache.undecided(model)
    fed(model, undecided, batch, 0, start)
    for policy in ("snapkv", "h2o"):
        direct = gatekv.KVCache(model, policy, 0.5, window=4)
        fed(model, direct, batch, 0, start)
        decided = undecided.decide(policy, 0.5, window=4)
        assert torch.equal(fed(model, decided, batch, start), fed(model, direct, batch, start))


def test_bytes_are_told_apart_together_and_beforehand(kind):
    model = built(kind)
    batch = zoo.inputs(model, (200, 200))
    cache = gatekv.KVCache(model, "snapkv", 0.25, window=4)
    told = forecast(gatekv.KVCache(model, "snapkv", 0.25, window=4), 200, batch=2)
    fed(model, cache, batch)
    memory = cache.memory()
    parts = [layer.state if isinstance(layer, HybridKVLayer) else Foreign(layer) for layer in cache.layers
             if not isinstance(layer, gatekv.cache.layer.KVLayer) or isinstance(layer, HybridKVLayer)]  # fmt: skip
    states = sum(t.numel() * t.element_size() for part in parts for t in part.tensors())
    assert states > 0
    assert memory["bytes"] - memory["gated_bytes"] == memory["full_bytes"] - memory["gated_full_bytes"] == states
    assert memory["gated_ratio"] < memory["ratio"] < 1
    assert abs(told.bytes / memory["bytes"] - 1) < 0.01 and told.full_bytes == memory["full_bytes"]


def test_what_a_state_has_taken_in_stays_and_says_so():
    model = built("qwen3_5_text")
    batch, start = prompt_and_question(model)
    cache = gatekv.KVCache(model, "full")
    fed(model, cache, batch, 0, start)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="cannot take back 3 tokens: this model's layers with a state"):
        cache.crop(-3)
    wanted = gatekv.KVCache(model, "full")
    fed(model, wanted, batch, 0, start)
    cache.snapshot().crop(0)
    gatekv.KVCache(model, "full").crop(0)
    assert torch.equal(fed(model, cache, batch, start), fed(model, wanted, batch, start)), "nothing has changed"


def test_convolutions_give_tokens_back_where_they_were_recorded():
    model = built("lfm2")
    batch, start = prompt_and_question(model)
    fresh, cache = gatekv.KVCache(model, "full"), gatekv.KVCache(model, "full")
    fed(model, fresh, batch, 0, start)
    fed(model, cache, batch, 0, start)
    with pytest.raises(ValueError, match="convolutions keep the last few only"):
        cache.crop(-2)
    cache.activate_past_recording()
    fed(model, cache, batch, start, start + 3)
    cache.crop(-3)
    close(fed(model, cache, batch, start), fed(model, fresh, batch, start))


@pytest.mark.parametrize("place", [0, -1])
def test_an_interrupted_call_is_noticed(kind, place):
    model = built(kind)
    batch, start = prompt_and_question(model)
    cache = gatekv.KVCache(model, "snapkv", 0.5, window=4)
    fed(model, cache, batch, 0, start)

    def stop(*_):
        raise KeyboardInterrupt

    keeps = [m for m in model.modules() if gatekv.cache.states._keeps_state(m)]
    hook = keeps[place].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fed(model, cache, batch, start)
    hook.remove()
    with pytest.raises(ValueError, match="(an earlier call with this cache was|an earlier call was) interrupted"):
        fed(model, cache, batch, start)


def test_documents_in_one_row_are_refused_where_a_state_runs_through(kind):
    model = built(kind)
    row = Row(list(range(10, 30)), [1.0] * 20, 10, [12, 8])
    with pytest.raises(ValueError, match="pack=false"):
        Rows.of(collate([row]), model)


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
def test_training_steps(kind, prefill, tmp_path):
    peft = get_peft_model(built(kind), GateKVConfig(gate="linear", window=4, sinks=2)).train()
    before = [p.detach().clone() for w in wrappers(peft) for p in w.gatekv_gate["default"].parameters()]
    module = Objective(peft, objective="kl", sparsity="abs", prefill=prefill)
    train(module, ToyData(), config(tmp_path, max_steps=2), Accelerator(cpu=True))
    after = [p for w in wrappers(peft) for p in w.gatekv_gate["default"].parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after)) and all(p.isfinite().all() for p in after)
