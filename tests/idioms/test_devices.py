"""Where a model lies and how it is run makes no difference to a cache: several devices, inference mode, a compiled model."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import gated, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from mock_device import MockDevices, host

import gatekv
from gatekv.cache import storage
from gatekv.modules import base_model

IDS = torch.randint(1, 90, (2, 60), generator=torch.Generator().manual_seed(0))
STREAMING = {"streaming_llm": {}, "h2o": {}, "tova": {}, "l2": {"decode": "evict"}, "elastic": {}}


def model_of(layers=2, **spec):
    model = tiny(dtype=torch.float32, num_hidden_layers=layers)
    return gated(dtype=torch.float32, model=model, window=4, sinks=2, less_rank=2, **spec)


def spread(model, devices):
    """Every other layer on a second device, as accelerate's device_map has it."""
    inner = base_model(model)
    odd = [f".layers.{i}." for i in range(1, len(inner.model.layers), 2)]
    devices.move(model, lambda name: "meta:1" if any(part in name for part in odd) else "meta:0")
    for i, layer in enumerate(inner.model.layers):
        add_hook_to_module(layer, AlignDevicesHook(execution_device=torch.device("meta", i % 2), io_same_device=True))
    return model


def steps(model, ids, mask, policy, budget, **options):
    """(tokens' logits, flags of each layer) of a padded prompt, a question and single tokens."""
    cache, out = gatekv.KVCache(model, policy, budget, **options), []
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for a, c in [(0, 40), (40, 52), *((i, i + 1) for i in range(52, 60))]:
        feed = dict(attention_mask=mask[:, :c], position_ids=positions[:, a:c], past_key_values=cache)
        out.append(model(input_ids=ids[:, a:c], **feed).logits)
    return torch.cat(out, 1), cache.flags()


@pytest.mark.parametrize(
    "policy,budget",
    [("snapkv+global", 0.7), ("gate+global", 0.5), ("h2o+variance", 0.5), ("gate+uniform", 0.5), ("gate", None),
     ("snapkv+less", 0.6), ("h2o", 0.5), ("d2o", 0.8), ("qaq", None), ("snapkv+think", 0.8),
     ("tova+rate", 0.5), ("gate+rate", 0.5)],
)  # fmt: skip
@torch.no_grad()
def test_layers_on_two_devices_decide_as_on_one(policy, budget):
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    wanted, flags = steps(model_of(), IDS * mask, mask, policy, budget)
    devices = MockDevices()
    model = spread(model_of(), devices)
    with devices:
        found, kept = steps(model, devices.tensor(IDS * mask), devices.tensor(mask), policy, budget)
    assert [str(f.device) for f in kept] == ["meta:0", "meta:1"]
    real = mask.bool()
    torch.testing.assert_close(host(found)[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(host(a), b) for a, b in zip(kept, flags))


@pytest.mark.parametrize("policy", ["snapkv", "gate+global", "h2o", "snapkv+think", "qaq"])
@torch.no_grad()
def test_a_saved_cache_goes_where_its_layers_lie(policy, tmp_path, monkeypatch):
    model, budget = model_of(), None if policy == "qaq" else 0.8
    cache = gatekv.KVCache(model, policy, budget)
    model(IDS, past_key_values=cache)
    cache.save(str(tmp_path / "c.safetensors"))
    wanted = model(IDS[:, :1], past_key_values=cache).logits
    monkeypatch.setattr(storage, "_check", lambda *_: None)  # the mock's weights cannot be hashed
    devices = MockDevices()
    model = spread(model, devices)
    with devices:
        loaded = gatekv.KVCache.load(str(tmp_path / "c.safetensors"), model)
        found = model(devices.tensor(IDS[:, :1]), past_key_values=loaded).logits
    torch.testing.assert_close(host(found), wanted, rtol=1e-4, atol=1e-4)


def reads_a_token(policy, budget, tokens, before=4, padded=False, **options):
    """What a device is asked for while it decodes, a layer and token, behind the first fold."""
    devices = MockDevices()
    model = devices.move(model_of())
    mask = torch.ones_like(IDS)
    mask[1, : 9 * padded] = 0
    ids, count = devices.tensor(IDS), 0
    with devices, torch.no_grad():
        cache = gatekv.KVCache(model, policy, budget, **options)
        for i in range(-1, before + tokens):
            if i == before:
                devices.reads.clear()
            fed = ids if i < 0 else ids[:, i % 60 : i % 60 + 1]
            mask = mask if i < 0 else torch.cat([mask, mask[:, -1:]], 1)
            feed = dict(attention_mask=devices.tensor(mask)) if padded else {}
            model(input_ids=fed, past_key_values=cache, **feed)
        count = sum(n for where, n in devices.reads.items() if "gatekv/" in where)
    return count / tokens / 2


@pytest.mark.parametrize("name", STREAMING)
def test_a_full_buffer_never_waits(name):
    assert reads_a_token(name, 0.9 if name == "l2" else 0.6, 8, **STREAMING[name]) == 0


@pytest.mark.parametrize("policy,budget", [("full", None), ("snapkv", 0.7), ("gate+global", 0.5), ("gate", None)])
def test_who_decided_once_waits_only_when_tokens_are_stored(policy, budget):
    # One look at a fold: how many tokens stay, and how many pages they take. A gate folds four times as often.
    one_shot = policy in ("full", "snapkv")
    assert reads_a_token(policy, budget, 64 if one_shot else 32) <= (1 / 64 if one_shot else 1 / 16)


def test_pads_cost_one_look_a_forward_for_all_layers():
    assert reads_a_token("h2o", 0.6, 8, padded=True) <= 1 / 2


class Calls(TorchDispatchMode):
    """Counts what is asked of ATen."""

    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls_a_token(model, cache):
    with torch.no_grad():
        model(IDS[:1], past_key_values=cache)
        for i in range(80):
            model(IDS[:1, i % 60 : i % 60 + 1], past_key_values=cache)
        with Calls() as calls:
            for i in range(64):
                model(IDS[:1, i % 60 : i % 60 + 1], past_key_values=cache)
    return sum(calls.asked.values()) / 64 / len(cache.layers)


@pytest.fixture(scope="module")
def plain_calls():
    model = tiny(dtype=torch.float32, num_hidden_layers=4)
    return calls_a_token(model, DynamicCache(config=model.config))


@pytest.mark.parametrize("policy,most", [("full", 35), ("snapkv", 35), *((name, 80) for name in STREAMING)])
def test_a_step_asks_for_few_operations(policy, most, plain_calls):
    """Beside those of a step with transformers' own cache, which has 83 a layer in this model."""
    model = tiny(dtype=torch.float32, num_hidden_layers=4)
    budget = None if policy == "full" else 0.9 if policy == "l2" else 0.6
    cache = gatekv.KVCache(model, policy, budget, **STREAMING.get(policy, {}))
    assert calls_a_token(model, cache) <= plain_calls + most


@pytest.mark.parametrize(
    "policy,budget", [("full", None), ("snapkv", 0.5), ("h2o", 0.5), ("gate+global", 0.5), ("gate", None)]
)
def test_a_prompt_read_in_inference_mode_is_generated_from_outside_it(policy, budget):
    model = model_of().eval()
    prompt, more = IDS[:, :40], IDS[:, 40:43]

    def answer(mode):
        cache = gatekv.KVCache(model, policy, budget)
        with mode:
            model(prompt, past_key_values=cache)
        ids = torch.cat([prompt, more], 1)
        return model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=20, do_sample=False)

    assert torch.equal(answer(torch.inference_mode()), answer(torch.no_grad()))


@pytest.mark.exhaustive  # half a minute each
@pytest.mark.parametrize("policy,budget", [("snapkv", 0.5), ("h2o", 0.5), ("gate+global", 0.5)])
@torch.no_grad()
def test_a_compiled_model_answers_as_itself(policy, budget):
    model = model_of().eval()
    out = []
    for run in (model, torch.compile(model, backend="eager", dynamic=True)):
        cache = gatekv.KVCache(model, policy, budget)
        out.append(
            [
                run(input_ids=IDS[:, a:c], past_key_values=cache).logits
                for a, c in ((0, 40), (40, 44), (44, 45), (45, 46))
            ]
        )
    torch._dynamo.reset()
    for eager, compiled in zip(*out):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_generate_is_not_asked_for_two_caches(kind):
    model = tiny(dtype=torch.float32).eval()
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(
            IDS, past_key_values=gatekv.KVCache(model, "snapkv", 0.5), cache_implementation=kind, max_new_tokens=2
        )
    with pytest.raises(ValueError, match="cache_implementation"):
        gatekv.generate(model, IDS, policy="snapkv", budget=0.5, cache_implementation=kind, max_new_tokens=2)
