"""The gate as a policy: its logits, and what the prompt's last queries attended to."""

import pytest
import torch
from conftest import gated, padded_batch, recurrent_logits
from test_policies import view

import gatekv
from gatekv.policies import Gate
from gatekv.policies.gate import NOTHING


def test_the_score_is_the_logit_and_the_observed_attention():
    v = view()
    assert torch.equal(Gate(observed=0).score(v), v.gate_logits()) and Gate(observed=0).queries == 0
    got = Gate(observed=0.5).score(v)
    for b in range(2):
        for h in range(2):
            seen = torch.zeros(40)
            for g in range(3):
                s = v.queries[b, h * 3 + g, -32:] @ v.keys[b, h].T * 0.5
                s = s.masked_fill(torch.arange(40) > torch.arange(8, 40)[:, None], -torch.inf)
                seen = torch.maximum(seen, s.softmax(-1).amax(0))
            for j in range(40):
                wanted = (
                    v.gate_logits()[b, h, j].sigmoid().log() + 0.5 * (seen[max(0, j - 3) : j + 4].max() + NOTHING).log()
                )
                assert got[b, h, j].item() == pytest.approx(wanted.item(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["global", "ada", "uniform"])
def test_evidence_changes_what_the_prompt_keeps_and_not_how_later_tokens_are_judged(rule):
    """A later token has no evidence yet: it is measured by the logit that the gate alone would have asked for."""
    model = gated(window=8, sinks=2)
    ids, mask = padded_batch([80, 66])
    caches = [gatekv.KVCache(model, f"gate+{rule}", 0.4)]
    caches.append(gatekv.KVCache(model, gatekv.policies.Policy(Gate(observed=0), caches[0].config.policy.rule), 0.4))
    for cache in caches:
        recurrent_logits(model, ids, mask, cache, [70])
    one, two = ([layer.evictor.cut for layer in cache.evicting()] for cache in caches)
    assert all(torch.equal(a, b) for a, b in zip(one[:1], two[:1])), "the first layer's logits are the same in both"
    assert any(not torch.equal(a, b) for a, b in zip(caches[0].flags(), caches[1].flags()))


@torch.no_grad()
def test_chunks_of_a_prompt_make_no_difference():
    model = gated(window=8, sinks=2)
    ids, mask = padded_batch([80, 66])
    whole = gatekv.KVCache(model, "gate+ada", 0.4)
    chunked = gatekv.KVCache(model, "gate+ada", 0.4, prompt_tokens=70)
    a = recurrent_logits(model, ids, mask, whole, [70, 71])
    b = recurrent_logits(model, ids, mask, chunked, [30, 50, 70, 71])
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(x, y) for x, y in zip(whole.flags(), chunked.flags()))


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="observed is a weight"):
        Gate(observed=-0.1)
