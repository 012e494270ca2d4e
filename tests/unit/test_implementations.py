"""Whatever attention implementation a model is loaded with: its own without gatekv, gatekv's in gated layers.

flash-attention and kernels from the Hub need an accelerator, so stand-ins are registered under their names, which read
what the real ones read: no mask or the pads alone, and borders of packed rows off the positions.
"""

import pytest
import torch
from conftest import gated, padded_batch, positions_of, tiny
from test_modules import mixed
from test_training import ToyData
from torch.nn.attention import flex_attention as flex
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache, masking_utils
from transformers.masking_utils import eager_mask, find_packed_sequence_indices, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import gatekv
from gatekv import attention
from gatekv.masks import whole_mask
from gatekv.modules import base_model, gated_pass, wrappers
from gatekv.passes import Observe, Relaxed
from gatekv.training.lesson import LessObjective
from gatekv.training.objective import Objective
from gatekv.training.rows import Rows

NAMES = [
    "flash_attention_2",
    "flash_attention_3",
    "kernels-community/flash-attn2",
    "flex_attention",
    "mine",
    "my_eager",
]
MASKS = {"mine": sdpa_mask, "my_eager": eager_mask}
CALLED: list[int] = []
IDS = torch.randint(1, 97, (1, 40), generator=torch.Generator().manual_seed(3))


def dense(q, k, v, visible, scaling):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling)
    return out.nan_to_num().transpose(1, 2).contiguous(), None


def flash(module, q, k, v, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    """As flash-attention: queries are the last of the keys; a mask says which tokens are pads."""
    CALLED.append(module.layer_idx)
    n, t = q.shape[2], k.shape[2]
    i, j = torch.arange(t - n, t)[:, None], torch.arange(t)
    visible = (i >= j) & (i - j < (sliding_window or t))
    if attention_mask is not None:
        assert attention_mask.ndim == 2 and not attention_mask.all()
        return dense(q, k, v, visible & attention_mask[:, None, None], scaling)
    if n == t and len(q) == 1:
        document = find_packed_sequence_indices(kwargs["position_ids"])
        visible = visible if document is None else visible & (document[:, :, None] == document[:, None])[:, None]
    return dense(q, k, v, visible, scaling)


def blocks(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """As flex_attention, not compiled."""
    CALLED.append(module.layer_idx)
    out = flex.flex_attention(q, k, v, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def whole(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """As people write them who register the mask of sdpa or eager for it."""
    CALLED.append(module.layer_idx)
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return dense(q, k, v, causal if attention_mask is None else attention_mask, scaling)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    slow = flex.create_block_mask  # compiled, it takes most of a minute
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **k: slow(**k | {"_compile": False}))
    for name in NAMES:
        function = {"flex_attention": blocks, "mine": whole, "my_eager": whole}.get(name, flash)
        monkeypatch.setitem(AttentionInterface._global_mapping, name, function)
        monkeypatch.delitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, raising=False)  # kvpress's, once imported
        if name != "flex_attention":
            monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, MASKS.get(name, flash_attention_mask))
    CALLED.clear()


def loaded(model, name):
    """The model, as if it had been loaded with that attention implementation."""
    base_model(model).config._attn_implementation_internal = name
    return model


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(ids, **options).logits


@torch.no_grad()
def in_calls(model, ids, mask, cache, cuts):
    edges, positions = [0, *cuts, ids.shape[1]], positions_of(mask)
    return torch.cat([
        model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache).logits
        for a, b in zip(edges, edges[1:])
    ], 1)  # fmt: skip


def padded(where):
    """(ids, mask) of three rows of 40 slots with pads on that side, or nowhere."""
    generator, mask = torch.Generator().manual_seed(7), torch.ones(3, 40, dtype=torch.long)
    for row, pads in zip(mask, (0, 9, 21)):
        if where == "right":
            row[40 - pads :] = 0
        elif where == "left":
            row[:pads] = 0
    return torch.randint(1, 97, mask.shape, generator=generator) * mask, mask


@pytest.mark.parametrize("name", NAMES)
def test_without_gatekvs_cache_the_models_own_implementation_answers_bit_for_bit(name):
    model = loaded(tiny(), name)
    wanted = logits(model)
    assert CALLED == [0, 1]
    cache = gatekv.KVCache(model, "snapkv", 0.5)
    for own in ({}, {"past_key_values": DynamicCache(config=model.config)}, {"use_cache": False}):
        CALLED.clear()
        assert torch.equal(logits(model, **own), wanted) and CALLED == [0, 1]
    CALLED.clear()
    logits(model, past_key_values=cache)
    assert (
        not CALLED
        and model.config._attn_implementation == wrappers(model)[0].module.config._attn_implementation == name
    )
    gatekv.detach(model)
    assert torch.equal(logits(model), wanted) and CALLED == [0, 1] and model.config._attn_implementation == name


@pytest.mark.covering(1)
@pytest.mark.parametrize("where", ["nowhere", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_budget_is_the_plain_sdpa_model(name, where):
    ids, mask = padded(where)
    real = mask.bool()
    wanted = logits(tiny(), ids, attention_mask=mask, position_ids=positions_of(mask))[real]
    model = loaded(tiny(), name)
    for cuts in ([], [17, 18], [39], [1, 2, 30]):
        got = in_calls(model, ids, mask, gatekv.KVCache(model, "full"), cuts)
        torch.testing.assert_close(got[real], wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        logits(model, ids, attention_mask=mask, position_ids=positions_of(mask))[real], wanted, rtol=1e-9, atol=1e-9
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "policy,budget", [("snapkv", 0.5), ("h2o", 0.6), ("gate", None), ("gate+global", 0.5), ("d2o", 0.6)]
)
@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_policies_keep_what_they_keep_under_sdpa(name, policy, budget):
    ids, mask = padded("left")
    found = []
    for implementation in ("sdpa", name):
        model = loaded(gated(window=4), implementation)
        cache = gatekv.KVCache(model, policy if policy != "d2o" else "h2o+merge_similar", budget)
        found.append((in_calls(model, ids, mask, cache, [36, 37])[mask.bool()], cache.flags()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


@pytest.mark.parametrize("name", NAMES)
def test_generation_follows_the_plain_model(name):
    ids, mask = padded_batch([24, 15])
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    wanted = tiny().generate(ids, **options)
    model = loaded(tiny(), name)
    for beams in (1, 2):
        wanted = tiny().generate(ids, num_beams=beams, **options)
        got = model.generate(ids, num_beams=beams, past_key_values=gatekv.KVCache(model, "full"), **options)
        assert torch.equal(got, wanted)


def test_sliding_layers_keep_the_models_own():
    ids, mask = padded_batch([24, 15])
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False)
    wanted = mixed().generate(ids, **options)
    model = loaded(mixed(), "flash_attention_2")
    got = model.generate(ids, past_key_values=gatekv.KVCache(model, "full"), **options)
    assert torch.equal(got, wanted) and set(CALLED) == {0, 2}


def gradient(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.requires_grad)])


@pytest.mark.parametrize("name", NAMES)
def test_gates_learn_what_they_learn_under_sdpa(name):
    ids, mask = padded_batch([40, 30])
    packed = dict(input_ids=IDS, labels=IDS, position_ids=torch.cat([torch.arange(n) for n in (11, 20, 9)])[None])
    rows = dict(input_ids=ids, attention_mask=mask, labels=ids)
    plain, model = (gated(window=4, relaxation="log").train() for _ in range(2))
    loaded(model, name)
    for inputs in (rows, dict(rows, attention_mask=torch.ones_like(mask)), dict(packed, use_cache=False)):
        wanted = gradient(plain, **inputs)
        torch.testing.assert_close(gradient(model, **inputs), wanted, rtol=1e-8, atol=1e-9)
        assert not CALLED and wanted.abs().sum() > 0
    model.eval()
    with gatekv.parallel(model):
        got = logits(model, ids, attention_mask=mask, use_cache=False)
    with gatekv.parallel(plain.eval()):
        wanted = logits(plain, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_pass_leaves_plain_is_sdpas_also_behind_cached_tokens(name):
    plain, model = gated(window=4), loaded(gated(window=4), name)
    ids, mask = padded_batch([40, 30])
    wanted = logits(plain, ids, attention_mask=mask)
    with gated_pass(model, Observe()) as said:
        got = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-9, atol=1e-9)
        assert not CALLED and said[1].valid.equal(mask.bool())
        full = torch.ones_like(mask)
        cache = DynamicCache(config=base_model(model).config)
        wanted = logits(plain, ids, attention_mask=full)
        logits(model, ids[:, :25], past_key_values=cache)
        torch.testing.assert_close(
            logits(model, ids[:, 25:], past_key_values=cache), wanted[:, 25:], rtol=1e-9, atol=1e-9
        )
    assert not CALLED


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_reads_its_mask_once(name, monkeypatch):
    from gatekv import masks

    made, make = [], masks._kept
    monkeypatch.setattr(masks, "_kept", lambda *args: made.append(make(*args)) or made[-1])
    model = loaded(tiny(), name)
    ids, mask = padded("left")
    logits(model, ids, attention_mask=mask, past_key_values=gatekv.KVCache(model, "full"))
    assert len({id(m) for m in made}) == (name not in MASKS)
    made.clear()
    assert not len(masks._MADE), "nothing of a forward stays"


def test_a_mask_that_was_written_in_place_is_read_again():
    module, q, mask = wrappers(gated())[0].module, torch.zeros(1, 6, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    mask[0, 0] = False
    assert whole_mask(module, mask, q, 4, None)[0, 0, -1].tolist() == [False, True, True, True]
    mask[0, 1] = False
    assert whole_mask(module, mask, q, 4, None)[0, 0, -1].tolist() == [False, False, True, True]
    assert whole_mask(module, mask, q[:, :, :2], None, None)[0, 0].tolist() == [
        [False, False, True, False],
        [False, False, True, True],
    ]


def test_one_warning_says_who_answers(monkeypatch):
    said = []
    monkeypatch.setattr(attention.logger, "warning_once", said.append)
    gatekv.KVCache(tiny(), "full")
    assert not said
    gatekv.KVCache(loaded(tiny(), "flash_attention_2"), "full")
    gated(model=loaded(tiny(), "flash_attention_2"))
    assert len(set(said)) == 1 and "instead of flash_attention_2, whose result it cannot weigh" in said[0]


def test_what_makes_no_masks_is_refused_with_the_cure(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "blind", whole)
    for name in ("blind", "paged|eager"):
        model = loaded(tiny(), name)
        for use in (lambda: gatekv.KVCache(model, "full"), lambda: gated(model=model)):  # noqa: B023
            with pytest.raises(ValueError, match="has no mask function.*set_attn_implementation.'sdpa'"):
                use()
        assert not wrappers(model)
    model = loaded(tiny(), "mine")
    cache = gatekv.KVCache(model, "full")
    loaded(model, "blind")
    with pytest.raises(ValueError, match="has no mask function"):
        logits(model, past_key_values=cache)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "blind", sdpa_mask)
    logits(model, past_key_values=cache)


@pytest.mark.parametrize(
    "mask", ["text", torch.zeros(1, 40), torch.ones(1, 3, 40, dtype=torch.bool)], ids=["object", "2D float", "3D"]
)
def test_masks_of_other_kinds_are_refused_with_the_cure(mask, monkeypatch):
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", lambda **kwargs: mask)
    model = loaded(tiny(), "mine")
    with pytest.raises(ValueError, match="'mine' hands LlamaAttention a mask that gatekv cannot read.*'sdpa'"):
        logits(model, past_key_values=gatekv.KVCache(model, "full"))


def test_masks_that_do_not_fit_are_refused_with_the_cure():
    model = loaded(gated(window=4), "flash_attention_2")
    static = StaticCache(config=base_model(model).config, max_cache_len=64)
    with gated_pass(model, Observe()), pytest.raises(ValueError, match="40 queries, and 64 keys.*'sdpa'"):
        logits(model, past_key_values=static, attention_mask=torch.ones_like(IDS))
    heads = flex.create_block_mask(lambda b, h, i, j: (i >= j) & (h < 9), 1, 6, 40, 40, device="cpu")
    loaded(model, "flex_attention")
    with pytest.raises(ValueError, match="one mask for all heads"):
        logits(model, attention_mask=heads, past_key_values=gatekv.KVCache(model, "full"))


def test_packed_arguments_of_flash_attention_are_refused():
    model = loaded(tiny(), "flash_attention_2")
    ends = torch.tensor([0, 11, 40], dtype=torch.int32)
    with pytest.raises(ValueError, match="packs several sequences into one row .`cu_seq_lens_q`"):
        logits(model, past_key_values=gatekv.KVCache(model, "full"), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def test_several_packed_rows_need_an_attention_that_tells_them_apart():
    segments = torch.tensor([[0] * 5 + [1] * 3] * 2)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]] * 2)
    batch = dict(
        input_ids=torch.ones(2, 8).long(),
        attention_mask=torch.ones(2, 8).long(),
        segments=segments,
        position_ids=positions,
    )
    model = loaded(gated(window=4), "flash_attention_2")
    with pytest.raises(ValueError, match="per_device_train_batch_size=1.*'sdpa'"):
        Rows.of(batch, model)
    one = Rows.of({name: t[:1] for name, t in batch.items()}, model)
    with gated_pass(model, Relaxed(documents=one.documents)), torch.no_grad():
        got = one.hidden(base_model(model).model)
    plain = gated(window=4)
    other = Rows.of({name: t[:1] for name, t in batch.items()}, plain)
    with gated_pass(plain, Relaxed(documents=other.documents)), torch.no_grad():
        torch.testing.assert_close(got, other.hidden(base_model(plain).model), rtol=1e-9, atol=1e-9)


LESSONS = {
    "kl": dict(objective="kl"),
    "dense": dict(objective="lm", prefill="dense"),
    "layers": dict(objective="attention_mse", scope="layer", oracle_weight=0.5),
}


@pytest.mark.covering(1)  # what differs is the mask, and every kind of it is seen once
@pytest.mark.parametrize("lesson", [*LESSONS, "maps"])
@pytest.mark.parametrize("name", NAMES)
def test_objectives_are_those_under_sdpa(name, lesson):
    found = []
    for implementation in ("sdpa", name):
        torch.manual_seed(0)
        model = loaded(gated(window=4, **(dict(gate="none", less_rank=2) if lesson == "maps" else {})), implementation)
        model.train()
        if lesson == "maps":
            ids, mask = padded_batch([80, 70])
            rows = {"input_ids": ids, "attention_mask": mask, "split": torch.tensor([60, 60]), "weights": mask.double()}
            loss = LessObjective(model, "snapkv", "kl")(rows, 0.75)["loss"]
        else:
            loss = Objective(model, **LESSONS[lesson])(ToyData().batch(0, 2, align=True), 0.5)["loss"]
        loss.backward()
        found.append(
            torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.requires_grad)])
        )
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)
    assert found[0][1:].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_positions_that_jump_mean_under_each_what_they_mean_to_it(name):
    """With a mask of ones sdpa takes a row for one sequence, wherever its positions start anew; flash-attention does not."""
    positions = torch.cat([torch.arange(n) for n in (11, 20, 9)])[None]
    ones = dict(attention_mask=torch.ones_like(IDS), position_ids=positions, use_cache=False)
    model = loaded(gated(window=4), name)
    wanted = logits(model, **ones)
    with gated_pass(model, Observe()):
        torch.testing.assert_close(logits(model, **ones), wanted, rtol=1e-9, atol=1e-9)
