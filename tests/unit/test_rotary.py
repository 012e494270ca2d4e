"""How layers turn keys by position: right for every way that families do it, or refused before anything is computed."""

import copy

import pytest
import torch
from conftest import SHAPE, assert_close, gated, padded_batch, parallel_logits, recurrent_logits
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import gatekv
from gatekv import attention
from gatekv.gates.key_mlp import key_features
from gatekv.modules import attention_layers, wrappers
from gatekv.policies import StreamingLLM
from gatekv.rotary import Rotary, asked_from, rotary_of, rotate, unrotate

NO_TOKENS = dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)
TWO = ["full_attention", "full_attention"]
# Model type -> (the layouts of its evicting layers, what differs from SHAPE).
FAMILIES = {
    "llama": (["half", "half"], {}),
    "qwen3": (["half", "half"], {}),
    "phi": (["half", "half"], dict(head_dim=None, rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5))),
    "phi3": (["half", "half"], dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5))),
    "nemotron": (["half", "half"], {}),
    "nanochat": (["half", "half"], {}),  # the other way round, and normed behind it
    "hunyuan_v1_dense": (["half", "half"], {}),  # normed behind it, with a weight
    "cohere": (["interleaved", "interleaved"], dict(head_dim=None)),
    "glm4": (["interleaved", "interleaved"], {}),  # half of the head, of neighbours
    "ernie4_5": (["interleaved", "interleaved"], {}),
    "helium": (["interleaved", "interleaved"], {}),
    "smollm3": (["half", "none"], dict(no_rope_layers=[1, 0])),
    "exaone4": (["none"], dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)),
    "cohere2": (["none"], dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)),
    "afmoe": (["none"], dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)),
    "gemma4_unified_text": (["half"], dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)),
    "llama4_text": (["interleaved", "none"], dict(layer_types=TWO, no_rope_layers=[1, 0], intermediate_size_mlp=64,
                                                   num_local_experts=2)),
}  # fmt: skip


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


def model_of(family, **changes):
    """A random model of a family; norms have weights that matter."""
    torch.manual_seed(0)
    changes = {**SHAPE, **NO_TOKENS, **FAMILIES[family][1], **changes}
    config = AutoConfig.for_model(family, **{name: value for name, value in changes.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
            if ".experts." in name:  # never drawn by some families
                nn.init.normal_(p, std=0.1)
    if family == "afmoe":
        model.set_experts_implementation("eager")  # the default, a grouped matrix product, has no float64
    return model.double().eval()


def test_keys_before_rope_do_not_know_where_they_stand(family, monkeypatch):
    """One token at every place: its key before RoPE is the same, and turned again it is the key."""
    seen = []

    def look(keys, rotary):
        seen.append((keys, unrotate(keys, rotary), rotary))
        return key_features(keys, rotary)

    monkeypatch.setattr(attention, "key_features", look)
    model = gated(model=model_of(family), gate="key_mlp")
    with torch.no_grad(), gatekv.parallel(model):
        model(torch.full((1, 40), 7), use_cache=False)
    assert [rotary.layout for *_, rotary in seen] == FAMILIES[family][0]
    for keys, raw, rotary in seen:
        torch.testing.assert_close(raw, raw[:, :, :1].expand_as(raw), rtol=1e-4, atol=1e-4)  # cos, sin are float32
        torch.testing.assert_close(rotate(raw, rotary), keys)
        assert (rotary.layout == "none") == torch.allclose(keys, keys[:, :, :1])


@torch.no_grad()
def test_positions_in_the_cache_do_not_know_those_of_the_text(family):
    model, generator = model_of(family), torch.Generator().manual_seed(3)
    if family == "hunyuan_v1_dense":  # it does not see distances alone: its norms weigh channels behind the rotation
        waits, ids = gatekv.KVCache.undecided(model), torch.ones(1, 60, dtype=torch.long)
        model(ids, past_key_values=waits)
        with pytest.raises(ValueError, match="more than distances counts: use positions='original'"):
            waits.decide(StreamingLLM(positions="cache"), 0.3)
        with pytest.raises(ValueError, match="more than distances counts: use positions='original'"):
            model(ids, past_key_values=gatekv.KVCache(model, StreamingLLM(positions="cache"), 0.3))
        return
    ids, later = (torch.randint(1, 97, (1, n), generator=generator) for n in (60, 8))
    found = []
    for shift in (0, 57):
        cache = gatekv.KVCache(model, StreamingLLM(sinks=2, positions="cache"), 0.3)
        model(ids, position_ids=torch.arange(60)[None] + shift, past_key_values=cache)
        places = torch.arange(60, 68)[None] + shift
        steps = [
            model(later[:, i : i + 1], position_ids=places[:, i : i + 1], past_key_values=cache).logits
            for i in range(8)
        ]
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["llama", "cohere", "glm4", "phi", "hunyuan_v1_dense", "smollm3", "cohere2", "llama4_text"]
)
def test_key_gates_keep_the_law(name):
    model = gated(model=model_of(name), gate="key_mlp", window=6, sinks=2)
    ids, mask = padded_batch([60, 41, 17])
    wanted = parallel_logits(model, ids, mask)
    cache = gatekv.KVCache(model, "gate")
    assert_close(recurrent_logits(model, ids, mask, cache, [7, 30, 31, 32]), wanted, mask)
    assert 0.1 < torch.stack(cache.flags()).float().mean() < 0.95


def test_queries_are_asked_from_elsewhere():
    generator = torch.Generator().manual_seed(0)
    raw, angles = torch.randn(1, 2, 5, 8, generator=generator), torch.rand(1, 9, 3, generator=generator)
    for layout in ("half", "interleaved"):
        both = torch.cat([angles, angles], -1) if layout == "half" else angles.repeat_interleave(2, -1)
        everywhere = Rotary(1.3 * both.cos(), 1.3 * both.sin(), layout)  # some families scale attention so
        now, there = (everywhere.columns(lambda t, a=a: t[:, a : a + 5]) for a in (0, 4))
        torch.testing.assert_close(asked_from(rotate(raw, now), now, there), rotate(raw, there))
        assert torch.equal(everywhere.token(3)[0], both[:, 3:4].cos() * 1.3)


def test_a_norm_that_lets_nothing_through_a_channel_gives_no_nan():
    angles, scale = torch.rand(1, 5, 8), torch.tensor([1.0, 0, 2, 1, 1, 1, 1, 1])
    keys = torch.randn(1, 2, 5, 8) * scale
    rotary = Rotary(angles.cos(), angles.sin(), "half", scale)
    torch.testing.assert_close(rotate(unrotate(keys, rotary), rotary), keys)


class Strange(LlamaAttention):
    """Turns the last channels of a head instead of the first, or norms keys by their mean, or shifts them."""

    how = "last"

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = position_embeddings
        if self.how == "last":
            q, k = (rotate(x.flip(-1), (cos, sin)).flip(-1).roll(1, -1) for x in (q, k))
        elif self.how == "mean":
            q, k = (rotate(x, (cos, sin)) for x in (q, k))
            k = self.norm(k)
        else:
            k = k + cos[:, None]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = attention.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def strange(how):
    model = model_of("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__, layer.self_attn.how = Strange, how
        layer.self_attn.norm = nn.LayerNorm(8).double()
    return model


@torch.no_grad()
@pytest.mark.parametrize("how", ["last", "mean", "shift"])
def test_what_is_not_known_is_refused_before_anything_changes(how):
    model, ids = strange(how), torch.randint(1, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = gatekv.KVCache(model, StreamingLLM(positions="cache"), 0.5)
    sentence = r"how layer 0 of this model \(Strange, llama\) turns keys.*gate='mlp', or positions='original'"
    with pytest.raises(ValueError, match=sentence):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    waits = gatekv.KVCache.undecided(model)  # any other policy may be asked of it
    model(ids, past_key_values=waits)
    with pytest.raises(ValueError, match="turns by them in a way that gatekv does not know"):
        waits.decide(StreamingLLM(positions="cache"), 0.5)
    small = waits.decide(StreamingLLM(), 0.5)
    model(ids[:, :3], past_key_values=small)
    gates = gated(model=copy.deepcopy(model), gate="key_mlp")
    with pytest.raises(ValueError, match=sentence), gatekv.parallel(gates):
        gates(ids, use_cache=False)
    with gatekv.parallel(gated(model=model, gate="mlp")):
        model(ids, use_cache=False)


@torch.no_grad()
def test_found_once_a_layer_and_copied_with_it():
    model = gated(model=model_of("cohere"), gate="key_mlp")
    with gatekv.parallel(model):
        model(torch.ones(1, 6, dtype=torch.long), use_cache=False)
    found = [w.rotation for w in wrappers(model)]
    assert [r.layout for r in found] == ["interleaved", "interleaved"]
    assert [w.rotation for w in wrappers(copy.deepcopy(model))] == found
    with gatekv.parallel(model):
        model(torch.ones(1, 9, dtype=torch.long), use_cache=False)
    assert all(a is w.rotation for a, w in zip(found, wrappers(model)))
    gatekv.detach(model)
    assert all("rotation" not in vars(m) for m in model.modules())


def test_positions_of_three_kinds_are_refused():
    """Qwen2-VL's of time, height and width come as three, and each part of a head takes its own."""
    model = model_of("llama")
    gatekv.KVCache(model, "full")
    layer = attention_layers(model)[0][1]
    with pytest.raises(ValueError, match="cannot tell how layer 0"):
        rotary_of(layer, (torch.ones(3, 1, 4, 8), torch.zeros(3, 1, 4, 8)))
