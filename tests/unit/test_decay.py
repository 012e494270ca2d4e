"""TRIM-KV: tokens that fade, a buffer of fixed size while decoding, and the loss that trains for it."""

import pytest
import torch
from conftest import dense_reference, gated, padded_batch

import gatekv
from gatekv.cache.gate_stream import FOLD
from gatekv.gates.relaxations import relax
from gatekv.modules import wrappers
from gatekv.ops.naive import gated_attention
from gatekv.policies.budgets import faded
from gatekv.training import sparsity

PROMPT, STEPS = 60, 70


def decaying(family="llama", window=8):
    return gated(family, relaxation="decay", window=window, sinks=2, hidden=16, initial_logit=3.0)


class Buffer:
    """One head's buffer as a plain list, an independent account of the rule: (slot, logit) of what it holds."""

    def __init__(self, logits, room, window, sinks):
        age = torch.arange(PROMPT - 1, -1, -1)
        worth = faded(logits, age).tolist()
        protected = [i for i in range(PROMPT) if i < sinks or i >= PROMPT - window]
        others = sorted((i for i in range(PROMPT) if i not in protected), key=lambda i: -worth[i])
        kept = sorted(protected + others[: room - len(protected)])
        self.sinks, self.window, self.room = sinks, window, room - (window - 1)
        self.old = [i for i in kept if i < PROMPT - window + 1]
        self.young = [i for i in kept if i >= PROMPT - window + 1]
        self.trim(logits, PROMPT)

    def step(self, slot, logits):
        self.young.append(slot)
        self.old.append(self.young.pop(0))
        self.trim(logits, slot + 1)

    def trim(self, logits, seen):
        while len(self.old) > self.room:
            worth = {i: float(faded(logits[i], torch.tensor(seen - i))) for i in self.old if i >= self.sinks}
            self.old.remove(min(worth, key=worth.get))

    def held(self):
        return set(self.old) | set(self.young)


def test_the_buffer_is_the_rule_and_the_output_is_the_buffers(family):
    model = decaying(family)
    ids, _ = padded_batch([PROMPT + STEPS], seed=8)
    cache = gatekv.KVCache(model, "gate+decay", 0.5)
    said = {w.layer_idx: [] for w in wrappers(model)}
    for w in wrappers(model):
        w.gate().register_forward_hook(lambda m, a, out, at=said[w.layer_idx]: at.append(out[0][0]))
    live = torch.eye(PROMPT + STEPS, dtype=torch.bool).expand(2, 1, 3, -1, -1).clone()
    live[..., :PROMPT, :PROMPT] = True
    with torch.no_grad():
        outs = [model(ids[:, :PROMPT], past_key_values=cache).logits]
        flags = [torch.stack(cache.flags())[:, 0]]
        for t in range(PROMPT, PROMPT + STEPS):
            live[:, 0, :, t, :t] |= flags[-1]
            outs.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
            flags.append(torch.stack(cache.flags())[:, 0])
    wanted = dense_reference(model, ids, live)
    assert (torch.cat(outs, 1) - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    for layer, logits in said.items():
        logits = torch.cat(logits, -1)
        for head in range(3):
            unread = logits.shape[1]
            assert unread >= PROMPT + STEPS - 8 - FOLD
            buffer = Buffer(logits[head, :PROMPT], 30, 8, 2)
            assert buffer.held() == set(flags[0][layer, head].nonzero()[:, 0].tolist())
            for i in range(STEPS):
                buffer.step(PROMPT + i, logits[head])
                assert buffer.held() == set(flags[i + 1][layer, head].nonzero()[:, 0].tolist())
    assert max(int(f.sum(-1).max()) for f in flags) == 30, "ten times longer would hold no more"


def test_batch_and_padding_change_nothing_and_saving_keeps_the_buffer(tmp_path):
    model = decaying()
    ids, mask = padded_batch([50, 37])
    position = mask.sum(-1, keepdim=True)
    with torch.no_grad():
        cache = gatekv.KVCache(model, "gate+decay", 0.5)
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
        cache.save(str(tmp_path / "c.safetensors"))
        loaded = gatekv.KVCache.load(str(tmp_path / "c.safetensors"), model)
        alone = gatekv.KVCache(model, "gate+decay", 0.5)
        model(ids[1:, 13:], past_key_values=alone)
        for t in range(30):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            token = torch.tensor([[5 + t], [6 + t]])
            feed = dict(attention_mask=mask, position_ids=position + t)
            both = model(token, past_key_values=cache, **feed).logits
            again = model(token, past_key_values=loaded, **feed).logits
            single = model(token[1:], past_key_values=alone).logits
            torch.testing.assert_close(both[1:], single)
            assert torch.equal(both, again)


def test_a_full_budget_is_the_plain_model_until_the_first_token_leaves():
    model = decaying(window=16)
    ids, _ = padded_batch([60])
    with torch.no_grad():
        cache = gatekv.KVCache(model, "gate+decay", 1.0)
        got = [model(piece, past_key_values=cache).logits for piece in ids[:, :51].split([50, 1], 1)]
        plain = model(ids[:, :51], use_cache=False).logits
    assert (torch.cat(got, 1) - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_one_cut_after_a_shared_prefill_and_everything_later_kept():
    model = decaying()
    ids, _ = padded_batch([PROMPT + 40], seed=8)
    with torch.no_grad():
        undecided = gatekv.KVCache.undecided(model)
        model(ids[:, :PROMPT], past_key_values=undecided)
        cache = undecided.decide("gate+decay", 0.5, decode="keep")
        own = gatekv.KVCache(model, "gate+decay", 0.5)
        model(ids[:, :PROMPT], past_key_values=own)
        assert all(torch.equal(a, b) for a, b in zip(cache.flags(), own.flags()))
        for token in ids[:, PROMPT:].split(1, 1):
            model(token, past_key_values=cache)
    assert all(f[..., PROMPT:].all() and int(f[0, 0].sum()) == 30 + 40 for f in cache.flags())


def test_training_weights_fade_with_distance():
    model = decaying()
    ids, _ = padded_batch([20])
    with torch.no_grad(), gatekv.parallel(model, "decay") as layers:
        model(ids, use_cache=False)
        assert layers[0].recorded.logits.shape == (1, 3, 20)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    beta = relax("decay", torch.randn(1, 2, 9, dtype=torch.float64), 1.0)
    i = torch.arange(9)
    bias = (i[:, None] - i) * beta.log()[:, :, None]
    scores = (q @ k.mT + bias.masked_fill(i[:, None] < i, -torch.inf)).softmax(-1)
    torch.testing.assert_close(gated_attention(q, k, v, beta, window=0, scale=1.0, decay=True), scores @ v)


@pytest.mark.parametrize("n", [5, 130, 300])
def test_capacity_loss_counts_what_a_buffer_cannot_hold(n):
    torch.manual_seed(0)
    beta, valid = torch.rand(2, 3, n, dtype=torch.float64), torch.ones(2, n, dtype=torch.bool)
    valid[1, n // 2 :] = False
    got = sparsity.overfull(beta, valid, 0.01)
    for row, total in enumerate((n, n // 2)):
        for head in range(3):
            held = [sum(float(beta[row, head, i]) ** (t - i) for i in range(t + 1)) for t in range(total)]
            wanted = sum(max(0.0, h - 0.01 * total) for h in held) / total**2
            assert float(got[row, head]) == pytest.approx(wanted, rel=1e-6)


def test_decay_belongs_to_gates_that_fade():
    with pytest.raises(ValueError, match="gate\\+decay"):
        gatekv.KVCache(decaying(), "gate+global", 0.5)
    with pytest.raises(ValueError, match="do not fade"):
        gatekv.KVCache(gated(), "gate+decay", 0.5)
    with pytest.raises(ValueError, match="turns"):
        gatekv.KVCache(decaying(), "gate+decay", 0.5, turns=True)
    with pytest.raises(ValueError, match="for gates"):
        gatekv.KVCache(gated(), "snapkv+decay", 0.5)


def test_a_sparse_prefill_is_refused_before_anything_is_fed():
    with pytest.raises(ValueError, match="ranks a whole prompt by age: use prefill='dense'"):
        gatekv.KVCache(decaying(), "gate+decay", 0.5, prefill="sparse")
