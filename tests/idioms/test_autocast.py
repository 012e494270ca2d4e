"""torch.autocast over a float32 model, as Accelerate and Trainer use it, and modules in half precision."""

import copy

import pytest
import torch
from conftest import gated, padded_batch, tiny
from transformers import DynamicCache

from gatekv import KVCache
from gatekv.config import GateSpec
from gatekv.gates import build_gate
from gatekv.modules import parallel, wrappers
from gatekv.policies import SCORERS

FORMS = [dict(gate="attention"), dict(gate="linear"), dict(gate="mlp"), dict(gate="key_mlp"),
         dict(gate="attention", context="prompt")]  # fmt: skip
LESS = dict(less_rank=3, less_hidden=12)
POLICIES = ["full", "gate", "gate+global", "gate+global+less", "snapkv+less", "snapkv+merge_near", "snapkv+qaq", "snapkv+think",
            *(name for name in SCORERS if name not in ("full", "gate"))]  # fmt: skip

THRESHOLD = ("gate", "gate_alone")  # no budget without a calibration
STREAMS = ("tova", "h2o", "streaming_llm", "d2o", "elastic")


def autocast(on=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def random_gate(spec):
    torch.manual_seed(0)
    gate = build_gate(spec, 48, 3, 8)
    with torch.no_grad():
        for p in gate.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return gate


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gates_judge_in_at_least_float32(form, dtype, on):
    spec = GateSpec(**form)
    gate = random_gate(spec).to(dtype)
    wide = copy.deepcopy(gate).to(torch.promote_types(dtype, torch.float32))
    hidden = torch.randn(2, 30, 48, dtype=dtype, generator=torch.Generator().manual_seed(1))
    valid, state, wide_state = torch.ones(2, 15, dtype=torch.bool), None, None
    for part in hidden.split(15, 1):
        with autocast(on):
            logits, state = gate(part, valid, state)
        wanted, wide_state = wide(part.to(torch.promote_types(dtype, torch.float32)), valid, wide_state)
        assert logits.dtype == wanted.dtype and torch.allclose(logits, wanted, atol=1e-6)
        assert [t.dtype for t in state or ()] == [t.dtype for t in wide_state or ()]
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in gate.parameters())
    gate(hidden[:, :15], valid, state)
    gate.to(torch.bfloat16)(hidden[:, :15], valid, state)  # a memory outlives a change of dtype


def fed(model, cache, ids, mask, on):
    """Logits of a prefill, of a piece and of single tokens."""
    out, edges = [], (0, 64, 68, *range(69, ids.shape[1] + 1))
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(edges, edges[1:])):
            with autocast(on if isinstance(on, bool) else on[i % len(on)]):
                out.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits.float())
    return torch.cat(out, 1)


@pytest.fixture(scope="module")
def model():
    return gated(dtype=torch.float32, window=6, sinks=2, **LESS)


@pytest.mark.covering(1)  # every policy, by turns under it all along and in every other call
@pytest.mark.parametrize("on", [True, (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_run_under_autocast(model, policy, on):
    ids, mask = padded_batch([90, 81])
    cache = KVCache(model, policy, None if policy in ("full", *THRESHOLD) else 0.5, prompt_tokens=64)
    assert fed(model, cache, ids, mask, on).isfinite().all()


NARROW = ("snapkv+qaq", "snapkv+think")  # hold less of each token


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in NARROW + THRESHOLD])
def test_a_whole_budget_under_autocast_is_the_plain_cache_under_autocast(model, policy):
    ids, mask = padded_batch([90, 81])
    wanted = fed(tiny(dtype=torch.float32), DynamicCache(), ids, mask, True)
    exact = fed(tiny(dtype=torch.float32), DynamicCache(), ids, mask, False)
    budget = None if policy == "full" else 1.0
    found = fed(model, KVCache(model, policy, budget, prompt_tokens=64), ids, mask, True)
    real = mask.bool()
    real[:, 64:] &= policy not in STREAMS  # they hold as many tokens as the prompt had, and evict from then on
    assert (found - wanted)[real].square().mean() <= 2 * (wanted - exact)[real].square().mean()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_under_autocast_point_where_float32_ones_do(form):
    gradients = []
    for on in (False, True):
        model = gated(dtype=torch.float32, window=4, sinks=2, **form).train()
        ids, mask = padded_batch([60, 41])
        split = 40 if form.get("context") else None
        with autocast(on), parallel(model, "log", split=split):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            assert all(w.recorded.logits.dtype == torch.float32 for w in wrappers(model))
            torch.nn.functional.cross_entropy(logits[:, 41:-1].flatten(0, 1).float(), ids[:, 42:].flatten()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(g.isfinite().all() for g in gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9
