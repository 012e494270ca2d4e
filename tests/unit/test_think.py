"""ThinK: keys are really stored with fewer channels, and attention is what it would be with these channels at zero."""

import pytest
import torch
from conftest import VOCAB, gated, padded_batch, recurrent_logits, tiny

import gatekv
from gatekv.attention import AttentionCall
from gatekv.modules import base_model, wrappers
from gatekv.policies import AdaKV, SnapKV, ThinK
from gatekv.policies.think import Channels

POLICIES = ["think", "snapkv+think", "snapkv+ada+think", "keydiff+pyramid+think", "random+global+think", "h2o+think"]


class ZeroedMemory:
    """Answers attention densely: later queries see what the layer held, old keys with the dropped channels at zero."""

    def __init__(self, layer, prompt, window):
        self.held, self.channels, self.prompt, self.old = (
            layer.stage.held(layer),
            layer.store.narrow.channels,
            prompt,
            prompt - window,
        )

    def attend(self, call, q, k, v, mask, scaling):
        n, kv, d = k.shape[2], k.shape[1], k.shape[3]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        stays = torch.nn.functional.pad(self.held[..., : self.prompt], (0, n - self.prompt), value=True)
        kept = torch.zeros(1, kv, d, dtype=torch.bool).scatter(2, self.channels, True)
        old = (torch.arange(n) < self.old)[None, None, :, None]
        thin = k.masked_fill(old & ~kept[:, :, None], 0)
        repeat = lambda t: t.repeat_interleave(q.shape[1] // kv, 1)  # noqa: E731
        outs = []
        for keys, live, part in ((k, causal[None, None], slice(0, self.prompt)),
                                 (thin, causal & stays[:, :, None], slice(self.prompt, n))):  # fmt: skip
            live = repeat(live.expand(-1, kv, -1, -1))[:, :, part]
            attend = torch.nn.functional.scaled_dot_product_attention
            outs.append(attend(q[:, :, part], repeat(keys), repeat(v), attn_mask=live, scale=scaling))
        return torch.cat(outs, 2)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_recurrent_is_the_dense_form_with_channels_at_zero(policy, family):
    model = tiny(family)
    ids, mask = padded_batch([90])
    decode = {} if policy == "think" else {"decode": "keep"}
    cache = gatekv.KVCache(model, policy, 0.6, **decode)
    got = recurrent_logits(model, ids, mask, cache, [70, 71, 80])
    for w, layer in zip([w for w in wrappers(model)], cache.evicting()):
        memory = ZeroedMemory(layer, 70, 32)

        def forward(hidden_states, w=w, memory=memory, **kwargs):
            return type(w.module).forward(
                w.module, hidden_states, gatekv=AttentionCall(hidden_states, w.layer_idx, memory=memory), **kwargs
            )

        w.module.forward = forward
    wanted = base_model(model)(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("policy", [*POLICIES, "gate+global+think", "gate+think"])
def test_padded_rows_are_solo_rows(policy):
    model = gated(window=8, sinks=2) if "gate" in policy else tiny()
    budget = None if policy == "gate+think" else 0.6
    ids, mask = padded_batch([90, 75])
    together = recurrent_logits(model, ids, mask, gatekv.KVCache(model, policy, budget), [80, 81])
    for row, n in enumerate((90, 75)):
        cuts = [80 - (90 - n), 81 - (90 - n)]
        alone = recurrent_logits(model, ids[row : row + 1, 90 - n :], mask[row : row + 1, 90 - n :],
                                 gatekv.KVCache(model, policy, budget), cuts)  # fmt: skip
        torch.testing.assert_close(together[row : row + 1, 90 - n :], alone, rtol=1e-9, atol=1e-8)


@torch.no_grad()
def test_pruning_nothing_is_the_plain_model():
    model = tiny()
    ids, mask = padded_batch([60, 50])
    got = recurrent_logits(model, ids, mask, gatekv.KVCache(model, ThinK(prune=0.0)), [50, 51])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    wanted = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("prune", [0.4, 0.75])
def test_bytes_are_those_of_thinner_keys(prune):
    model = tiny(dtype=torch.float32, head_dim=64, hidden_size=384)
    ids = torch.randint(1, VOCAB, (1, 480))
    cache = gatekv.KVCache(model, ThinK(prune=prune))
    model(ids, past_key_values=cache)
    saved = int(64 * prune) / 64 / 2 * (480 - 32) / 480
    assert cache.memory()["ratio"] == pytest.approx(1 - saved, abs=0.03)
    for layer in cache.evicting():
        assert layer.store.narrow.pages.keys.shape[-1] == 64 - int(64 * prune)
        assert len(layer.store.narrow.pages) == (480 - 32) * layer.window.keys.shape[1]
        assert layer.stage.held(layer).all()
    both = gatekv.KVCache(model, "snapkv+think", 0.25)
    model(ids, past_key_values=both)
    assert both.memory()["ratio"] < 0.25


@torch.no_grad()
def test_a_question_a_turn_a_copy_and_a_file(tmp_path):
    model = tiny(dtype=torch.float64)
    ids = torch.randint(1, VOCAB, (2, 80), generator=torch.Generator().manual_seed(0))
    later = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))
    cache = gatekv.KVCache(model, AdaKV(ThinK(SnapKV())), 0.6)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "thin.safetensors")
    twin, loaded = cache.snapshot(), gatekv.KVCache.load(tmp_path / "thin.safetensors", model)
    assert str(loaded.config.policy) == "SnapKV x Ada x Channels"
    swapped = cache.snapshot()
    swapped.reorder_cache(torch.tensor([1, 0]))
    wanted = model(later, past_key_values=cache).logits
    torch.testing.assert_close(model(later, past_key_values=twin).logits, wanted)
    torch.testing.assert_close(model(later, past_key_values=loaded).logits, wanted)
    torch.testing.assert_close(model(later.flip(0), past_key_values=swapped).logits.flip(0), wanted)


@torch.no_grad()
def test_turns_are_thinned_through_the_same_channels():
    model = tiny(dtype=torch.float64)
    ids = torch.randint(1, VOCAB, (1, 160), generator=torch.Generator().manual_seed(0))
    cache = gatekv.KVCache(model, "snapkv+think", 0.6, turns=True)
    model(ids[:, :80], past_key_values=cache)
    first = [layer.store.narrow.channels.clone() for layer in cache.evicting()]
    model(ids[:, 80:], past_key_values=cache)
    cache.compress()
    for layer, channels in zip(cache.evicting(), first):
        assert torch.equal(layer.store.narrow.channels, channels)
        thin = layer.store.narrow.pages
        assert int(thin.positions[thin.occupied()].max()) == 160 - 32 - 1
        assert layer.stage.held(layer).sum(-1).unique().tolist() == [48 + 48]
    assert torch.isfinite(model(ids[:, :3], past_key_values=cache).logits).all()


def test_shares_of_bytes_and_errors():
    channels = Channels(prune=0.5, window=32)
    _, share = channels.fit(0.25, 640, 64, 2, evicts=True)
    assert (share * 640 - 32) * 0.75 + 32 == pytest.approx(0.25 * 640)
    assert channels.fit(0.9, 640, 64, 2, evicts=False) == (channels, 1.0)
    with pytest.raises(ValueError, match="keep their full width"):
        channels.fit(0.01, 640, 64, 2, evicts=True)
    with pytest.raises(ValueError, match="all tokens cost more, and this policy evicts none"):
        channels.fit(0.5, 640, 64, 2, evicts=False)
    with pytest.raises(ValueError, match="prune is the share"):
        Channels(prune=1.0)
    with pytest.raises(ValueError, match="window counts"):
        Channels(window=0)
    with pytest.raises(ValueError, match="names two of think"):
        gatekv.policies.resolve("snapkv+think+think", 0.5)
    with pytest.raises(ValueError, match="not made for each other"):
        gatekv.KVCache(tiny(), ThinK(gatekv.policies.StreamingLLM(positions="cache")), 0.5)
