"""LESS in the cache: tokens that leave are folded, and the answer is that of the parallel form."""

import pytest
import torch
from conftest import KINDS, VOCAB, gated, padded_batch, recurrent_logits, tiny

import gatekv
from gatekv.attention import AttentionCall, live_mask
from gatekv.modules import base_model, wrappers
from gatekv.ops import naive
from gatekv.ops.remainder import left_of

LESS = dict(less_rank=3, less_hidden=12)
FORMS = ["kernel", "centroids"]


def loud(model):
    """Maps whose remainder weighs as much as what is kept: an error in it would show."""
    for w in wrappers(model):
        for name, p in w.less().named_parameters():
            torch.nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(len(name) + w.layer_idx))
    return model.eval()


class Reference:
    """One layer answered densely: softmax over what is live, linear attention over what is not."""

    def __init__(self, live, left, maps):
        self.live, self.left, self.maps = live, left, maps

    def attend(self, call, q, k, v, mask, scaling):
        causal = naive.causal_mask(q.shape[2], k.shape[2])
        near = naive.dense_segment(q, k, v, self.live & causal, scaling)
        psi, shift = self.maps.psi(k), 0
        if self.maps.spec.less_form == "kernel":
            phi = self.maps.phi(q)
        else:
            phi, shift = self.maps.phi(*naive.remainder_reach(q, k, psi, self.left), scaling)
        out, lse = naive.remainder_segment(phi, psi, v, self.left)
        return naive.with_sinks(naive.merge([near, (out, lse + shift)]), call.sinks)[0]


@torch.no_grad()
def reference_logits(model, ids, flags, window, start):
    n = torch.arange(ids.shape[1])
    for w, f in zip(wrappers(model), flags):
        live = live_mask(n, n, f, window) | (n[:, None] < start)
        memory = Reference(live, left_of(f, window, start), w.less())

        def forward(hidden_states, w=w, memory=memory, **kwargs):
            return type(w.module).forward(
                w.module, hidden_states, gatekv=AttentionCall(hidden_states, w.layer_idx, memory=memory), **kwargs
            )

        w.module.forward = forward
    try:
        return base_model(model)(ids, use_cache=False).logits
    finally:
        for w in wrappers(model):
            del w.module.forward


def all_flags(model, ids, policy, budget, window, prompt, **options):
    """The flags of every token, in its window or out of it."""
    cache = gatekv.KVCache(model, policy, budget, **options)
    recurrent_logits(model, ids, torch.ones_like(ids), cache, [prompt])
    flags = [layer.stage.held(layer) for layer in cache.evicting()]
    for f in flags:
        f[..., ids.shape[1] - max(window, 1) + 1 :] = True  # what is young is live whatever its flag
    return flags


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[50], [50, 51, 52, 60], [50, 57]])
@pytest.mark.parametrize("policy", ["snapkv+less", "keydiff+ada+less", "random+global+less", "h2o+less"])
@pytest.mark.parametrize("form", FORMS)
def test_one_shot_policies_remember_what_the_prompt_lost(form, policy, cuts, family):
    model = loud(gated(family, gate="none", less_form=form, **LESS))
    ids, mask = padded_batch([70])
    decode = {"decode": "keep"} if "h2o" in policy else {}
    got = recurrent_logits(model, ids, mask, gatekv.KVCache(model, policy, 0.75, **decode), cuts)
    flags = all_flags(model, ids, policy, 0.75, 0, 50, **decode)
    wanted = reference_logits(model, ids, flags, 0, 50)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.covering(1)  # a form does not know the family
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_family_remembers(form, kind):
    test_one_shot_policies_remember_what_the_prompt_lost(form, "keydiff+ada+less", [50, 51, 60], kind)
    test_a_streaming_gate_remembers_what_it_evicts(form, "mlp", [3, 4, 31, 60], kind)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[50], [3, 4, 5, 31, 60], list(range(1, 70))])
@pytest.mark.parametrize("gate", ["mlp", "attention"])
@pytest.mark.parametrize("form", FORMS)
def test_a_streaming_gate_remembers_what_it_evicts(form, gate, cuts, family):
    model = loud(gated(family, window=6, sinks=2, gate=gate, less_form=form, **LESS))
    ids, mask = padded_batch([70])
    flags = all_flags(model, ids, "gate+less", None, 6, 40)
    assert any((~f).any() for f in flags)
    got = recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate+less"), cuts)
    wanted = reference_logits(model, ids, flags, 6, 0)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("policy,budget", [("gate+less", None), ("gate+global+less", 0.5), ("snapkv+less", 0.75), ("h2o+less", 0.5),
                                           ("tova+less", 0.5), ("streaming_llm+less", 0.5), ("snapkv+think+less", 0.75)])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_padded_rows_are_solo_rows(form, policy, budget):
    model = loud(gated(window=6, sinks=2, less_form=form, **LESS))
    ids, mask = padded_batch([70, 61])
    together = recurrent_logits(model, ids, mask, gatekv.KVCache(model, policy, budget), [60, 61, 65])
    for row, n in enumerate((70, 61)):
        cuts = [60 - (70 - n), 61 - (70 - n)]
        alone = recurrent_logits(model, ids[row : row + 1, 70 - n :], mask[row : row + 1, 70 - n :],
                                 gatekv.KVCache(model, policy, budget), cuts)  # fmt: skip
        torch.testing.assert_close(together[row : row + 1, 70 - n :], alone, rtol=1e-9, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize(
    "policy", ["h2o+less", "tova+less", "streaming_llm+less", "gate+global+less", "snapkv+ada+less"]
)
@pytest.mark.parametrize("form", FORMS)
def test_the_state_is_the_sum_over_what_is_not_held(form, policy):
    model = loud(gated(window=6, sinks=2, less_form=form, **LESS))
    ids = torch.randint(1, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0))
    seen = {}
    cache = gatekv.KVCache(model, policy, 0.75 if "snapkv" in policy else 0.5)
    layers = cache.evicting()
    for layer in layers:
        attend = layer.attend

        def spy(call, q, k, v, mask, scaling, layer=layer, attend=attend):
            seen.setdefault(layer.layer_idx, []).append((k, v))
            return attend(call, q, k, v, mask, scaling)

        layer.attend = spy
    for a, b in ((0, 60), (60, 61), (61, 75), (75, 90)):
        model(ids[:, a:b], past_key_values=cache)
    for layer, w in zip(layers, wrappers(model)):
        k, v = (torch.cat(part, 2) for part in zip(*seen[layer.layer_idx]))
        folded = torch.arange(90) < layer.folded
        gone = ~layer.stage.held(layer) & folded
        psi = w.less().psi(k) * gone[..., None]
        torch.testing.assert_close(layer.store.remainder.state.h, psi.transpose(-1, -2) @ v, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.store.remainder.state.z, psi.sum(2), rtol=1e-9, atol=1e-12)
        if form == "centroids":
            torch.testing.assert_close(layer.store.remainder.state.m, psi.transpose(-1, -2) @ k, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_nothing_folded_and_untrained_maps_change_next_to_nothing():
    model = gated(window=6, sinks=2, **LESS)
    ids, mask = padded_batch([70, 50])
    full = recurrent_logits(model, ids, mask, gatekv.KVCache(model, "snapkv+less", 1.0), [60])
    plain = recurrent_logits(model, ids, mask, gatekv.KVCache(model, "snapkv", 1.0), [60])
    assert torch.isfinite(full).all() and torch.equal(full[mask.bool()], plain[mask.bool()])
    some, alone = (
        recurrent_logits(model, ids, mask, gatekv.KVCache(model, p, 0.9), [60]) for p in ("snapkv+less", "snapkv")
    )
    p, q = alone.log_softmax(-1), some.log_softmax(-1)
    assert 0 < (p.exp() * (p - q)).sum(-1)[mask.bool()].mean() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("policy,budget", [("gate+less", None), ("snapkv+ada+less", 0.75), ("h2o+less", 0.5)])
@pytest.mark.parametrize("form", FORMS)
def test_copies_files_beams_and_bytes(form, policy, budget, tmp_path):
    model = loud(gated(window=6, sinks=2, less_form=form, **LESS))
    ids = torch.randint(1, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    later = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    cache = gatekv.KVCache(model, policy, budget)
    model(ids, past_key_values=cache)
    model(later[:, :1], past_key_values=cache)
    cache.save(tmp_path / "less.safetensors")
    twin, loaded = cache.snapshot(), gatekv.KVCache.load(tmp_path / "less.safetensors", model)
    swapped = cache.snapshot()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert loaded.memory()["bytes"] <= cache.memory()["bytes"]
    state = sum(t.nbytes for layer in cache.evicting() for t in layer.store.remainder.state.tensors())
    assert state == 2 * 2 * 3 * 3 * ((8 if form == "kernel" else 16) + 1) * 8 and cache.memory()["bytes"] > state
    wanted = model(later, past_key_values=cache).logits
    for other in (twin, loaded):
        torch.testing.assert_close(model(later, past_key_values=other).logits, wanted)
    torch.testing.assert_close(model(later.flip(0), past_key_values=swapped).logits.flip(0), wanted)


@torch.no_grad()
@pytest.mark.parametrize("policy,budget", [("snapkv+less", 0.75), ("gate+global+less", 0.5)])
@pytest.mark.parametrize("form", FORMS)
def test_a_shared_prefill_decides_as_one_of_its_own(form, policy, budget):
    model = loud(gated(window=6, sinks=2, less_form=form, **LESS))
    ids = torch.randint(1, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    later = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    undecided, own = gatekv.KVCache.undecided(model), gatekv.KVCache(model, policy, budget)
    model(ids, past_key_values=undecided)
    model(ids, past_key_values=own)
    shared = undecided.decide(policy, budget)
    torch.testing.assert_close(model(later, past_key_values=shared).logits, model(later, past_key_values=own).logits)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no adapter in force has any.*GateKVConfig.less_rank=8"):
        gatekv.KVCache(tiny(), "snapkv+less", 0.5)
    with pytest.raises(ValueError, match="set less_rank"):
        gatekv.GateKVConfig(gate="none")
    with pytest.raises(ValueError, match="narrow tokens cannot be folded later"):
        gatekv.KVCache(gated(**LESS), "h2o+think+less", 0.5)
    with pytest.raises(ValueError, match="policy 'gate' needs an adapter with gates"):
        gatekv.KVCache(gated(gate="none", **LESS), "gate", 0.5)


@torch.no_grad()
def test_evaluation_pays_for_the_state_in_tokens():
    from gatekv.evaluation import frontier
    from gatekv.evaluation.tasks import Item

    model = loud(gated(gate="none", dtype=torch.float32, **LESS))
    ids = torch.randint(1, VOCAB, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    item = Item(ids, [([5], [6, 7])], lambda log_p, answers, full: ([0.0], [0.0]))
    cells = [frontier.FULL, ("snapkv", 0.5), ("snapkv+less", 0.5), ("snapkv+less", 0.004)]
    full, alone, less, small = frontier.run_item(model, item, cells, decode="keep", sinks=None, window=None)
    assert less["ratio"] == pytest.approx(alone["ratio"], abs=0.02) and "is unreachable" in small["refused"]


def test_maps_know_what_they_were_trained_for(monkeypatch):
    """Another policy or budget works, and says so once."""
    from gatekv.cache import settings

    said = []
    monkeypatch.setattr(settings.logger, "warning_once", said.append)
    model = gated(gate="none", less_policy="snapkv+ada", less_budget=0.5, **LESS)
    gatekv.KVCache(model, "snapkv+ada+less", 0.5)
    assert not said
    gatekv.KVCache(model, "snapkv+less", 0.5)
    gatekv.KVCache(model, "snapkv+ada+less", 0.25)
    assert len(said) == 2 and "trained for SnapKV x Ada at budget 0.5, not for SnapKV x Uniform at 0.5" in said[0]


@torch.no_grad()
def test_a_file_of_other_maps_is_refused(tmp_path):
    model = loud(gated(gate="none", **LESS))
    cache = gatekv.KVCache(model, "snapkv+less", 0.75)
    model(torch.randint(1, VOCAB, (1, 60)), past_key_values=cache)
    cache.save(tmp_path / "less.safetensors")
    with torch.no_grad():
        wrappers(model)[0].less().phi.w1.add_(1)
    with pytest.raises(ValueError, match="compressed by other gates"):
        gatekv.KVCache.load(tmp_path / "less.safetensors", model)


@torch.no_grad()
def test_turns_are_remembered_too():
    model = loud(gated(gate="none", **LESS))
    ids = torch.randint(1, VOCAB, (2, 100), generator=torch.Generator().manual_seed(0))
    cache, seen = gatekv.KVCache(model, "keydiff+less", 0.5, turns=True), []
    layer, w = cache.evicting()[0], wrappers(model)[0]
    attend = layer.attend
    layer.attend = lambda call, q, k, v, *rest: (seen.append((k, v)), attend(call, q, k, v, *rest))[1]
    for a, b in ((0, 50), (50, 80)):
        model(ids[:, a:b], past_key_values=cache)
    cache.compress()
    assert torch.isfinite(model(ids[:, 80:], past_key_values=cache).logits).all()
    k, v = (torch.cat(part, 2)[:, :, :80] for part in zip(*seen))
    psi = w.less().psi(k) * ~layer.stage.held(layer)[..., :80, None]
    torch.testing.assert_close(layer.store.remainder.state.h, psi.transpose(-1, -2) @ v, rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.covering(1)  # every way to evict; forms differ in what is gathered
@pytest.mark.parametrize("policy,budget", [("gate+less", None), ("snapkv+less", 0.85), ("h2o+less", 0.5)])
@pytest.mark.parametrize("form", FORMS)
def test_beams_take_their_states_with_them(form, policy, budget, family):
    """A beam's score is that of its tokens alone, fed to a cache that never was in a beam search."""
    model = loud(gated(family, window=6, sinks=2, less_form=form, **LESS))
    ids, mask = padded_batch([50, 41])
    cache = gatekv.KVCache(model, policy, budget)
    out = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, num_beams=4, num_return_sequences=3, do_sample=False,
        max_new_tokens=12, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, :50], ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in out.sequences[:3, 50:].tolist()}) == 3
    wanted = []
    for row, pads in zip(out.sequences, (mask == 0).sum(1).repeat_interleave(3).tolist()):
        alone = row[None, pads:]
        fresh = gatekv.KVCache(model, policy, budget)
        logits = recurrent_logits(
            model, alone, torch.ones_like(alone), fresh, [50 - pads, *range(51 - pads, 62 - pads)]
        )
        answers = logits[:, 49 - pads : -1].log_softmax(-1).gather(-1, alone[:, 50 - pads :, None])
        wanted.append(answers.sum())
    torch.testing.assert_close(out.sequences_scores.double(), torch.stack(wanted), rtol=1e-6, atol=1e-6)
